"""export, import, combine, annotate and inspect, as typed."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image
from safetensors.torch import save_file
from test_loading import make_adapter

from svfit_dreambooth import read_adapter, save_adapter
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.commands.main import main
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.generate import open_named_base


@pytest.fixture(scope="module")
def path(tiny_base, tmp_path_factory):
    adapter = make_adapter(open_base_model(str(tiny_base)).pipeline, rank=4)
    adapter.instance_prompt = "a photo of sks dog"
    return save_adapter(adapter, tmp_path_factory.mktemp("adapters") / "dog.safetensors")


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # above it may stand the bars of loading models
    assert error.startswith("error: ")
    return error


def test_export_says_the_size_first_and_inspect_knows_the_file(capsys, path, tiny_base, tmp_path):
    base = ["--pretrained_model_name_or_path", tiny_base]
    lora = tmp_path / "lora.safetensors"
    lines = run(capsys, "export", f"{path}:0.5", "--format", "kohya", "--output", lora, "--rank", 2, *base).splitlines()
    assert "kB as a kohya LoRA in float16: 40 layers of rank 2" in lines[0]
    assert "it leaves out" in lines[1] and str(lora) in lines[2] and "compared with the adapter" in lines[2]
    text = run(capsys, "inspect", lora)
    assert "a LoRA in kohya layout: 40 layers of rank 2" in text and "trigger words: a photo of sks dog" in text
    assert "ss_network_dim: 2" in text and "hash: 0x" in text
    assert json.loads(run(capsys, "inspect", lora, "--json"))["alphas"] == [2.0]
    assert "is a LoRA, --plot draws adapters" in refused(capsys, "inspect", lora, "--plot", tmp_path / "x.png")
    lines = run(capsys, "export", path, "--format", "merged", "--output", tmp_path / "model", *base).splitlines()
    assert "as a model in float16" in lines[0] and (tmp_path / "model" / "model_index.json").is_file()


def test_export_asks_for_a_base_that_it_cannot_find(capsys, path, tmp_path):
    error = refused(capsys, "export", path, "--format", "kohya", "--output", tmp_path / "x.safetensors")
    assert "--pretrained_model_name_or_path" in error
    error = refused(capsys, "export", path, "--format", "merged", "--output", tmp_path / "x", "--rank", "3")
    assert "--rank and --error shorten a LoRA" in error


def test_combine(capsys, path, tmp_path):
    output = tmp_path / "sum.safetensors"
    assert "+0.75 x adapter0" in run(capsys, "combine", f"{path}:0.75", f"{path}:0.5", "--output", output)
    name, shift = next(iter(read_adapter(path).shifts.items()))
    assert torch.allclose(read_adapter(output).shifts[name], 1.25 * shift, rtol=1e-3)
    run(capsys, "combine", path, f"{path}:3", "--average", "--output", output, "--overwrite")
    assert torch.allclose(read_adapter(output).shifts[name], shift, rtol=1e-3)
    run(
        capsys,
        "combine",
        path,
        f"{path}:3",
        "--interpolate",
        "0.5",
        "--output",
        output,
        "--overwrite",
        "--dtype",
        "float32",
    )
    assert torch.allclose(read_adapter(output).shifts[name], 2 * shift, rtol=1e-6)
    assert "made of: adapter0" in run(capsys, "inspect", output)


def test_import(capsys, tiny_base, tmp_path):
    file, output = tmp_path / "spectral_shifts.safetensors", tmp_path / "dog.safetensors"
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{key}.delta": torch.full((16,), 0.1), "conv_norm_out.delta": torch.ones(1)}, file)
    base = ["--pretrained_model_name_or_path", tiny_base]
    assert "add --pretrained_model_name_or_path" in refused(capsys, "import", file, "--output", output)
    assert "1 of 2 tensors" in refused(capsys, "import", file, "--output", output, *base)
    text = run(capsys, "import", file, "--output", output, *base, "--partial", "--instance_prompt", "a photo of x dog")
    assert "1 layers taken over" in text and "not taken over: 1 GroupNorm" in text
    read = read_adapter(output)
    assert list(read.shifts) == [f"unet.{key}"] and read.instance_prompt == "a photo of x dog"
    assert len(list(tmp_path.iterdir())) == 2


def test_annotate_and_inspect(capsys, path, tiny_base, tmp_path):
    pytest.importorskip("matplotlib")
    copy = tmp_path / "dog.safetensors"
    copy.write_bytes(Path(path).read_bytes())
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "dog.png")
    run(capsys, "annotate", copy, "--author", "Zoë", "--thumbnail", tmp_path / "dog.png", "--license", "CC0-1.0")
    text = run(capsys, "inspect", copy)
    assert "author: Zoë" in text and "thumbnail: 30x30 pixels" in text and "licence: CC0-1.0" in text
    plot = tmp_path / "plot.png"
    text = run(capsys, "inspect", copy, "--plot", plot, "--pretrained_model_name_or_path", tiny_base)
    assert f"drawn: {plot}" in text and "not drawn" not in text
    height = Image.open(plot).height
    text = run(capsys, "inspect", copy, "--plot", plot, "--overwrite")  # its base cannot be found by its name
    assert "singular values are not drawn: " in text and Image.open(plot).height < height
    assert "--layer nowhere is not among" in refused(
        capsys, "inspect", copy, "--plot", plot, "--overwrite", "--layer", "nowhere"
    )


HOSTILE = "\x1b[2J\x9b31mdog\nerror: forged line\r\u202egnp"


def test_what_a_stranger_wrote_cannot_steer_the_terminal(capsys, tmp_path):
    adapter = make_adapter(tiny_pipeline(), rank=2)
    adapter.title = adapter.instance_prompt = HOSTILE
    adapter.training = {HOSTILE: HOSTILE}
    adapter.metadata = {"modelspec.author": HOSTILE, "modelspec.license": HOSTILE}
    path = save_adapter(adapter, tmp_path / "dog.safetensors")
    lora = tmp_path / "lora.safetensors"
    tensors = {"lora_unet_x.lora_down.weight": torch.ones(1, 2), "lora_unet_x.lora_up.weight": torch.ones(2, 1)}
    save_file(tensors, lora, metadata={"modelspec.title": HOSTILE, "ss_x": HOSTILE, "modelspec.author": HOSTILE})
    said = [
        run(capsys, "inspect", path),
        run(capsys, "inspect", lora),
        run(capsys, "push", path, "--dry_run"),
        run(capsys, "combine", path, "--output", tmp_path / "c.safetensors"),
    ]
    said += [text := run(capsys, "inspect", path, "--json"), run(capsys, "inspect", lora, "--json")]
    assert json.loads(text)["title"] == HOSTILE
    for text in said:
        assert not set(text) & set("\x1b\x9b\r\u202e")
        assert not any(line.startswith("error: forged") for line in text.splitlines())


@pytest.mark.parametrize("name", ["models/dog", "./dog", "/etc/dog", "../dog"])
def test_a_place_on_this_disk_that_a_file_names_is_not_opened(capsys, tiny_base, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "dog").symlink_to(tiny_base)
    adapter = make_adapter(tiny_pipeline(), rank=2)
    path = save_adapter(adapter, tmp_path / "dog.safetensors")
    monkeypatch.setattr("svfit_dreambooth.bases.opening.open_base_model", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr("svfit_dreambooth.painting.generate.open_base_model", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(SVFitError, match="name the base yourself with pretrained_model_name_or_path"):
        open_named_base(name, path)
