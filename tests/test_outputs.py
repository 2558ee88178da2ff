"""What a command writes replaces neither what it reads, nor what was there before, nor another kind of file."""

import os

import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image
from safetensors.torch import save_file
from test_loading import make_adapter

from svfit_dreambooth import save_adapter
from svfit_dreambooth.commands.main import main
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import check_output


@pytest.fixture
def dog(tmp_path):
    return save_adapter(make_adapter(tiny_pipeline(), rank=2), tmp_path / "dog.safetensors")


@pytest.fixture
def svdiff(tmp_path):
    save_file({"conv_in.delta": torch.ones(2)}, path := tmp_path / "spectral_shifts.safetensors")
    return path


def command(kind, dog, svdiff, output, base):
    """The command that writes to `output`, and its way to read each of its inputs."""
    named = ["--pretrained_model_name_or_path", str(base)]
    return [
        *{
            "kohya": ["export", dog, "--format", "kohya", "--output", output],
            "diffusers": ["export", f"{dog}:0.5", "--format", "diffusers", "--output", output],
            "combine": ["combine", f"{dog}:0.5", "--output", output],
            "import": ["import", svdiff, "--output", output],
            "plot": ["inspect", dog, "--plot", output],
        }[kind],
        *named,
    ]


KINDS = ["kohya", "diffusers", "combine", "import", "plot"]


def refuses(capsys, arguments, sentence):
    assert main([str(argument) for argument in arguments]) == 2
    assert sentence in (error := capsys.readouterr().err), error


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_stays(capsys, kind, dog, svdiff, tiny_base, tmp_path):
    output = tmp_path / ("notes.png" if kind == "plot" else "notes.safetensors")
    output.write_text("mine")
    arguments = command(kind, dog, svdiff, output, tiny_base)
    refuses(capsys, arguments, "exists already: choose another name, or add --overwrite to replace it")
    refuses(capsys, [*arguments, "--overwrite"], "so it is not replaced by one")
    assert output.read_text() == "mine"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_stays(capsys, kind, dog, svdiff, tiny_base, tmp_path):
    source = svdiff if kind == "import" else dog
    before = source.read_bytes()
    link = tmp_path / "link.safetensors"
    os.link(source, link)
    sentence = "give a name that ends in .png" if kind == "plot" else "which must not be replaced"
    for output in (source, link):
        refuses(capsys, [*command(kind, dog, svdiff, output, tiny_base), "--overwrite"], sentence)
    assert source.read_bytes() == before


@pytest.mark.parametrize("kind", ["kohya", "diffusers", "combine", "import"])
def test_the_base_stays(capsys, kind, dog, svdiff, tmp_path):
    base = tmp_path / "base.safetensors"
    save_file({"model.diffusion_model.x": torch.ones(2)}, base)
    before = base.read_bytes()
    refuses(capsys, [*command(kind, dog, svdiff, base, base), "--overwrite"], "which must not be replaced")
    assert base.read_bytes() == before


def test_a_picture_that_is_taken_apart_stays(capsys, dog, tiny_base, tmp_path):
    picture = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(picture)
    arguments = [*command("plot", dog, None, picture, tiny_base), "--picture", picture, "--overwrite"]
    refuses(capsys, arguments, "which must not be replaced")


@pytest.mark.parametrize("kind", ["combine", "plot"])
def test_overwrite_replaces_a_file_of_the_kind(kind, dog, tiny_base, tmp_path):
    output = tmp_path / ("plot.png" if kind == "plot" else "c.safetensors")
    arguments = [str(argument) for argument in command(kind, dog, None, output, tiny_base)]
    assert main(arguments) == 0
    first = output.stat().st_ino
    assert main(arguments) == 2 and output.stat().st_ino == first
    assert main([*arguments, "--overwrite"]) == 0 and output.stat().st_ino != first


def test_a_merged_model_wants_an_empty_place(capsys, dog, tiny_base):
    arguments = ["export", dog, "--format", "merged", "--output", tiny_base]
    refuses(capsys, [*arguments, "--pretrained_model_name_or_path", tiny_base], "exists already")


def test_folders_and_names_of_another_kind(tmp_path):
    for name in ("a.safetensors", "a.png"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        with pytest.raises(SVFitError, match="is a folder: name a file in it"):
            check_output(tmp_path / "folder" / name, os.path.splitext(name)[1])
    with pytest.raises(SVFitError, match="give a name that ends in .safetensors"):
        check_output(tmp_path / "new.png", ".safetensors")
    assert check_output(tmp_path / "new.PNG", ".png", [tmp_path / "old.png", None]) == tmp_path / "new.PNG"


@pytest.mark.parametrize("kind", ["kohya", "merged"])
def test_others_may_read_what_they_may_read_of_other_files(kind, dog, tiny_base, tmp_path):
    before = os.umask(0o022)
    try:
        output = tmp_path / "out"
        base = ["--pretrained_model_name_or_path", str(tiny_base)]
        assert main(["export", str(dog), "--format", kind, "--output", str(output), *base]) == 0
    finally:
        os.umask(before)
    files = [path for path in output.rglob("*") if path.is_file()]
    assert files and {path.stat().st_mode & 0o777 for path in files} == {0o644}
