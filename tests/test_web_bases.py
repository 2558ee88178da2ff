"""Which base models may be opened, and by what name."""

import shutil
from pathlib import Path

import httpx
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from web_stand_ins import paint

from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms.bases import HUB_SECONDS, Bases
from svfit_dreambooth.web.rooms.orders import Order
from svfit_dreambooth.web.rooms.studio import Studio


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


def test_another_autoencoder_is_a_folder_a_part_of_a_model_or_on_the_hub(workspace, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copytree(tiny_base / "vae", workspace.models / "better")
    bases = Bases(workspace.models, (str(tiny_base),), download=False)
    assert bases.names()[1:] == [tiny_base.name]  # to paint with it is none
    place = bases.resolve_autoencoder("better")
    assert place == str(workspace.models / "better") and bases.shown(place, autoencoder=True) == "better"
    assert bases.resolve_autoencoder(tiny_base.name) == str(tiny_base)
    assert bases.is_here("better", autoencoder=True) and not bases.is_here("better")
    with pytest.raises(SVFitError, match="'better' is no base model that is offered here"):
        bases.resolve_for_run("better")
    with pytest.raises(SVFitError, match="owner/vae is not on this disk, and downloads are off"):
        bases.resolve_autoencoder("owner/vae")
    held = tmp_path / "hub" / "models--owner--vae"
    shutil.copytree(tiny_base / "vae", held / "snapshots" / "c0ffee")
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text("c0ffee")
    assert bases.resolve_autoencoder("owner/vae") == "owner/vae" and bases.is_here("owner/vae", autoencoder=True)


class Unreachable(Exception):
    """What the library by which the hub is asked raises: its kind changes from version to version."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RepositoryNotFoundError, "there is no model called owner/name on the hub"),
        (RevisionNotFoundError, "owner/name has no revision called 'v9'"),
        (
            httpx.ConnectTimeout("too late"),
            r"the hub cannot be reached \(ConnectTimeout\): see whether there is a network",
        ),
        (OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE forbids"),
    ],
)
def test_a_hub_id_is_looked_up_before_anything_is_opened(workspace, monkeypatch, error, sentence):
    asked = []

    def model_info(self, repository, revision, timeout):
        asked.append(timeout)
        if isinstance(error, type):
            raise error("no", response=httpx.Response(404, request=httpx.Request("GET", "https://hub.example")))
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(SVFitError, match=sentence):
        Bases(workspace.models).resolve_for_run("owner/name@v9")
    assert asked == [HUB_SECONDS] and asked[0] < 5


def test_the_open_base_stays_where_another_is_not_to_be_had(workspace, tiny_base, monkeypatch):
    studio = Studio(Bases(workspace.models, (str(tiny_base),)))
    size = {"num_inference_steps": 1, "width": 16, "height": 16}
    paint(studio, Order("a dog", tiny_base.name, **size))
    model = studio._model

    def model_info(self, repository, revision, timeout):
        raise Unreachable("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(SVFitError, match="the hub cannot be reached"):
        paint(studio, Order("a dog", "owner/name", **size))
    assert studio._model is model and len(paint(studio, Order("a dog", tiny_base.name, **size))[1]) == 1
