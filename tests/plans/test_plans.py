"""Labels, architectures, configurations: read as nnU-Net means them, or refused by name."""

import json

import pytest

from panther_jax.base.errors import FileError, PlansError
from panther_jax.base.files import read_json
from panther_jax.plans.architecture import ArchSpec
from panther_jax.plans.geometry import Geometry, Properties
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import Plans, normalization_schemes, resolve_configuration


def architecture(name="ResidualEncoderUNet", **changes):
    blocks = "n_blocks_per_stage" if name == "ResidualEncoderUNet" else "n_conv_per_stage"
    kwargs = {
        "n_stages": 3,
        "features_per_stage": [8, 16, 32],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        blocks: [1, 2, 2],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": {**kwargs, **changes},
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def read(block, **kwargs):
    return ArchSpec.from_nnunet(block, **{"in_channels": 1, "num_outputs": 3, **kwargs})


@pytest.mark.parametrize(
    "block",
    [
        architecture(),
        architecture("PlainConvUNet", nonlin_first=True, conv_bias=False),
        architecture(nonlin_kwargs={"inplace": True, "negative_slope": 0.2}, stem_channels=4),
        architecture(
            block="dynamic_network_architectures.building_blocks.residual.BottleneckD",
            bottleneck_channels=[4, 8, 8],
        ),
        architecture(dropout_op="torch.nn.modules.dropout.Dropout3d", dropout_op_kwargs={"p": 0.3}),
        architecture(norm_op=None, norm_op_kwargs=None, nonlin=None, nonlin_kwargs=None),
        architecture(nonlin="torch.nn.GELU", nonlin_kwargs={}),
        architecture(nonlin="torch.nn.SiLU"),
    ],
)
def test_architectures_survive_the_way_to_nnunet_and_back(block):
    arch = read(block)
    written = arch.to_nnunet()
    assert read(written) == arch
    for key, value in block["arch_kwargs"].items():
        assert written["arch_kwargs"].get(key) == value, key


def test_scalars_stand_for_every_stage():
    arch = read(architecture(kernel_sizes=3, strides=1, features_per_stage=8, n_blocks_per_stage=2,
                             n_conv_per_stage_decoder=1))  # fmt: skip
    assert arch.features == (8, 8, 8) and arch.kernel_sizes == ((3, 3, 3),) * 3
    assert arch.blocks == (2, 2, 2) and arch.decoder_convs == (1, 1)


def test_derived_sizes():
    arch = read(architecture())
    assert arch.divisor == (2, 4, 4)
    assert arch.output_strides == ((1, 1, 1), (1, 2, 2))
    arch.check_patch((4, 8, 8))
    for patch, message in (
        ((3, 8, 8), "not divisible"),
        ((2, 4, 4), "single voxel"),
        ((8, 8), "2 axes"),
        ((0, 8, 8), "not divisible"),
    ):
        with pytest.raises(PlansError, match=message):
            arch.check_patch(patch)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"network_class_name": "my.Transformer"}, "unknown network class 'Transformer'"),
        (architecture(conv_op="os.system"), "conv_op 'os.system' is not supported"),
        (architecture(norm_op="torch.nn.BatchNorm3d"), "norm_op 'torch.nn.BatchNorm3d'"),
        (architecture(nonlin="torch.nn.PReLU"), "nonlin 'torch.nn.PReLU'"),
        (architecture(nonlin="torch.nn.GELU", nonlin_kwargs={"approximate": "tanh"}), "'tanh'"),
        (architecture(strides=[[1, 2, 2]] * 3), r"first stage has strides \(1, 2, 2\)"),
        (architecture(features_per_stage=[8, 16]), "kernel_sizes has 3 entries for 2 stages"),
        (architecture(strides=[[1, 1], [2, 2], [2, 2]]), "2 or all have 3 axes"),
        (architecture(kernel_sizes=2), "must be odd"),
        (architecture(n_conv_per_stage_decoder=[1]), "decoder has 1 entries, expected 2"),
        (architecture(block="x.Fancy"), "block 'Fancy' is not"),
        (architecture(block="x.BottleneckD"), "need 'bottleneck_channels'"),
    ],
)
def test_architectures_that_cannot_be_built(block, message):
    with pytest.raises(PlansError, match=message):
        read(block)


