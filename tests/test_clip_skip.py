"""Prompts read some layers before CLIP's end: as diffusers defines it, and as the adapter was trained."""

import logging

import pytest
import torch
from conftest import tiny_pipeline, tiny_sdxl_pipeline
from PIL import Image
from test_loading import make_adapter
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from svfit_dreambooth import load_adapter, read_adapter, save_adapter, unload_adapter
from svfit_dreambooth.bases.families import family_of
from svfit_dreambooth.bases.flow import FlowTransformer
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.painting.jobs import Job, Shelf, paint_jobs
from svfit_dreambooth.painting.loading import set_adapters
from svfit_dreambooth.painting.picture import save_picture
from svfit_dreambooth.painting.prompts import prompt_arguments
from svfit_dreambooth.sharing.combine import combine_adapters
from svfit_dreambooth.sharing.lora_metadata import lora_metadata
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.run import train

PROMPT = "a photo of sks dog"


def skipping(pipeline, clip_skip, **options):
    adapter = make_adapter(pipeline, rank=2, **options)
    adapter.training = {"clip_skip": clip_skip}
    return adapter


def deep_sdxl():
    """SDXL whose encoders have a layer to leave out."""
    pipeline = tiny_sdxl_pipeline()
    torch.manual_seed(1)
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        config = getattr(pipeline, name).config
        config.num_hidden_layers = 4
        setattr(pipeline, name, kind(config).eval())
    return pipeline


@torch.no_grad()
def test_the_last_norm_follows_the_last_layer_that_is_read():
    pipeline = tiny_pipeline()
    family, encoder = family_of(pipeline), pipeline.text_encoder
    tokens = family.tokenize([PROMPT])
    whole = encoder(tokens["text_encoder"], output_hidden_states=True)
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    expected = norm(whole.hidden_states[-2])
    family.read_earlier(1)
    assert family_of(pipeline).clip_skip == 1
    assert torch.equal(family.encode_tokens(tokens, family.text_encoders)["prompt_embeds"], expected)
    own, negative = pipeline.encode_prompt(PROMPT, "cpu", 1, True, PROMPT)
    assert torch.equal(own, expected) and torch.equal(negative, expected)
    weighed = prompt_arguments(pipeline, PROMPT, prompt_weights=True)["prompt_embeds"]
    torch.testing.assert_close(weighed, expected)
    family.read_earlier(0)
    assert torch.equal(family.encode_tokens(tokens, family.text_encoders)["prompt_embeds"], whole[0])


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_sdxl_is_read_as_its_pipeline_does(count):
    pipeline = deep_sdxl()
    family = family_of(pipeline)
    expected, _, pooled, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False, clip_skip=count)
    plain, *_ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    assert not torch.allclose(expected, plain)
    family.read_earlier(count)
    read = family.encode_tokens(family.tokenize([PROMPT]), family.text_encoders)
    assert torch.equal(read["prompt_embeds"], expected) and torch.equal(read["pooled_prompt_embeds"], pooled)
    assert torch.equal(pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)[0], expected)


def test_layers_that_are_not_read_are_not_trained():
    family = family_of(deep_sdxl())
    read = {
        count: {name: _layers(family, name) for name in family.text_encoders}
        for count in (0, 1, 2)
        if family.read_earlier(count) is None
    }
    assert read[0] == {"text_encoder": {0, 1, 2}, "text_encoder_2": {0, 1, 2, 3}}
    assert read[1] == {"text_encoder": {0, 1}, "text_encoder_2": {0, 1, 2, 3}}
    assert read[2] == {"text_encoder": {0}, "text_encoder_2": {0, 1, 2, 3}}


def _layers(family, component):
    return {int(name.partition("layers.")[2].partition(".")[0]) for name in family.find_projections(component)}


def test_more_layers_than_there_are_and_other_encoders():
    with pytest.raises(SVFitError, match="clip_skip is 2: of the layers of this base's text_encoder, 0 to 1 can be"):
        family_of(tiny_pipeline()).read_earlier(2)
    with pytest.raises(SVFitError, match="clip_skip 1 is for Stable Diffusion"):
        FlowTransformer.read_earlier(None, 1)


