"""Arithmetic of adapters: the file acts as the adapters it was made of."""

import json

import pytest
import torch
from conftest import tiny_pipeline
from test_loading import make_adapter, paint
from test_word import with_word

from svfit_dreambooth import load_adapter, read_adapter, save_adapter, unload_adapter
from svfit_dreambooth.bases.families import find_projections
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.sharing.combine import combine_adapters, combined_weights


@pytest.fixture
def pipeline():
    return tiny_pipeline()


def weights(pipeline):
    return {
        f"{component}.{name}": layer.weight
        for component in ("unet", "text_encoder")
        for name, (_, _, layer) in find_projections(getattr(pipeline, component), ["all-linear"]).items()
    }


@pytest.mark.parametrize(
    ("method", "position", "given", "factors"),
    [
        ("add", None, [0.7, 0.5], [0.7, 0.5]),
        ("add", None, [-0.5], [-0.5]),
        ("average", None, [1, 1, 2], [0.25, 0.25, 0.5]),
        ("interpolate", 0.25, [1, 2], [0.75, 0.5]),
    ],
)
def test_factors(method, position, given, factors):
    assert combined_weights(given, method, position) == pytest.approx(factors)


def test_the_sum_paints_as_both_adapters_loaded(pipeline, tmp_path):
    dog, mug = make_adapter(pipeline, 1, rank=3), make_adapter(pipeline, 2)
    dog.instance_prompt, mug.instance_prompt = "a photo of sks dog", "a photo of tok mug"
    path = save_adapter(combine_adapters([(dog, 0.7), (mug, -0.4)]), tmp_path / "both.safetensors", torch.float32)
    load_adapter(pipeline, dog, 0.7, "dog")
    load_adapter(pipeline, mug, -0.4, "mug")
    expected = paint(pipeline)
    unload_adapter(pipeline)
    base = paint(pipeline)
    load_adapter(pipeline, path)
    assert (paint(pipeline) - expected).abs().max() < 1e-5 < (expected - base).abs().max()
    read = read_adapter(path)
    assert read.instance_prompt == "a photo of sks dog; a photo of tok mug"
    assert [(part["title"], part["factor"]) for part in json.loads(read.metadata["combined_from"])] == [
        ("adapter1", 0.7),
        ("adapter2", -0.4),
    ]
    assert read.metadata["modelspec.merged_from"] == "adapter1, adapter2"


def test_ends_and_middle_of_an_interpolation(pipeline):
    a, b = make_adapter(pipeline, 1), make_adapter(pipeline, 2)
    name = next(iter(a.shifts))
    for position, expected in (
        (0.0, a.shifts[name]),
        (1.0, b.shifts[name]),
        (0.5, (a.shifts[name] + b.shifts[name]) / 2),
    ):
        assert torch.allclose(combine_adapters([(a, 1), (b, 1)], "interpolate", position).shifts[name], expected)
    mean = combine_adapters([(a, 1), (b, 1)], "average")
    assert torch.allclose(mean.shifts[name], (a.shifts[name] + b.shifts[name]) / 2)


def test_provenance_survives_a_second_round(pipeline, tmp_path):
    a, b = make_adapter(pipeline, 1), make_adapter(pipeline, 2)
    both = read_adapter(save_adapter(combine_adapters([(a, 1), (b, 1)]), tmp_path / "both.safetensors"))
    (part,) = json.loads(combine_adapters([(both, 0.5)]).metadata["combined_from"])
    assert part["title"] == "both" and len(part["payload_sha256"]) == 64
    assert [inner["title"] for inner in part["combined_from"]] == ["adapter1", "adapter2"]


def test_different_layers_need_the_base_and_get_its_fingerprint(pipeline):
    everything, part = make_adapter(pipeline, 1), make_adapter(pipeline, 2, components=("unet",))
    part.shifts = {name: shift for name, shift in part.shifts.items() if "attn2" in name}
    part.base_fingerprint = fingerprint({name: weights(pipeline)[name] for name in part.shifts})
    with pytest.raises(SVFitError, match="adapt different layers or words"):
        combine_adapters([(everything, 1), (part, 1)])
    result = combine_adapters([(part, 1), (everything, 1)], open_base=lambda: BaseModel("tiny", pipeline))
    assert result.base_fingerprint == everything.base_fingerprint
    assert set(result.shifts) == set(everything.shifts)
    load_adapter(pipeline, result)
    other = tiny_pipeline(seed=5)
    with pytest.raises(SVFitError, match="was trained on another base model, tiny"):
        combine_adapters([(part, 1), (everything, 1)], open_base=lambda: BaseModel("other", other))


def test_different_components_need_no_base(pipeline):
    unet, text = (make_adapter(pipeline, 1, components=(name,)) for name in ("unet", "text_encoder"))
    result = combine_adapters([(unet, 1), (text, 1)])
    load_adapter(pipeline, result)
    assert result.components == ["text_encoder", "unet"]


def test_refusals(pipeline):
    a, stranger = make_adapter(pipeline, 1), make_adapter(tiny_pipeline(seed=5), 2)
    with pytest.raises(SVFitError, match="was trained on another base"):
        combine_adapters([(a, 1), (stranger, 1)])
    with pytest.raises(SVFitError, match="add up to 0"):
        combine_adapters([(a, 1), (a, -1)], "average")
    with pytest.raises(SVFitError, match="needs two adapters and a position, not 3"):
        combine_adapters([(a, 1)] * 3, "interpolate", 0.5)
    with pytest.raises(SVFitError, match="nothing to combine"):
        combine_adapters([])


def test_a_bfloat16_copys_adapter_combines_with_the_originals(pipeline):
    rounded = tiny_pipeline().to(torch.bfloat16).to(torch.float32)
    a, b = make_adapter(pipeline, 1), make_adapter(rounded, 2)
    assert a.base_fingerprint["unet"]["sha256"] != b.base_fingerprint["unet"]["sha256"]
    assert combine_adapters([(a, 1), (b, 1)]).base_fingerprint == a.base_fingerprint


def test_learned_words_add_up(pipeline, tmp_path):
    dog, cat = with_word(pipeline, "sks", 1), with_word(pipeline, "mine", 2)
    result = combine_adapters([(dog, 0.7), (cat, 0.4)], open_base=lambda: BaseModel("tiny", pipeline))
    path = save_adapter(result, tmp_path / "both.safetensors", torch.float32)
    load_adapter(pipeline, dog, 0.7, "dog")
    load_adapter(pipeline, cat, 0.4, "cat")
    expected = paint(pipeline)
    unload_adapter(pipeline)
    load_adapter(pipeline, path)
    assert (paint(pipeline) - expected).abs().max() < 1e-5
    with pytest.raises(SVFitError, match="both learned the word 'sks', which can mean only one"):
        combine_adapters([(dog, 1), (with_word(pipeline, "sks", 3), 1)])
    other = with_word(pipeline, "sks", 3)
    (word,) = combine_adapters([(dog, 1), (other, 3)], "average").learned_words
    expected = (dog.learned_words[0].deltas["text_encoder"] + 3 * other.learned_words[0].deltas["text_encoder"]) / 4
    assert torch.allclose(word.deltas["text_encoder"], expected)
