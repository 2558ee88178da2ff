"""Prompts of more than 77 tokens, and words that weigh more or less."""

import copy

import numpy as np
import pytest
import torch
from conftest import offload_sequentially, tiny_pipeline, tiny_sdxl_pipeline
from test_loading import make_adapter

from svfit_dreambooth import load_adapter, unload_adapter
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.prompts import prompt_arguments

LONG = "a photo of a dog, " * 20 + "in the snow"
STEPS = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}


def paint(pipeline, arguments):
    return pipeline(**arguments, **STEPS, generator=torch.Generator().manual_seed(0)).images[0]


@pytest.fixture(scope="module", params=[tiny_pipeline, tiny_sdxl_pipeline], ids=["sd", "sdxl"])
def pipeline(request):
    return request.param()


def test_a_short_prompt_goes_as_it_is(pipeline):
    for prompt in ("a dog (my friend) C++", "ball-- (a)1.3"):
        assert prompt_arguments(pipeline, prompt, "blur") == {"prompt": prompt, "negative_prompt": "blur"}


@pytest.mark.parametrize("negative", [None, "blur"])
def test_weights_of_1_change_nothing(pipeline, negative):
    plain = paint(pipeline, {"prompt": "a dog in snow", "negative_prompt": negative})
    weighed = prompt_arguments(pipeline, "a dog in snow", negative, prompt_weights=True)
    assert "prompt" not in weighed and np.abs(paint(pipeline, weighed) - plain).max() < 1e-4


def test_more_weight_changes_the_words_it_is_given_to(pipeline):
    plain, more, other = (
        prompt_arguments(pipeline, text, None, prompt_weights=True)["prompt_embeds"]
        for text in ("a dog in snow", "a (dog)1.3 in snow", "a (dog:1.3) in snow")
    )
    changed = (more - plain).abs().amax(-1)[0] > 1e-4
    assert changed[2] and not changed[0] and torch.equal(more, other)


def test_the_end_of_a_long_prompt_counts(pipeline):
    first, second = (prompt_arguments(pipeline, text, "blur") for text in (LONG, LONG + " by a mug"))
    length = pipeline.tokenizer.model_max_length
    assert first["prompt_embeds"].shape[1] % length == 0 and first["prompt_embeds"].shape[1] > length
    assert first["prompt_embeds"].shape == first["negative_prompt_embeds"].shape
    assert np.abs(paint(pipeline, first) - paint(pipeline, second)).max() > 1e-3


def test_signs_in_a_long_prompt_are_text(pipeline):
    first, second = (prompt_arguments(pipeline, LONG + end)["prompt_embeds"] for end in (" mug", " (mug)1.5"))
    assert first.shape != second.shape or not torch.equal(first, second)
    weighed = prompt_arguments(pipeline, LONG + " (mug)1.5", prompt_weights=True)["prompt_embeds"]
    assert not torch.equal(second, weighed)


def test_an_adapter_on_the_text_encoder_is_read_with(pipeline):
    plain = prompt_arguments(pipeline, LONG)["prompt_embeds"]
    adapter = make_adapter(pipeline, rank=4, scale=3.0)
    assert "text_encoder" in adapter.components
    name = load_adapter(pipeline, adapter)
    try:
        assert not torch.allclose(prompt_arguments(pipeline, LONG)["prompt_embeds"], plain)
    finally:
        unload_adapter(pipeline, name)


@pytest.mark.parametrize("prompt", ["a cat.swap(dog)", '("a", "b").blend(1, 0.5)', '("a", "b").and()', "(a)99"])
def test_what_is_no_weight_is_refused(pipeline, prompt):
    with pytest.raises(SVFitError, match="weights"):
        prompt_arguments(pipeline, prompt, None, prompt_weights=True)


def test_weights_for_other_text_encoders_are_refused(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "text_encoder_3", object(), raising=False)
    with pytest.raises(SVFitError, match="CLIP alone"):
        prompt_arguments(pipeline, "a dog++", None, prompt_weights=True)
    assert prompt_arguments(pipeline, LONG) == {"prompt": LONG, "negative_prompt": None}


def test_an_offloaded_text_encoder_reads_long_prompts_too():
    plain = tiny_pipeline()
    offloaded = copy.deepcopy(plain)
    for model in (offloaded.text_encoder, offloaded.unet):
        offload_sequentially(model)
    expected = prompt_arguments(plain, LONG)["prompt_embeds"]
    assert torch.equal(prompt_arguments(offloaded, LONG)["prompt_embeds"], expected)
    assert next(offloaded.text_encoder.parameters()).device.type == "meta"
