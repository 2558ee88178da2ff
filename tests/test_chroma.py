"""Chroma: which layers, which conventions."""

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from flow_bases import tiny_chroma

from svfit_dreambooth.bases.chroma import Chroma
from svfit_dreambooth.bases.flux1 import FLUX1
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.targets import find_projections


@pytest.fixture
def family():
    return Chroma(tiny_chroma())


def test_the_real_size_holds_so_many_values():
    with torch.device("meta"):
        transformer = ChromaTransformer2DModel()  # the published one has the class's defaults
    found = find_projections(transformer, None, FLUX1)
    assert sum(min(layer.weight.shape) for _, _, layer in found.values()) == 817_152 + 38 * 3072  # FLUX.1's blocks


def test_prompts_are_read_as_the_pipeline_reads_them(family):
    prompts = ["a photo of sks dog", "on the beach"]
    with torch.no_grad():
        found = family.encode_tokens(family.tokenize(prompts), family.text_encoders)
        embeds, _, mask, *_ = family.pipeline.encode_prompt(prompts)
    torch.testing.assert_close(found["prompt_embeds"], embeds)
    assert torch.equal(found["prompt_attention_mask"], mask.bool())


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


def test_checkpointing_would_forget_the_mask(family):
    conditions = family.encode_tokens(family.tokenize(["a dog", "a dog " * 9]), family.text_encoders)
    family.denoiser.enable_gradient_checkpointing()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.3])
    with pytest.raises(SVFitError, match="gradient_checkpointing reads prompts of one length alone with Chroma"):
        family.predict(family.denoiser, *inputs, conditions, torch.zeros(2, 6))
    same = {name: rows[:1].repeat_interleave(2, 0) for name, rows in conditions.items()}
    checkpointed = family.predict(family.denoiser, *inputs, same, torch.zeros(2, 6))
    family.denoiser.disable_gradient_checkpointing()
    torch.testing.assert_close(checkpointed, family.predict(family.denoiser, *inputs, same, torch.zeros(2, 6)))
