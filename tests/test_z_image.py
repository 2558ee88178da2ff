"""Z-Image: which layers, which conventions."""

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from flow_bases import tiny_z_image

from svfit_dreambooth.bases.z_image import Z_IMAGE, ZImage
from svfit_dreambooth.method.targets import find_projections


@pytest.fixture(scope="module")
def family():
    return ZImage(tiny_z_image())


def test_the_real_size_holds_so_many_values():
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel()  # the published one has the class's defaults
    found = find_projections(transformer, ["attention"], Z_IMAGE)
    assert sum(min(layer.weight.shape) for _, _, layer in found.values()) == 522_240
    assert {name.partition(".")[0] for name in found} == {"layers", "noise_refiner", "context_refiner"}
    both = find_projections(transformer, ["attention", "feed-forward"], Z_IMAGE)
    assert len(both) == len(found) + 34 * 3


def test_prompts_are_read_as_the_pipeline_reads_them(family):
    prompts = ["a photo of sks dog", "longer " * 10]
    with torch.no_grad():
        found = family.encode_tokens(family.tokenize(prompts), family.text_encoders)
        expected, _ = family.pipeline.encode_prompt(list(prompts))
    for rows, mask, own in zip(found["prompt_embeds"], found["attention_mask"].bool(), expected, strict=True):
        torch.testing.assert_close(rows[mask], own)


def test_photos_come_back_as_the_pipeline_would_decode_them(family):
    """The pipeline decodes latents / scaling_factor + shift_factor."""
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, _ = family.encode_images(images)
    vae = family.pipeline.vae
    with torch.no_grad():
        torch.testing.assert_close(mean / 0.4 + 0.1, vae.encode(images).latent_dist.mean)


def test_prompts_of_two_lengths_do_not_touch_one_another(family):
    with torch.no_grad():
        conditions = family.encode_tokens(family.tokenize(["a dog", "a dog " * 9]), family.text_encoders)
        latents, time_ids = torch.randn(1, 4, 8, 8), torch.zeros(1, 6)
        s = torch.tensor([0.3])
        both = family.predict(family.denoiser, latents.repeat(2, 1, 1, 1), s.repeat(2), conditions, time_ids)
        for place in (0, 1):
            own = {name: rows[place : place + 1] for name, rows in conditions.items()}
            alone = family.predict(family.denoiser, latents, s, own, time_ids)
            torch.testing.assert_close(both[place], alone[0], rtol=1e-4, atol=1e-5)


def test_timesteps_are_moved_towards_the_noise_as_the_sampler_does(family):
    noising = family.noising()
    drawn = [noising.draw_timestep(torch.Generator().manual_seed(seed), torch.Size([4, 8, 8])) for seed in range(400)]
    even = family.noising("uniform")
    plain = [even.draw_timestep(torch.Generator().manual_seed(seed), torch.Size([4, 8, 8])) for seed in range(400)]
    assert drawn == pytest.approx([3 * s / (1 + 2 * s) for s in plain])
