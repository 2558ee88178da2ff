"""Pictures that a base painted itself: of what, and that they are painted once."""

import pytest
import torch

from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.names import TOYBOX
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.evaluation.protocol import PROMPTS, UNRELATED_PROMPTS
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.photos.crops import as_pixel_values
from svfit_dreambooth.training import base_pictures
from svfit_dreambooth.training.base_pictures import SEED, STEPS, base_latents, picture_files, plain_prompts
from toybox.world import SETTING_WORDING

CPU = torch.device("cpu")
WORDS = ["a photo of a dog", "a mug on the beach"]


@pytest.fixture
def base(tiny_base):
    return open_base_model(str(tiny_base), content_filter=False)


def painted(base, tmp_path, prompts=WORDS, dtype=torch.float32):
    return base_latents(base, prompts, 16, CPU, dtype, tmp_path)


@pytest.mark.parametrize("name", [TOYBOX, "somebody/model"])
def test_nothing_is_asked_by_which_harm_is_measured(name):
    """Neither the prompts of drift and preservation nor the places in which a subject is looked at."""
    prompts = plain_prompts(name)
    assert len(set(prompts)) == len(prompts) == 32
    places = [words for wording in SETTING_WORDING.values() for words in wording]
    places += [template.partition("{}")[2].strip() or template.partition("{}")[0].strip() for template in PROMPTS]
    for prompt in prompts:
        assert not any(place in prompt for place in places), prompt
        assert not any(unrelated.startswith(prompt) for unrelated in UNRELATED_PROMPTS), prompt


def test_they_are_what_the_base_paints(base, tmp_path):
    latents = painted(base, tmp_path)
    (picture,) = generate(base, WORDS[1:], seed=SEED + 1, num_inference_steps=STEPS, height=16, width=16)
    mean, _ = base.family.encode_images(as_pixel_values(picture.image)[None])
    assert torch.equal(latents[1], mean[0].half().float())


def test_painted_once_a_base_and_prompt(base, tiny_base, tmp_path, monkeypatch):
    first = painted(base, tmp_path)
    assert {path.exists() for path in picture_files(base, WORDS, 16, torch.float32, tmp_path)} == {True}
    asked = []
    paint = base_pictures.generate
    monkeypatch.setattr(
        base_pictures, "generate", lambda base, prompts, **o: asked.extend(prompts) or paint(base, prompts, **o)
    )
    half = open_base_model(str(tiny_base), content_filter=False)
    half.pipeline.unet.half().float()  # as a file in float16 would be
    assert torch.equal(painted(half, tmp_path), first) and asked == []
    assert torch.equal(painted(base, tmp_path, [*WORDS, "a cat"])[:2], first) and asked == ["a cat"]
    picture_files(base, WORDS, 16, torch.float32, tmp_path)[0].write_bytes(b"damaged")
    assert torch.equal(painted(base, tmp_path), first) and asked == ["a cat", WORDS[0]]
    path = picture_files(base, WORDS, 16, torch.float32, tmp_path)[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 64  # another number, in a file that can be read
    path.write_bytes(content)
    assert torch.equal(painted(base, tmp_path), first) and asked == ["a cat", *WORDS[:2]]


def test_another_base_paints_its_own(base, tiny_base, tmp_path):
    other = open_base_model(str(tiny_base), content_filter=False)
    with torch.no_grad():
        other.pipeline.vae.decoder.conv_out.weight.mul_(1.01)
    assert other.digest != base.digest
    before = BaseModel("moved", base.pipeline).digest
    assert before == base.digest  # whatever it is called
    assert not torch.equal(painted(other, tmp_path), painted(base, tmp_path))


def test_pictures_of_fewer_steps_are_others_and_kept_beside(base, tmp_path):
    usual = painted(base, tmp_path)
    fewer = base_latents(base, WORDS, 16, CPU, torch.float32, tmp_path, steps=2)
    assert not torch.equal(usual, fewer)
    assert torch.equal(painted(base, tmp_path), usual)
    paths = [picture_files(base, WORDS, 16, torch.float32, tmp_path, steps=steps) for steps in (None, STEPS, 2)]
    assert paths[0] == paths[1] and not {*paths[0]} & {*paths[2]}
    assert all(path.exists() for own in paths for path in own)
