"""Names and layouts of nnU-Net's state dicts, and the rules of what is taken."""

import ast
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import weight_files as made
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_names import canonical_params

from panther_jax.network import unet
from panther_jax.plans.architecture import ArchSpec
from weight_conversion import mapping
from weight_conversion.mapping import ConversionError, convert, names_of, to_state

PACKAGE = Path(__file__).resolve().parents[2] / "weight_conversion"
FILES = sorted(PACKAGE.glob("*.py"))


def full_state(arch, seed=0):
    """A state dict with all its names, as NumPy arrays."""
    tensors = to_state(made.random_params(arch, seed), arch)
    return {key: tensors[name] for key, name in names_of(arch).keys}


def flat(params):
    return {"/".join(path): leaf for path, leaf in unet.walk(params)}


def assert_same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.golden
def test_every_key_of_resenc_l_in_order(golden):
    tables = sorted((golden / "weights").glob("*_keys.json"))
    assert tables
    for path in tables:
        table = json.loads(path.read_text())
        arch = ArchSpec.from_nnunet(
            table["architecture"],
            in_channels=table["input_channels"],
            num_outputs=table["num_classes"],
        )
        names = names_of(arch)
        assert list(names.keys) == [(row["key"], row["canonical"]) for row in table["state_dict"]]
        shapes = {row["key"]: tuple(row["shape"]) for row in table["state_dict"]}
        assert all(names.entries[name].shape == shapes[key] for key, name in names.keys)
        order = [(row["name"], tuple(row["shape"])) for row in table["optimizer_parameter_order"]]
        assert [(name, entry.shape) for name, entry in names.entries.items()] == order
        assert len(names.keys) == table["n_keys"]


@pytest.mark.parametrize("arch", made.NETWORKS.values(), ids=made.NETWORKS)
def test_round_trip_is_exact_and_agrees_with_an_independent_mapping(arch):
    params = made.random_params(arch)
    state = full_state(arch)
    converted = convert(state, arch)
    assert_same(converted.params, params)
    assert_same(canonical_params(state), params)
    assert converted.skipped == () and converted.absent == ()
    assert len(converted.taken) == len(flat(params))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_names_are_a_bijection_for_any_network(data):
    stages, ndim = data.draw(st.integers(2, 4)), data.draw(st.sampled_from([2, 3]))
    per_stage = st.tuples(*[st.integers(1, 3)] * stages)
    network = data.draw(st.sampled_from(["ResidualEncoderUNet", "PlainConvUNet"]))
    arch = ArchSpec(
        network,
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(2, 3)),
        data.draw(st.tuples(*[st.integers(2, 4)] * stages)),
        ((3,) * ndim,) * stages,
        data.draw(st.tuples(*[st.tuples(*[st.integers(1, 2)] * ndim)] * stages)),
        data.draw(per_stage),
        data.draw(st.tuples(*[st.integers(1, 2)] * (stages - 1))),
        bottleneck_channels=data.draw(st.none() | per_stage) if "Res" in network else None,
        conv_bias=data.draw(st.booleans()),
        norm_affine=data.draw(st.booleans()),
        dropout_rate=data.draw(st.sampled_from([0.0, 0.1])),
    )
    names = names_of(arch)
    shapes = flat(unet.param_shapes(arch))
    assert {"/".join(e.path) for e in names.entries.values()} == shapes.keys()
    assert {name for _, name in names.keys} == set(names.entries)
    assert len({key for key, _ in names.keys}) == len(names.keys)
    assert all(mapping.canonical_name(key) == name for key, name in names.keys)
    for entry in names.entries.values():
        zeros = np.zeros(entry.shape)
        assert mapping.to_port(zeros, entry.layout).shape == shapes["/".join(entry.path)].shape


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module.module."])
def test_prefixes_that_every_name_carries_are_stripped(prefix):
    state = full_state(made.RESIDUAL)
    converted = convert({prefix + k: v for k, v in state.items()}, made.RESIDUAL)
    assert_same(converted.params, made.random_params(made.RESIDUAL))


def test_a_prefix_of_some_names_only_is_an_error():
    state = full_state(made.RESIDUAL)
    first = next(iter(state))
    renamed = {("module." + k if k == first else k): v for k, v in state.items()}
    with pytest.raises(ConversionError, match="1 not in the plans' network"):
        convert(renamed, made.RESIDUAL)


@pytest.mark.parametrize("which", [-1, 5, 40, 100])
def test_names_of_one_tensor_that_disagree_are_refused(which):
    state = full_state(made.RESIDUAL)
    key = [k for k in state if "all_modules" in k or k.startswith("decoder.encoder.")][which]
    state[key] = state[key] + np.float32(1e-3)
    with pytest.raises(ConversionError, match="another name of the same tensor"):
        convert(state, made.RESIDUAL)


def test_canonical_names_alone_suffice_for_reading():
    tensors = to_state(made.random_params(made.FLAT), made.FLAT)
    assert_same(convert(tensors, made.FLAT).params, made.random_params(made.FLAT))


# ------------------------------------------------------------------------------ what does not fit


def test_all_that_does_not_fit_is_counted_and_named():
    state = full_state(made.RESIDUAL)
    base = [
        k for k in state if mapping.canonical_name(k) == "encoder.stages.1.blocks.0.conv1.conv.bias"
    ]
    for key in base:
        del state[key]
    wrong = [k for k in state if mapping.canonical_name(k) == "encoder.stem.convs.0.conv.bias"]
    for key in wrong:
        state[key] = np.zeros(9, np.float32)
    state["decoder.surprise.weight"] = np.zeros(2, np.float32)
    with pytest.raises(ConversionError) as caught:
        convert(state, made.RESIDUAL)
    text = str(caught.value)
    assert "1 missing, 1 another shape (file -> plans), 1 not in the plans' network" in text
    assert "missing: encoder.stages.1.blocks.0.conv1.conv.bias" in text
    assert "encoder.stem.convs.0.conv.bias: (9,) -> (4,)" in text
    assert "decoder.surprise.weight" in text


