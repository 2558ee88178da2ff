"""Sana: which layers, which conventions."""

import pytest
import torch
from diffusers import SanaTransformer2DModel
from flow_bases import tiny_sana

from svfit_dreambooth.bases.sana import INSTRUCTION, SANA, Sana
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.targets import find_projections
from svfit_dreambooth.painting.samplers import samplers_of


@pytest.fixture(scope="module")
def family():
    return Sana(tiny_sana())


def test_the_real_size_holds_so_many_values():
    with torch.device("meta"):
        transformer = SanaTransformer2DModel()  # the published one of 1.6 billion has the class's defaults
    found = find_projections(transformer, None, SANA)
    assert sum(min(layer.weight.shape) for _, _, layer in found.values()) == 20 * 2 * 4 * 2240
    with pytest.raises(SVFitError, match="'feed-forward' matches no linear layer"):
        find_projections(transformer, ["feed-forward"], SANA)


def test_prompts_are_read_as_the_pipeline_reads_them(family):
    """The instruction leads a prompt, and no negative one."""
    arguments = family.painting_arguments({"prompt": " A sks Dog", "negative_prompt": "Blurry"}, 4.0)
    with torch.no_grad():
        expected = family.pipeline.encode_prompt(
            " A sks Dog", negative_prompt="Blurry", complex_human_instruction=INSTRUCTION.split("\n")
        )
    for own, theirs in zip(
        ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(arguments[own], theirs)


def test_photos_come_back_as_the_pipeline_would_decode_them(family):
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, spread = family.encode_images(images)
    with torch.no_grad():
        torch.testing.assert_close(mean / 0.41407, family.pipeline.vae.encode(images).latent)
    assert mean.shape == (1, 4, 16, 16) and not spread.any()


def test_its_sampler_is_its_own(family):
    assert samplers_of(family.pipeline) == []
    assert family.shift(torch.Size([4, 16, 16])) == 3.0