def test_a_run_says_so_in_its_file_and_pictures_follow(tiny_base, photo_folder, tmp_path, caplog):
    config = TrainConfig(
        pretrained_model_name_or_path=str(tiny_base), instance_data_dir=str(photo_folder), instance_prompt=PROMPT,
        output_dir=str(tmp_path), resolution=16, max_train_steps=2, validation_steps=0, final_pictures=False,
        train_text_encoder=True, clip_skip=1,
    )  # fmt: skip
    result = train(config)
    adapter = read_adapter(result.adapter_path)
    assert adapter.clip_skip == adapter.training["clip_skip"] == 1
    text = [name for name in adapter.shifts if name.startswith("text_encoder")]
    assert text and all(".layers.0." in name for name in text) and all(adapter.shifts[name].any() for name in text)

    pipeline = tiny_pipeline()
    model = BaseModel("tiny", pipeline)
    load_adapter(pipeline, result.adapter_path, name="dog")
    assert model.family.clip_skip == 1
    (picture,) = generate(model, [PROMPT], num_inference_steps=1)
    assert picture.settings["clip_skip"] == 1
    assert "Clip skip: 2, " in _parameters(picture, tmp_path)
    (other,) = generate(model, [PROMPT], num_inference_steps=1, clip_skip=0)
    assert "dog was trained with clip_skip 1, and is painted with 0." in caplog.text
    assert other.settings["clip_skip"] == 0 and "Clip skip" not in _parameters(other, tmp_path)
    assert other.image != picture.image and model.family.clip_skip == 1
    unload_adapter(pipeline)
    assert model.family.clip_skip == 0


def _parameters(picture, folder):
    with Image.open(save_picture(picture, folder / "picture.png")) as saved:
        return saved.text["parameters"]


def test_adapters_that_differ_are_read_as_the_first_and_named(caplog):
    pipeline = tiny_pipeline()
    load_adapter(pipeline, skipping(pipeline, 1), name="dog")
    assert not caplog.records
    load_adapter(pipeline, skipping(pipeline, 0, seed=1), name="mug")
    assert "dog was trained with clip_skip 1 and mug with 0: prompts are read as for dog." in caplog.text
    assert family_of(pipeline).clip_skip == 1
    set_adapters(pipeline, {"mug": 1.0})
    assert family_of(pipeline).clip_skip == 0
    set_adapters(pipeline, {})
    assert family_of(pipeline).clip_skip == 0


def test_jobs_of_one_batch_are_read_alike(tmp_path):
    pipeline = tiny_pipeline()
    model = BaseModel("tiny", pipeline)
    files = {
        count: str(save_adapter(skipping(pipeline, count, seed=count), tmp_path / f"{count}.safetensors"))
        for count in (0, 1)
    }
    jobs = [
        Job(PROMPT, ((files[1], 1.0),)),
        Job(PROMPT),
        Job(PROMPT, ((files[0], 1.0),)),
        Job(PROMPT, ((files[1], 1.0),)),
    ]
    painted = {}
    paint_jobs(
        Shelf(model),
        jobs,
        num_inference_steps=1,
        on_picture=lambda job, picture: painted.update({job.adapters: picture}),
    )
    assert {adapters: picture.settings.get("clip_skip", 0) for adapters, picture in painted.items()} == {
        jobs[0].adapters: 1, (): 0, jobs[2].adapters: 0,
    }  # fmt: skip
    unload_adapter(pipeline)
    load_adapter(pipeline, files[1])
    (alone,) = generate(model, [PROMPT], num_inference_steps=1)
    difference = torch.tensor(list(alone.image.tobytes())).int() - torch.tensor(
        list(painted[jobs[0].adapters].image.tobytes())
    )
    assert difference.abs().max() <= 1


def test_what_is_made_of_it_remembers(caplog):
    pipeline = tiny_pipeline()
    dog, mug = skipping(pipeline, 1), skipping(pipeline, 0, seed=1)
    dog.title, mug.title = "dog", "mug"
    assert combine_adapters([(dog, 0.5)]).clip_skip == 1
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert combine_adapters([(dog, 1.0), (mug, 1.0)]).clip_skip == 1
    assert "different clip_skip (dog with 1, mug with 0): the result remembers the first one's" in caplog.text
    base = BaseModel("tiny", pipeline)
    described = {"title": "dog", "scale": 1.0, "ranks": {"unet.a": 1}, "alpha": 1.0, "error": 0.0, "base": base}
    assert lora_metadata(dog, **described)["ss_clip_skip"] == "2"
    assert "ss_clip_skip" not in lora_metadata(mug, **described)


@pytest.mark.parametrize("nonsense", [-1, "1", True, 1.5, None])
def test_nonsense_in_a_header_is_no_clip_skip(nonsense):
    assert skipping(tiny_pipeline(), nonsense).clip_skip == 0
