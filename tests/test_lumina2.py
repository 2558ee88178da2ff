"""Lumina-Image 2.0: which layers, which conventions."""

import pytest
import torch
from diffusers import Lumina2Transformer2DModel
from flow_bases import tiny_lumina2

from svfit_dreambooth.bases.lumina2 import LUMINA2, Lumina2
from svfit_dreambooth.method.targets import find_projections


@pytest.fixture(scope="module")
def family():
    return Lumina2(tiny_lumina2())


def test_the_real_size_holds_so_many_values():
    with torch.device("meta"):
        transformer = Lumina2Transformer2DModel(cap_feat_dim=2304)  # the published one has the class's defaults else
    found = find_projections(transformer, None, LUMINA2)
    # 26 blocks and 2 + 2 refiners; key and value serve three heads each
    assert sum(min(layer.weight.shape) for _, _, layer in found.values()) == 30 * (2 * 2304 + 2 * 768)
    assert len(find_projections(transformer, ["attention", "feed-forward"], LUMINA2)) == 30 * (4 + 3)


def test_prompts_are_read_as_the_pipeline_reads_them(family):
    """The system's words lead a prompt, and no negative one."""
    arguments = family.painting_arguments({"prompt": "a sks dog", "negative_prompt": "blurry"}, 4.0)
    with torch.no_grad():
        expected = family.pipeline.encode_prompt(["a sks dog"], negative_prompt=["blurry"])
    found = [
        arguments[name]
        for name in (
            "prompt_embeds",
            "prompt_attention_mask",
            "negative_prompt_embeds",
            "negative_prompt_attention_mask",
        )
    ]
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs)
    plain = family.painting_arguments({"prompt": "a sks dog", "negative_prompt": None}, 4.0)
    with torch.no_grad():
        _, _, empty, _ = family.pipeline.encode_prompt(["a sks dog"])
    torch.testing.assert_close(plain["negative_prompt_embeds"], empty)


def test_prompts_of_two_lengths_do_not_touch_one_another(family):
    with torch.no_grad():
        conditions = family.encode_tokens(family.tokenize(["a dog", "a dog " * 9]), family.text_encoders)
        latents, time_ids = torch.randn(1, 4, 4, 4), torch.zeros(1, 6)
        s = torch.tensor([0.3])
        both = family.predict(family.denoiser, latents.repeat(2, 1, 1, 1), s.repeat(2), conditions, time_ids)
        for place in (0, 1):
            own = {name: rows[place : place + 1] for name, rows in conditions.items()}
            alone = family.predict(family.denoiser, latents, s, own, time_ids)
            torch.testing.assert_close(both[place], alone[0], rtol=1e-4, atol=1e-5)


def test_a_full_mask_is_one_of_ones(family):
    conditions = {"prompt_embeds": torch.randn(2, 256, 16)}
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        found = family.predict(family.denoiser, *inputs, conditions, torch.zeros(2, 6))
        conditions["prompt_attention_mask"] = torch.ones(2, 256).long()
        torch.testing.assert_close(found, family.predict(family.denoiser, *inputs, conditions, torch.zeros(2, 6)))