def test_another_network_is_named():
    with pytest.raises(ConversionError, match="The file is of a PlainConvUNet"):
        convert(full_state(made.PLAIN), made.RESIDUAL)
    with pytest.raises(ConversionError, match="no nnU-Net U-Net: 1 tensors, the first: conv0.w"):
        convert({"conv0.w": np.zeros(3, np.float32)}, made.RESIDUAL)
    with pytest.raises(ConversionError, match="no nnU-Net U-Net"):
        convert({}, made.RESIDUAL)


def test_a_wrong_encoder_stride_shows_in_the_transposed_convolution():
    other = dataclasses.replace(made.RESIDUAL, strides=((1, 1, 1), (1, 2, 2), (1, 2, 2)))
    with pytest.raises(ConversionError, match="decoder.transpconvs.0.weight: "):
        convert(full_state(made.RESIDUAL), other)


def test_parameters_that_do_not_fit_are_not_exported():
    params = made.random_params(made.RESIDUAL)
    del params["encoder"]["stem"]
    with pytest.raises(ConversionError, match="encoder/stem/conv/kernel: missing"):
        to_state(params, made.RESIDUAL)
    params = made.random_params(made.RESIDUAL)
    params["encoder"]["extra"] = np.zeros(1, np.float32)
    with pytest.raises(ConversionError, match="encoder/extra: not a parameter"):
        to_state(params, made.RESIDUAL)


# -------------------------------------------------------------------------------- stems and heads


@pytest.fixture
def multi():
    torch = pytest.importorskip("torch")
    assert torch
    state = made.multi_state(made.RESIDUAL, {"035": 1, "221": 2, "351_5": 1}, {"035": 2, "221": 5})
    state["decoder.organ_seg_layers.0.weight"] = state["decoder.seg_layers.035.0.weight"]
    return {key: tensor.numpy() for key, tensor in state.items()}


@pytest.mark.torch
@pytest.mark.parametrize("choice", [None, "copy"])
def test_several_stems_must_be_chosen_from(multi, choice):
    with pytest.raises(ConversionError) as caught:
        convert(multi, made.RESIDUAL, stem=choice)
    for line in ("035: 1 input channel", "221: 2 input channel", "351_5: 1 input", "--stem reinit"):
        assert line in str(caught.value)


@pytest.mark.torch
def test_a_chosen_stem_is_taken_and_the_others_are_reported(multi):
    arch = dataclasses.replace(made.RESIDUAL, in_channels=2)
    converted = convert(multi, arch, stem="221")
    kernel = converted.params["encoder"]["stem"]["conv"]["kernel"]
    expected = multi["encoder.stem.221.convs.0.conv.weight"]
    np.testing.assert_array_equal(kernel, np.moveaxis(expected, (0, 1), (-1, -2)))
    assert converted.absent == ("heads",) and "heads" not in converted.params["decoder"]
    rules = {rule for _, rule in converted.skipped}
    assert rules == {"stems of other datasets", "heads of other datasets", "organ heads"}
    assert "skipped: 8 tensors (stems of other datasets)" in converted.report()
    with pytest.raises(ConversionError, match=r"encoder.stem.221.convs.0.conv.weight: \(4, 2,"):
        convert(multi, made.RESIDUAL, stem="221")
    with pytest.raises(ConversionError, match="stem '222' is not in the file"):
        convert(multi, arch, stem="222")


@pytest.mark.torch
def test_a_fresh_stem_leaves_all_of_them(multi):
    converted = convert(multi, made.RESIDUAL, stem="reinit")
    assert converted.absent == ("stem", "heads") and "stem" not in converted.params["encoder"]
    rest = flat(made.random_params(made.RESIDUAL))
    rest = {k: v for k, v in rest.items() if "/heads/" not in k and "/stem/" not in k}
    found = flat(converted.params)
    assert found.keys() == rest.keys()
    assert all(np.array_equal(found[k], rest[k]) for k in rest)


def test_choices_for_an_ordinary_file():
    state = full_state(made.RESIDUAL)
    assert_same(
        convert(state, made.RESIDUAL, stem="copy").params, made.random_params(made.RESIDUAL)
    )
    fresh = convert(state, made.RESIDUAL, stem="reinit")
    assert fresh.absent == ("stem",) and len(fresh.skipped) == 4
    with pytest.raises(ConversionError, match="one stem without an id"):
        convert(state, made.RESIDUAL, stem="221")


def test_a_plain_network_has_no_stem():
    state = full_state(made.PLAIN)
    converted = convert(state, made.PLAIN, stem="reinit")
    assert converted.absent == () and converted.skipped == ()
    with pytest.raises(ConversionError, match="no stem"):
        convert(state, made.PLAIN, stem="221")


# --------------------------------------------------------------------------------- shape of code


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_package_keeps_the_rules_of_the_house(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = PACKAGE.parent / "panther_jax"
    allowed = {p.parent.name for p in package.glob("*/__init__.py")} - {"panther"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            root, *rest = node.module.split(".")
            rooms = set(rest[:1]) if rest else {alias.name for alias in node.names}
            assert root != "panther_jax" or rooms <= allowed, f"{path.name} imports {rooms}"
        if isinstance(node, ast.Import):
            assert all(a.name.split(".")[0] not in ("pickle", "dill") for a in node.names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads")
            if called == "torch.load":
                safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert safe["weights_only"] == "True"
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60 and len(node.args.args) <= 5, node.name
    assert path.read_text().count("\n") <= 600
