"""FLUX.2-klein: which layers, which conventions."""

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from flow_bases import tiny_klein

from svfit_dreambooth.bases.flux2 import FLUX2, Flux2Klein
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.one_sided import basis_numbers
from svfit_dreambooth.method.targets import find_projections, matrix_layers
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.presets import with_values

SIZES = {  # of the published transformers
    "4b": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    "9b": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
}


@pytest.fixture(scope="module")
def family():
    return Flux2Klein(tiny_klein())


@pytest.mark.parametrize(
    "size, targets, values",
    [
        ("4b", ["attention"], 245_760),
        ("4b", ["attention", "feed-forward"], 307_200),
        ("9b", ["attention"], 458_752),
    ],
)
def test_the_real_sizes_hold_so_many_values(size, targets, values):
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(guidance_embeds=False, **SIZES[size])
    found = find_projections(transformer, targets, FLUX2)
    assert sum(min(layer.weight.shape) for _, _, layer in found.values()) == values


def test_unasked_a_run_on_the_real_size_trains_400_values_a_layer():
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(guidance_embeds=False, **SIZES["4b"])
    found = find_projections(transformer, None, FLUX2)
    shapes = {name: tuple(layer.weight.shape) for name, (_, _, layer) in found.items()}
    config = with_values(TrainConfig(), Flux2Klein.values_per_layer, shapes)
    assert (config.rank, config.budget, len(shapes)) == ("full", 400 * 80, 80)
    for asked in ({"rank": "full"}, {"rank": 64}, {"energy": 0.9}, {"init_adapter": "dog.safetensors"}):
        assert with_values(TrainConfig(**asked), Flux2Klein.values_per_layer, shapes).budget is None
    assert with_values(TrainConfig(), None, shapes) == TrainConfig(rank="full")
    # at full rank, in bf16: beside the network one side, a fifth of both
    numbers = sum(basis_numbers(*shape, min(shape)) for shape in shapes.values())
    assert 1.4 < 2 * numbers / 2**30 < 1.7 and 2 * sum(min(s) * sum(s) for s in shapes.values()) / 2**30 > 6.6


def test_a_single_block_is_adapted_whole(family):
    names = list(family.find_projections("transformer"))
    assert [name for name in names if name.startswith("single_transformer_blocks.0.")] == [
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        "single_transformer_blocks.0.attn.to_out",
    ]


def test_prompts_are_read_as_the_pipeline_reads_them(family):
    prompts = ["a photo of sks dog", "a very long " * 200]
    with torch.no_grad():
        found = family.encode_tokens(family.tokenize(prompts), family.text_encoders)["prompt_embeds"]
        expected = family.pipeline.encode_prompt(prompts)[0]
    assert torch.equal(found, expected)


def test_a_prompt_that_is_cut_is_named(family, caplog):
    family.tokenize(["fits", "far too long " * 100])
    assert [record.args[0] for record in caplog.records] == ["far too long " * 100]


def test_photos_are_encoded_as_the_pipeline_encodes_them(family):
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, spread = family.encode_images(pixels)
    with torch.no_grad():
        expected = family.pipeline._encode_vae_image(pixels, None)
    torch.testing.assert_close(mean, expected)
    assert mean.shape == spread.shape == (2, 16, 4, 6) and (spread > 0).all()


def test_the_negative_prompt_is_refused_not_ignored(family):
    with pytest.raises(ValueError, match="negative_prompt 'blurry' does not work with FLUX.2-klein"):
        family.painting_arguments({"prompt": "a dog", "negative_prompt": "blurry"}, 4.0)


def test_a_distilled_base_names_its_sibling():
    assert Flux2Klein(tiny_klein()).undistilled is None
    assert Flux2Klein(tiny_klein(is_distilled=True)).undistilled == "black-forest-labs/FLUX.2-klein-base-9B"


def test_fused_projections_are_refused():
    transformer = tiny_klein().transformer
    transformer.fuse_qkv_projections()
    with pytest.raises(SVFitError, match="unfuse_qkv_projections"):
        matrix_layers(transformer)
    transformer.unfuse_qkv_projections()
    assert matrix_layers(transformer)
