"""How base models are called, and embedded ones whose weights are no longer here."""

from pathlib import Path

import pytest

from svfit_dreambooth.adapter.file import read_adapter, save_adapter
from svfit_dreambooth.bases import names
from svfit_dreambooth.bases.names import DEFAULT_BASE, TOYBOX, as_asked, spoken
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.bases.outline import outline_base_model
from svfit_dreambooth.commands.arguments import read_yaml
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.generate import open_for_adapters
from svfit_dreambooth.painting.loading import load_adapter
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.plan import prepare
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.tabs.cards import card

GONE = "was made with the toybox of old, in whose place this version holds " + DEFAULT_BASE


@pytest.fixture
def old_adapter(dog_adapter, tmp_path, monkeypatch):
    """A file from the time of an embedded base that is no longer here."""
    monkeypatch.setitem(names.FORMER, "toybox of old", "the toybox of old")
    adapter = read_adapter(dog_adapter)
    adapter.base_model = "toybox of old"
    return save_adapter(adapter, tmp_path / "old.safetensors")


def test_the_embedded_base_is_asked_for_by_its_word_and_called_by_its_name():
    assert as_asked(TOYBOX) == as_asked(DEFAULT_BASE) == DEFAULT_BASE
    assert outline_base_model(TOYBOX).name == outline_base_model(DEFAULT_BASE).name == DEFAULT_BASE
    assert as_asked("~/model") == str(Path.home() / "model") and as_asked("owner/toybox") == "owner/toybox"
    assert spoken(DEFAULT_BASE) == DEFAULT_BASE and DEFAULT_BASE not in names.FORMER


def test_adapters_of_a_base_that_is_gone_say_so(old_adapter, tiny_base_v, photo_folder, home, tmp_path):
    with pytest.raises(SVFitError, match=GONE):
        open_for_adapters([(old_adapter, 1.0)])
    for base in (TOYBOX, str(tiny_base_v)):  # built otherwise, and other weights
        with pytest.raises(SVFitError, match=GONE):
            load_adapter(open_base_model(base).pipeline, old_adapter)
    options = {
        "pretrained_model_name_or_path": str(tiny_base_v), "instance_data_dir": str(photo_folder),
        "instance_prompt": "a photo of sks dog", "resolution": 16, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    with pytest.raises(SVFitError, match=GONE):
        prepare(TrainConfig(**options, init_adapter=str(old_adapter)))
    with pytest.raises(SVFitError, match=GONE):  # whatever else does not fit
        prepare(TrainConfig(**options, init_adapter=str(old_adapter), target_modules=["feed-forward"]))


def test_the_page_says_so_too(old_adapter, tmp_path, home):
    entry = library.entry(old_adapter.parent, "old")
    assert "on the toybox of old" in card(entry, None)
    with pytest.raises(SVFitError, match=GONE), home.studio.bare(old_adapter):
        pass


def test_a_configuration_of_that_time_is_told_from_one_of_now(old_adapter, tmp_path, caplog):
    path = tmp_path / "config.yaml"
    path.write_text("pretrained_model_name_or_path: toybox of old\n")
    read_yaml(str(path))
    assert "if an earlier version wrote it, for the toybox of old, this run will be another one" in caplog.text
