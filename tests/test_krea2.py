"""Krea 2: which layers, which conventions."""

import pytest
import torch
from diffusers import Krea2Transformer2DModel
from flow_bases import tiny_krea2

from svfit_dreambooth.bases.krea2 import KREA2, Krea2
from svfit_dreambooth.bases.outline import outline_base_model
from svfit_dreambooth.method.targets import find_projections


@pytest.fixture(scope="module")
def family():
    return Krea2(tiny_krea2())


def test_the_real_size_holds_so_many_values():
    with torch.device("meta"):
        transformer = Krea2Transformer2DModel()  # the published one has the class's defaults
    found = find_projections(transformer, None, KREA2)
    # query, gate and way out are 6144 square, key and value serve four heads each; the prompt's blocks are 2560 wide
    assert sum(min(layer.weight.shape) for _, _, layer in found.values()) == 28 * (3 * 6144 + 2 * 1536) + 4 * 5 * 2560
    both = find_projections(transformer, ["attention", "feed-forward"], KREA2)
    assert len(both) == len(found) + 3 * (28 + 4)


def test_prompts_are_read_as_the_pipeline_reads_them(family):
    prompts = ["a photo of sks dog", "on the beach"]
    with torch.no_grad():
        found = family.encode_tokens(family.tokenize(prompts), family.text_encoders)
        embeds, mask = family.pipeline.encode_prompt(prompts)
    assert torch.equal(found["prompt_embeds_mask"], mask)
    torch.testing.assert_close(found["prompt_embeds"][mask], embeds[mask])


def test_the_distilled_one_names_its_sibling(family):
    turbo = Krea2(tiny_krea2(is_distilled=True))
    assert turbo.undistilled == "krea/Krea-2-Raw" and turbo.guidance_scale == 0.0
    assert family.undistilled is None and family.guidance_scale == 4.5
    assert turbo.shift_mu(64) == turbo.shift_mu(4096) == 1.15
    assert family.shift_mu(64) < family.shift_mu(4096)


def test_what_its_folder_says_of_it_is_known_without_its_weights(tmp_path):
    tiny_krea2(is_distilled=True).save_pretrained(tmp_path)
    outline = outline_base_model(str(tmp_path))
    assert outline.family.undistilled == "krea/Krea-2-Raw"
    assert outline.pipeline.text_encoder_select_layers == (0, 1, 2)
