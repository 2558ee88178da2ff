"""Stable Diffusion 3.5: which layers, which conventions."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from flow_bases import tiny_sd3

from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.bases.outline import outline_base_model
from svfit_dreambooth.bases.stable_diffusion_3 import SD3, StableDiffusion3
from svfit_dreambooth.method.targets import find_projections

LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}


def test_the_real_size_holds_so_many_values():
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**LARGE)
    found = find_projections(transformer, ["attention"], SD3)
    assert sum(min(layer.weight.shape) for _, _, layer in found.values()) == 736_896


@pytest.mark.parametrize("with_t5", [True, False])
def test_prompts_are_read_as_the_pipeline_reads_them(with_t5):
    family = StableDiffusion3(tiny_sd3(with_t5=with_t5))
    prompts = ["a photo of sks dog", "on the beach"]
    with torch.no_grad():
        found = family.encode_tokens(family.tokenize(prompts), family.text_encoders)
        embeds, _, pooled, _ = family.pipeline.encode_prompt(prompts, None, None)
    torch.testing.assert_close(found["prompt_embeds"], embeds)
    torch.testing.assert_close(found["pooled_prompt_embeds"], pooled)


def test_a_folder_may_lack_its_t5(tmp_path):
    pipeline = tiny_sd3(with_t5=False)
    pipeline.save_pretrained(tmp_path)
    base, outline = open_base_model(str(tmp_path)), outline_base_model(str(tmp_path))
    for found in (base, outline):
        assert list(found.family.text_encoders) == ["text_encoder", "text_encoder_2"]
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(base.family.denoiser.state_dict()[name], tensor)
