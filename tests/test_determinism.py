"""The same seed gives the same bits, whatever the number of threads that load the data.

Whole runs are compared in ``test_faults``: killed ones, and one with other threads.
"""

import dataclasses
import os
import re

import jax
import numpy as np
import pytest
from fault_harness import differences, make_store

from panther_jax import train
from panther_jax.config.loading import load_config
from panther_jax.devices.mesh import make_mesh
from panther_jax.store.store import open_store
from panther_jax.training import feeding, options, session


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(make_store(tmp_path_factory.mktemp("data"))[1])


def settings(threads, *, prefetch=4, resident="host", seed=0):
    config, _ = load_config("smoke")
    replace = dataclasses.replace
    return replace(
        config,
        data=replace(
            config.data, num_threads=threads, prefetch_batches=prefetch, resident=resident
        ),
        loop=replace(config.loop, compilation_cache=False, seed=seed),
        validation=replace(config.validation, checkpoints=("final", "best")),
    )


def drawn(config, store, count=6):
    mesh = make_mesh(
        config.devices, batch_size=2, patch_size=config.data.patch_size, arch=store.plans.arch
    )
    opened = feeding.make_streams(config, store, 0, initial_patch=(10, 18, 18), mesh=mesh)
    made = []
    for stream in (opened.train(0), opened.validation(0)):
        made += [next(stream).cut() for _ in range(count // len(made) if made else count)][:count]
    return made


@pytest.mark.parametrize(
    ("threads", "prefetch", "resident"),
    [(2, 1, "host"), (8, 16, "host"), (3, 2, "stream"), (2, 3, "device")],
)
def test_batches_do_not_depend_on_threads(store, threads, prefetch, resident):
    one = drawn(settings(1, prefetch=1), store)
    several = drawn(settings(threads, prefetch=prefetch, resident=resident), store)
    assert len(one) == len(several) > 6
    for a, b in zip(one, several, strict=True):
        for name in ("image", "label"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    other = drawn(settings(1, seed=1), store)
    assert any((a.image != b.image).any() for a, b in zip(one, other, strict=True))


def test_the_option_for_reproducible_sums_on_a_gpu(monkeypatch, capsys):
    config = settings(1)
    monkeypatch.setenv("XLA_FLAGS", "--xla_x=1")
    session.set_up_jax(config, deterministic=False)
    assert os.environ["XLA_FLAGS"] == "--xla_x=1"
    session.set_up_jax(config, deterministic=True)
    assert os.environ["XLA_FLAGS"] == "--xla_x=1 --xla_gpu_deterministic_ops=true"
    with pytest.raises(SystemExit):
        options.parse(["--help"])
    assert re.search(r"--deterministic\s+reproducible results on a GPU", capsys.readouterr().out)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_two_runs_on_a_gpu(store, tmp_path):
    """With ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``, which ``--deterministic`` sets."""
    assert "--xla_gpu_deterministic_ops=true" in os.environ.get("XLA_FLAGS", "")
    folders = []
    for name in ("one", "two"):
        folders.append(tmp_path / name / "fold_0")
        folders[-1].mkdir(parents=True)
        train.train_fold(settings(4), store, folders[-1], fold=0, bundle=None)
    assert differences(*folders) == []
