"""The library of adapter files: names, pictures, deletion with a way back."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svfit_dreambooth import read_adapter, save_adapter
from svfit_dreambooth.adapter import describe as adapter
from svfit_dreambooth.adapter.describe import annotate_adapter
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms import library


def test_library_renames_deletes_and_brings_back(tmp_path, dog_adapter):
    folder = tmp_path / "adapters"
    assert library.add(folder, dog_adapter) == "dog"
    assert library.add(folder, dog_adapter) == "dog-2"
    Image.new("RGB", (4, 4)).save(folder / "dog.png")
    assert library.rename(folder, "dog", "Bello!") == "Bello"
    assert (folder / "Bello.png").is_file() and sorted(library.names(folder)) == ["Bello", "dog-2"]
    with pytest.raises(SVFitError, match="an adapter called 'bello' already"):
        library.rename(folder, "dog-2", "bello")
    content = (folder / "Bello.safetensors").read_bytes()
    token = library.delete(folder, "Bello")
    assert library.names(folder) == ["dog-2"]
    assert library.restore(folder, token) == "Bello"
    assert (folder / "Bello.safetensors").read_bytes() == content and (folder / "Bello.png").is_file()
    with pytest.raises(SVFitError, match="gone for good"):
        library.restore(folder, token)


def test_the_picture_in_a_file_stands_for_it(tmp_path, dog_adapter):
    folder, red = tmp_path / "adapters", Image.new("RGB", (8, 8), "red")
    source = Path(shutil.copy(dog_adapter, tmp_path / "rex.safetensors"))
    annotate_adapter(source, thumbnail=red)
    library.add(folder, source)
    shown = Image.open(library.entry(folder, "rex").picture)
    assert np.abs(np.asarray(shown, int) - np.asarray(red, int)).max() <= 3  # it went through JPEG
    blue = tmp_path / "blue.png"
    Image.new("RGB", (8, 8), "blue").save(blue)
    library.set_picture(folder, "rex", blue)
    library.replace(folder, "rex", source)
    assert Image.open(folder / "rex.png").getpixel((0, 0)) == (0, 0, 255)  # a person chose it
    adapter = read_adapter(source)
    for text in ("data:image/png;base64,iVBORw0KGgo=", "data:text/html;base64,PGI+", "https://example.org/a.png"):
        adapter.metadata["modelspec.thumbnail"] = text
        name = library.add(folder, save_adapter(adapter, tmp_path / "other.safetensors"))
        assert library.entry(folder, name).picture is None


@pytest.mark.parametrize("name", ["../dog", "/etc/passwd", "dog.safetensors", "", ".deleted"])
def test_library_names_are_looked_up(tmp_path, dog_adapter, name):
    library.add(tmp_path / "adapters", dog_adapter)
    with pytest.raises(SVFitError, match="no adapter called"):
        library.find(tmp_path / "adapters", name)


def test_library_refuses_what_is_no_adapter(tmp_path, dog_adapter):
    folder = tmp_path / "adapters"
    pickle = tmp_path / "dog.safetensors"
    pickle.write_bytes(b"\x80\x04\x95" + bytes(100))
    with pytest.raises(SVFitError, match="^'dog.safetensors' is a pickle") as refusal:
        library.add(folder, pickle)
    assert str(tmp_path) not in str(refusal.value)
    assert library.names(folder) == []
    library.add(folder, dog_adapter)
    (folder / "broken.safetensors").write_bytes(b"no")
    found, ((name, sentence),) = library.entries(folder)
    assert [entry.name for entry in found] == ["dog"] and found[0].instance_prompt == "a photo of sks dog"
    assert name == "broken" and "broken.safetensors" in sentence and str(tmp_path) not in sentence


def test_one_strange_file_hides_no_other_and_can_go(tmp_path, dog_adapter, monkeypatch):
    folder, describe = tmp_path / "adapters", adapter.describe_adapter
    for name in ("dog", "strange"):
        library.add(folder, dog_adapter, name=name)

    def describe_adapter(read, path):
        if Path(path).stem == "strange":
            raise IndexError("list index out of range")
        return describe(read, path)

    monkeypatch.setattr(adapter, "describe_adapter", describe_adapter)
    found, ((name, sentence),) = library.entries(folder)
    assert [entry.name for entry in found] == ["dog"]
    assert name == "strange" and sentence.startswith("strange.safetensors cannot be read as an adapter (IndexError")
    (folder / "strange.safetensors").write_bytes(b"no adapter at all")
    token = library.delete(folder, name)
    assert library.entries(folder)[1] == []
    assert library.restore(folder, token) == "strange"
    assert (folder / "strange.safetensors").read_bytes() == b"no adapter at all"
