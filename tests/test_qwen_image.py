"""Qwen-Image: which layers, which conventions."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from flow_bases import tiny_qwen_image

from svfit_dreambooth.bases.qwen_image import QWEN_IMAGE, QwenImage
from svfit_dreambooth.method.targets import find_projections


@pytest.fixture(scope="module")
def family():
    return QwenImage(tiny_qwen_image())


def test_the_real_size_holds_so_many_values():
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel()  # the published one has the class's defaults
    found = find_projections(transformer, ["attention"], QWEN_IMAGE)
    assert sum(min(layer.weight.shape) for _, _, layer in found.values()) == 1_474_560
    assert len(find_projections(transformer, ["feed-forward"], QWEN_IMAGE)) == 60 * 4


def test_prompts_are_read_as_the_pipeline_reads_them(family):
    prompts = ["a photo of sks dog", "longer " * 10]
    with torch.no_grad():
        found = family.encode_tokens(family.tokenize(prompts), family.text_encoders)
        expected, masks = family.pipeline.encode_prompt(prompts)
    for rows, kept, own, mask in zip(
        found["prompt_embeds"], found["prompt_embeds_mask"].bool(), expected, masks.bool(), strict=True
    ):
        torch.testing.assert_close(rows[kept], own[mask], rtol=1e-4, atol=1e-5)


def test_photos_come_back_as_the_pipeline_would_decode_them(family):
    """The pipeline decodes latents * std + mean."""
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, _ = family.encode_images(images)
    config = family.pipeline.vae.config
    std, offset = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_std, config.latents_mean))
    with torch.no_grad():
        expected = family.pipeline.vae.encode(images[:, :, None]).latent_dist.mean[:, :, 0]
    torch.testing.assert_close(mean * std + offset, expected)
