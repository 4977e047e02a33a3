"""Where cases are kept: what fits, what is told, what is refused."""

import logging

import jax
import numpy as np
import pytest

from panther_jax.config.schema import ConfigError
from panther_jax.devices import memory as memory_module
from panther_jax.devices.mesh import AXES
from panther_jax.plans.geometry import Geometry, Properties
from panther_jax.store.store import StoredCase
from panther_jax.training import feeding

SHAPE = (8, 16, 16)
IMAGE_BYTES, LABEL_BYTES = 4 * 2048, 2048
CASE_BYTES = IMAGE_BYTES + LABEL_BYTES  # also on the device: a case is two whole lines


@pytest.fixture
def cases():
    geometry = Geometry(
        SHAPE, (1.0,) * 3, (0.0,) * 3, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    )
    properties = Properties(geometry, SHAPE, tuple((0, n) for n in SHAPE), SHAPE)
    image, label = np.zeros((1, *SHAPE), np.float32), np.zeros(SHAPE, np.int8)
    return tuple(StoredCase(str(i), image, label, (), properties) for i in range(10))


def mesh(count=1):
    grid = np.array(jax.devices()[:count]).reshape(count, 1)
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.fixture
def memory(monkeypatch):
    """Set what the host has available and, if given, what an accelerator has in all and free."""

    def give(host, *, limit=None, free=None):
        monkeypatch.setattr(memory_module, "available_memory", lambda: host)
        monkeypatch.setattr(memory_module, "memory_limit", lambda device: limit)
        monkeypatch.setattr(memory_module, "free_memory", lambda device: free)

    return give


def on_accelerator(monkeypatch):
    monkeypatch.setattr(feeding, "_is_accelerated", lambda mesh: True)


@pytest.mark.parametrize(
    "host, limit, expected",
    [
        (10**9, 41 * CASE_BYTES, "device"),
        (10**9, 39 * CASE_BYTES, "host"),  # a quarter of it is less than the cases
        (10**9, None, "host"),
        (9 * CASE_BYTES, 10**9, "stream"),  # they have to pass through host memory
        (21 * CASE_BYTES, 10**3, "host"),
        (19 * CASE_BYTES, 10**3, "stream"),
        (None, 10**9, "device"),
        (None, 10**3, "host"),
    ],
)
def test_auto_takes_the_first_that_fits(cases, memory, monkeypatch, caplog, host, limit, expected):
    memory(host, limit=limit)
    on_accelerator(monkeypatch)
    caplog.set_level(logging.INFO, logger="panther_jax")
    monkeypatch.setattr(feeding.LOGGER, "propagate", True)
    assert feeding.choose_residence("auto", cases, mesh()) == expected
    (line,) = {r.getMessage() for r in caplog.records}  # other tests may have left handlers
    assert line.startswith("10 cases of 0.000102 GB stay in ")
    assert line.endswith(f"data.resident auto, which is {expected} here")


def test_on_a_cpu_auto_never_copies_cases_beside_those_of_the_host(cases, memory):
    memory(21 * CASE_BYTES, limit=10**12, free=10**12)
    assert feeding.choose_residence("auto", cases, mesh()) == "host"
    memory(19 * CASE_BYTES, limit=10**12, free=10**12)
    assert feeding.choose_residence("auto", cases, mesh()) == "stream"


@pytest.mark.parametrize("wanted", ["host", "stream"])
def test_what_is_asked_for_is_done(cases, memory, wanted):
    memory(1, limit=1, free=1)
    assert feeding.choose_residence(wanted, cases, mesh()) == wanted


def test_a_device_that_is_asked_for_must_have_room(cases, memory):
    memory(None, free=10 * CASE_BYTES)
    assert feeding.choose_residence("device", cases, mesh()) == "device"
    memory(None, free=None)
    assert feeding.choose_residence("device", cases, mesh()) == "device"  # not known: try
    memory(None, free=10 * CASE_BYTES - 1)
    message = (
        r"(?s)10 cases take 0.000102 GB, 0.000102 GB of .* are free here .*--data.resident host"
    )
    with pytest.raises(ConfigError, match=message):
        feeding.choose_residence("device", cases, mesh())
    memory(None, free=15 * CASE_BYTES)  # two virtual devices share one memory
    with pytest.raises(ConfigError, match="10 cases take 0.000205 GB"):
        feeding.choose_residence("device", cases, mesh(2))


def test_a_case_whose_voxels_int32_does_not_number_stays_on_the_host(cases, memory, monkeypatch):
    monkeypatch.setattr(feeding, "MAX_CASE_VOXELS", 2047)
    memory(10**9, limit=10**9, free=10**9)
    on_accelerator(monkeypatch)
    assert feeding.choose_residence("auto", cases, mesh()) == "host"
    with pytest.raises(ConfigError, match="a case may have 2047 voxels at most"):
        feeding.choose_residence("device", cases, mesh())


def test_available_memory_and_devices_of_this_machine_are_read():
    found = memory_module.available_memory()
    assert found is None or found > 10**7
    free = memory_module.free_memory(jax.devices()[0])
    assert free is None or free > 10**7

    class Accelerator:
        platform = "gpu"

        def __init__(self, **stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats or None

    full = Accelerator(bytes_limit=100, bytes_in_use=30)
    assert (memory_module.memory_limit(full), memory_module.free_memory(full)) == (100, 70)
    assert (
        memory_module.memory_limit(Accelerator())
        is memory_module.free_memory(Accelerator())
        is None
    )
