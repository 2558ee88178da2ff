"""Names of adapters, strengths, and where files come from; repositories are tested with the hub."""

import pytest
from conftest import tiny_pipeline
from test_loading import make_adapter

from svfit_dreambooth import load_adapter, save_adapter, set_adapters
from svfit_dreambooth.adapter.source import distinct_names, split_strength
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.generate import generate, open_for_adapters
from svfit_dreambooth.painting.registry import loaded_adapters
from svfit_dreambooth.sharing.combine import combined_weights


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
def test_a_strength_is_a_finite_number(number):
    with pytest.raises(SVFitError, match="the strength of dog is -?(nan|inf): give a finite number"):
        split_strength(f"dog:{number}")
    with pytest.raises(SVFitError, match="give a finite number"):
        combined_weights([1.0, float(number)])
    with pytest.raises(SVFitError, match="give a finite number"):
        combined_weights([1.0, 1.0], "interpolate", float(number))


@pytest.fixture(scope="module")
def dog(tmp_path_factory):
    adapter = make_adapter(tiny_pipeline(), rank=2)
    return save_adapter(adapter, tmp_path_factory.mktemp("adapters") / "dog.safetensors")


def test_no_pipeline_takes_other_numbers(dog, tiny_base):
    model = open_for_adapters([(dog, 1.0)], str(tiny_base))
    with pytest.raises(SVFitError, match="the strength of again is nan"):
        load_adapter(model.pipeline, dog, float("nan"), "again")
    with pytest.raises(SVFitError, match="the strength of dog is inf"):
        set_adapters(model.pipeline, {"dog": float("inf")})
    with pytest.raises(SVFitError, match="guidance_scale is nan: give a finite number"):
        generate(model, ["a dog"], guidance_scale=float("nan"))


@pytest.mark.parametrize("stems", [["a-3", "a", "a"], ["a", "a-2", "a"], ["a", "a", "a-2", "a"], ["a"] * 5])
def test_a_name_is_found_for_every_adapter(stems):
    names = distinct_names(stems)
    assert len(set(names)) == len(names) == len(stems) and names[0] == stems[0]


def test_files_of_one_name_in_several_folders(dog, tiny_base, tmp_path):
    paths = [tmp_path / name for name in ("a-3.safetensors", "a.safetensors", "other/a.safetensors")]
    (tmp_path / "other").mkdir()
    for path in paths:
        path.write_bytes(dog.read_bytes())
    pipeline = open_for_adapters([(path, 1.0) for path in paths], str(tiny_base)).pipeline

    assert list(loaded_adapters(pipeline)) == ["a-3", "a", "a-2"]