def test_labels_and_regions():
    plain = Labels.from_dataset_json({"labels": {"background": 0, "pancreas": 2, "tumor": 1,
                                                 "ignore": 3}})  # fmt: skip
    assert plain.ids == (0, 1, 2) and plain.foreground_ids == (1, 2) and plain.ignore_id == 3
    assert plain.num_outputs == 3 and not plain.has_regions
    assert plain.classes == (("tumor", 1), ("pancreas", 2))
    assert plain.allowed_values == (0, 1, 2, 3)
    regions = Labels.from_dataset_json(
        {
            "labels": {"background": 0, "pancreas": [1, 2], "tumor": 1},
            "regions_class_order": [2, 1],
        }
    )
    assert regions.has_regions and regions.regions == ((1, 2), 1) and regions.num_outputs == 2
    assert regions.classes == (("pancreas", (1, 2)), ("tumor", 1))
    assert Labels.from_dataset_json(json.loads(json.dumps(regions.to_dataset_json()))) == regions


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"tumor": 1}, "'background': 0 is mandatory"),
        ({"background": 0, "tumor": 2}, "consecutive from 0, found .0, 2."),
        ({"background": 0, "tumor": 1, "ignore": 5}, "'ignore' must be the highest label . 1 = 2"),
        ({"background": 0, "all": [1, 2], "tumor": 1}, "'regions_class_order' must list"),
        ({"background": 0, "tumor": True}, "label 'tumor' is True"),
        ({"background": 0, "tumor": -1}, "label 'tumor' is -1"),
        ({}, "'labels' must map names"),
    ],
)
def test_labels_that_cannot_be_used(labels, message):
    with pytest.raises(PlansError, match=message):
        Labels.from_dataset_json({"labels": labels})


def make_plans(**entry):
    full = {
        "batch_size": 2,
        "patch_size": [16, 32, 32],
        "spacing": [3.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "resampling_fn_data": "resample_torch_fornnunet",
        "resampling_fn_seg": "resample_torch_fornnunet",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1},
        "architecture": architecture(),
        **entry,
    }
    return {
        "dataset_name": "Dataset001_Toy",
        "plans_name": "toy",
        "transpose_forward": [2, 0, 1],
        "configurations": {
            "3d_fullres": {k: v for k, v in full.items() if v is not None},
            "child": {"inherits_from": "3d_fullres", "batch_size": 4},
            "grandchild": {"inherits_from": "child", "spacing": [1.0, 1.0, 1.0]},
            "circle": {"inherits_from": "circle"},
        },
    }


DATASET = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "tumor": 1, "pancreas": 2}}


def test_configurations_inherit_and_survive_json():
    plans = Plans.from_nnunet(make_plans(), DATASET, "grandchild")
    assert plans.batch_size == 4 and plans.spacing == (1.0, 1.0, 1.0)
    assert plans.patch_size == (16, 32, 32) and plans.transpose_backward == (1, 2, 0)
    assert plans.resampling_logits.get("order") == 1 and plans.arch.num_outputs == 3
    stored = json.loads(json.dumps(plans.to_nnunet()))
    assert Plans.from_nnunet(stored, DATASET) == plans


def test_plans_that_cannot_be_used():
    for name, message in (("circle", "in a circle"), ("3d_lowres", "'3d_lowres' not found")):
        with pytest.raises(PlansError, match=message):
            resolve_configuration(make_plans(), name)
    with pytest.raises(PlansError, match="name one of the configurations"):
        Plans.from_nnunet(make_plans(), DATASET)
    with pytest.raises(PlansError, match="'3d_fullres' lacks 'patch_size'"):
        Plans.from_nnunet(make_plans(patch_size=None), DATASET, "3d_fullres")
    with pytest.raises(PlansError, match="resampling function 'fancy' is not supported"):
        Plans.from_nnunet(make_plans(resampling_fn_data="fancy"), DATASET, "3d_fullres")
    with pytest.raises(PlansError, match="'channel_names' is missing"):
        Plans.from_nnunet(make_plans(), {"labels": DATASET["labels"]}, "3d_fullres")


def test_normalisation_follows_the_channel_names():
    assert normalization_schemes({"1": "T1", "0": "CT"}) == (
        "CTNormalization",
        "ZScoreNormalization",
    )
    assert normalization_schemes({"0": "noNorm"}) == ("NoNormalization",)


def test_properties_survive_json():
    geometry = Geometry((4, 5, 6), (3.0, 1.0, 1.5), (0.1, 0.2, 0.3), (1.0,) * 9)
    properties = Properties(geometry, (4, 5, 6), ((0, 4), (1, 5), (2, 6)), (4, 4, 4))
    assert Properties.from_json(json.loads(json.dumps(properties.to_json()))) == properties


def test_json_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="plans.json does not exist"):
        read_json(tmp_path / "plans.json")
    (tmp_path / "plans.json").write_text('{"a": ')
    with pytest.raises(FileError, match="plans.json is not valid JSON"):
        read_json(tmp_path / "plans.json")
