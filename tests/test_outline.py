"""A base without its weights tells what the base itself tells."""

import json
import shutil

import pytest
import torch

from svfit_dreambooth import TrainConfig
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.bases.outline import outline_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.estimate import estimate_memory
from svfit_dreambooth.training.plan import prepare


@pytest.mark.parametrize("which", ["tiny_base", "tiny_base_xl", "tiny_base_v"])
def test_shapes_sizes_and_names_are_those_of_the_base(which, request):
    folder = request.getfixturevalue(which)
    outline, base = outline_base_model(str(folder)), open_base_model(str(folder))
    assert (outline.name, outline.architecture, outline.resolution) == (base.name, base.architecture, base.resolution)
    for name, module in base.family.components.items():
        theirs = {key: tensor.shape for key, tensor in module.state_dict().items()}
        ours = outline.family.components[name].state_dict()
        assert {key: tensor.shape for key, tensor in ours.items()} == theirs
        assert all(tensor.is_meta for tensor in ours.values() if tensor.is_floating_point())


def test_the_estimate_needs_no_weights(tiny_base, photo_folder, tmp_path, monkeypatch):
    options = {
        "pretrained_model_name_or_path": str(tiny_base),
        "instance_data_dir": str(photo_folder),
        "instance_prompt": "a photo of sks dog",
        "output_dir": str(tmp_path),
        "resolution": 16,
    }
    whole = prepare(TrainConfig(**options))
    monkeypatch.setattr("svfit_dreambooth.training.plan.open_base_model", None)  # never called
    plan = prepare(TrainConfig(**options), weightless=True)
    assert plan.shapes == whole.shapes and plan.report() == whole.report()
    assert estimate_memory(plan).total == estimate_memory(whole).total


def test_a_base_that_is_not_here_is_a_sentence():
    with pytest.raises(SVFitError, match="the configs of nobody/nothing cannot be read from this disk"):
        outline_base_model("nobody/nothing")
    assert torch.get_default_device().type == "cpu"


def test_a_folder_names_no_code_to_run(tiny_base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["subprocess", "Popen"]}))
    with pytest.raises(SVFitError, match="has no scheduler in its model_index.json"):
        outline_base_model(str(folder))
