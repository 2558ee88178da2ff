"""PixArt-Sigma: which layers, which conventions."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel
from flow_bases import tiny_pixart

from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.bases.pixart_sigma import PIXART, PixArtSigma
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.targets import find_projections
from svfit_dreambooth.painting.generate import generate


@pytest.fixture
def family():
    return PixArtSigma(tiny_pixart())


def test_the_real_size_holds_so_many_values():
    with torch.device("meta"):
        transformer = PixArtTransformer2DModel(
            caption_channels=4096, use_additional_conditions=False
        )  # the published one has the class's defaults else
    found = find_projections(transformer, None, PIXART)
    assert sum(min(layer.weight.shape) for _, _, layer in found.values()) == 28 * 2 * 4 * 1152
    assert len(find_projections(transformer, ["feed-forward"], PIXART)) == 28 * 2


def test_prompts_are_read_as_the_pipeline_reads_them(family):
    arguments = family.painting_arguments({"prompt": " A sks Dog", "negative_prompt": "Blurry"}, 4.0)
    with torch.no_grad():
        expected = family.pipeline.encode_prompt(" A sks Dog", negative_prompt="Blurry")
    for own, theirs in zip(
        ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(arguments[own], theirs)


def test_a_step_of_the_sampler_takes_what_training_predicts(family):
    """The noise alone: the answer's other half is left out."""
    pipeline = family.pipeline
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    seen = []
    words = family.painting_arguments({"prompt": "a dog", "negative_prompt": None}, 1.0)
    pipeline(
        **words, height=16, width=16, num_inference_steps=3, generator=torch.manual_seed(0),
        callback=lambda step, timestep, latents: seen.append((timestep, latents)),
    )  # fmt: skip
    timestep = seen[1][0]
    with torch.no_grad():
        conditions = family.encode_tokens(family.tokenize(["a dog"]), family.text_encoders)
        answer = family.predict(family.denoiser, seen[0][1], timestep[None], conditions, torch.zeros(1, 6))
    expected = pipeline.scheduler.step(answer, timestep, seen[0][1]).prev_sample
    torch.testing.assert_close(seen[1][1], expected, rtol=1e-4, atol=1e-5)


def test_its_noise_is_that_of_its_schedule(family):
    noising = family.noising()
    latents, noise, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    assert noising.prediction_type == family.prediction_type == "epsilon"
    assert torch.equal(noising.target(latents, noise, timesteps), noise)
    kept = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), 0)[timesteps].view(2, 1, 1, 1)
    expected = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    torch.testing.assert_close(noising.noisy_latents(latents, noise, timesteps), expected)


def test_steps_are_told_and_painting_stops(family):
    """Its pipeline has the callback of old."""
    model, steps = BaseModel("tiny", family.pipeline), []
    size = {"height": 16, "width": 16, "num_inference_steps": 3}
    assert len(generate(model, ["a dog"], on_denoising_step=lambda *step: steps.append(step), **size)) == 1
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert generate(model, ["a dog"], on_denoising_step=lambda step, _: step == 2, **size) == []


def test_a_base_that_is_told_sizes_is_refused(family):
    family.check("plain")
    family.denoiser.use_additional_conditions = True
    with pytest.raises(SVFitError, match="alpha is told the sizes of pictures .*: give a PixArt-Sigma"):
        family.check("alpha")


def test_published_folders_call_their_network_by_an_older_name(family, tmp_path):
    family.pipeline.save_pretrained(tmp_path)
    for name, key in (("model_index.json", "transformer"), ("transformer/config.json", "_class_name")):
        content = json.loads((tmp_path / name).read_text())
        content[key] = ["diffusers", "Transformer2DModel"] if key == "transformer" else "Transformer2DModel"
        (tmp_path / name).write_text(json.dumps(content))
    for one_at_a_time in (False, True):
        model = open_base_model(str(tmp_path), one_at_a_time=one_at_a_time)
        model.open("transformer")
        assert isinstance(model.family, PixArtSigma) and isinstance(
            model.pipeline.transformer, PixArtTransformer2DModel
        )
