"""FLUX.1: which layers, which conventions."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from flow_bases import tiny_flux1

from svfit_dreambooth.bases.flux1 import FLUX1, Flux1
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.targets import find_projections


@pytest.fixture(scope="module")
def family():
    return Flux1(tiny_flux1())


def test_the_real_size_holds_so_many_values():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)  # the published one has the class's defaults else
    found = {
        name: min(layer.weight.shape) for name, (_, _, layer) in find_projections(transformer, None, FLUX1).items()
    }
    ways_out = {name for name in found if name.endswith("proj_out")}
    assert len(ways_out) == 38 and all(name.startswith("single_transformer_blocks.") for name in ways_out)
    assert sum(size for name, size in found.items() if name not in ways_out) == 817_152
    assert sum(found.values()) == 817_152 + 38 * 3072
    other = find_projections(transformer, ["feed-forward"], FLUX1)
    assert not set(other) & set(found) and len(other) == 19 * 4 + 38


def test_prompts_are_read_as_the_pipeline_reads_them(family):
    prompts = ["a photo of sks dog", "on the beach"]
    with torch.no_grad():
        found = family.encode_tokens(family.tokenize(prompts), family.text_encoders)
        embeds, pooled, _ = family.pipeline.encode_prompt(prompts)
    torch.testing.assert_close(found["prompt_embeds"], embeds)
    torch.testing.assert_close(found["pooled_prompt_embeds"], pooled)


def test_the_negative_prompt_is_refused_not_ignored(family):
    with pytest.raises(SVFitError, match="negative_prompt 'blurry' does not work with FLUX.1"):
        family.painting_arguments({"prompt": "a dog", "negative_prompt": "blurry"}, 3.5)


def test_schnell_names_its_sibling(family):
    schnell = Flux1(tiny_flux1(guidance_embeds=False))
    assert schnell.undistilled == "black-forest-labs/FLUX.1-dev" and schnell.architecture == "flux-1-schnell"
    assert family.undistilled is None and family.architecture == "flux-1-dev"
