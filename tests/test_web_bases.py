"""Which base models may be opened, and by what name."""

import shutil
from pathlib import Path

import pytest

from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms.bases import Bases


@pytest.mark.parametrize("name", ["/etc", "../tiny-kl", "toybox/weights", ".", "", "a b"])
def test_no_path_from_a_browser_is_opened(workspace, name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])  # where toybox/weights is a model folder
    with pytest.raises(SVFitError, match="no base model that is offered here"):
        Bases(workspace.models).resolve(name, typed=True)


@pytest.mark.parametrize("place", ["folder.v1", "link", "link.safetensors", "model.v2.safetensors", "."])
def test_a_base_has_one_name_on_the_page_and_in_adapters(tmp_path, tiny_base, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, tmp_path / "folder.v1")
    (tmp_path / "link").symlink_to("folder.v1")
    (tmp_path / "model.v2.safetensors").touch()
    (tmp_path / "link.safetensors").symlink_to("model.v2.safetensors")
    if place == ".":
        monkeypatch.chdir(tmp_path / "folder.v1")
    recorded = {"link.safetensors": "model.v2", "model.v2.safetensors": "model.v2", ".": "folder.v1"}.get(place, place)
    if Path(place).is_dir():
        assert open_base_model(place).name == recorded
    offered = Bases(tmp_path / "none", (place,))
    assert offered.names()[1:] == [recorded] and offered.resolve(recorded, typed=False)[0] == place
    if place != ".":
        found = Path(Bases(tmp_path).resolve(recorded, typed=False)[0])
        assert found.samefile(place) and found.is_dir() == Path(place).is_dir()
