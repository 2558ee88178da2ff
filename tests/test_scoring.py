"""`evaluate`, as a function on tiny bases and as typed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_loading import make_adapter
from test_word import with_word

from svfit_dreambooth import save_adapter
from svfit_dreambooth.bases.names import DEFAULT_BASE, SUBJECTS_FOLDER
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.commands.main import main
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.features import Features
from svfit_dreambooth.evaluation.scoring import Candidate, evaluate_adapters, table
from svfit_dreambooth.painting.generate import generate, open_for_adapters


@pytest.fixture(scope="module")
def path(tiny_base, tmp_path_factory):
    adapter = make_adapter(open_base_model(str(tiny_base)).pipeline, rank=4, scale=3.0)
    adapter.instance_prompt, adapter.class_prompt = "a photo of sks dog", "a photo of a dog"
    return save_adapter(adapter, tmp_path_factory.mktemp("adapters") / "dog.safetensors")


def pixels(images):
    return torch.tensor(np.stack([np.asarray(image.resize((8, 8))).reshape(-1) for image in images])).float() - 128


def test_base_and_adapters_get_a_row_each_on_every_subject(tiny_base, path, photo_folder, tmp_path):
    model = open_for_adapters([(path, 1.0)], str(tiny_base), device="cpu")
    options = {"num_inference_steps": 2, "height": 16, "width": 16}
    candidates = [Candidate(path, 1.0, photo_folder), Candidate(path, 0.0, photo_folder)]
    told = []
    rows = evaluate_adapters(
        model, candidates, Features(pixels), tmp_path / "out", templates=["a photo of {} on the beach"], num_images=2,
        seed=5, on_row=told.append, **options,
    )  # fmt: skip
    assert [row.adapter for row in rows] == ["base", "dog", "dog-2"] and told == rows
    base, full, nothing = (row.scores for row in rows)
    assert base.drift == pytest.approx(0.0, abs=1e-12) and full.drift > 1e-4
    assert nothing == base  # at strength 0 the adapter is the base
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert report["rows"][1]["scores"]["subject"] == full.subject and report["seed"] == 5
    assert report["means"]["adapters"]["drift"] == pytest.approx(full.drift / 2)
    assert Image.open(tmp_path / "out" / "sheet.png").width > 200
    pictures = sorted((tmp_path / "out" / "pictures" / "dog").glob("*.png"))
    assert len(pictures) == 2 + 2 + 6  # of the subject, of its class, of other things
    settings = json.loads(Image.open(pictures[1]).text["svfit"])
    assert settings["prompt"] == "a photo of sks dog on the beach" and settings["seed"] == 6
    again = generate(
        open_for_adapters([(path, 1.0)], str(tiny_base), device="cpu"), [settings["prompt"]], seed=6, **options
    )
    assert np.array_equal(np.asarray(again[0].image), np.asarray(Image.open(pictures[1])))
    assert any(line.startswith("mean of adapters") for line in table(rows)) and "dog-2:0" not in "\n".join(table(rows))
    with pytest.raises(SVFitError, match="earlier evaluation"):
        evaluate_adapters(model, candidates, Features(pixels), tmp_path / "out")


def run(capsys, *arguments):
    code = main(["evaluate", *(str(argument) for argument in arguments)])
    return code, capsys.readouterr()


def test_the_command_measures_a_bundled_subject_by_the_judge(capsys, tmp_path):
    adapter = make_adapter(open_base_model("toybox").pipeline, rank=2)
    adapter.instance_prompt, adapter.base_model = "a photo of sks dog", DEFAULT_BASE
    saved = save_adapter(adapter, tmp_path / "dog.safetensors")
    code, output = run(
        capsys, "--adapter", f"{saved}:0.5", "--instance_data_dir", SUBJECTS_FOLDER / "dog_patch",
        "--output_dir", tmp_path / "out", "--num_images", 1, "--num_inference_steps", 1,
    )  # fmt: skip
    assert code == 0, output.err
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert report["rows"][1]["strength"] == 0.5 and report["rows"][1]["scores"]["right"] is not None
    assert "dog_patch: dog:0.5" in output.out and "preservation" in output.out


def test_strengths_of_an_adapter_with_a_word_and_one_of_the_hub(capsys, monkeypatch, tiny_base, photo_folder, tmp_path):
    """Each file is loaded once: two that learned one word could not be."""
    pipeline = open_base_model(str(tiny_base)).pipeline
    learned = save_adapter(with_word(pipeline), tmp_path / "dog.safetensors")
    find = {"owner/name": learned}
    monkeypatch.setattr(
        "svfit_dreambooth.evaluation.scoring.find_adapter", lambda name: find.get(str(name), Path(name))
    )
    monkeypatch.setattr("svfit_dreambooth.evaluation.features.open_features", lambda *_: Features(pixels))
    (tmp_path / "prompts.txt").write_text("a photo of {} in snow", encoding="utf-8")
    code, output = run(
        capsys, "--adapter", f"{learned}:0.5", "--adapter", "owner/name:0", "--instance_data_dir", photo_folder,
        "--output_dir", tmp_path / "out", "--pretrained_model_name_or_path", tiny_base, "--subject_words", "sks dog",
        "--prompts", tmp_path / "prompts.txt", "--num_images", 1, "--num_inference_steps", 1,
    )  # fmt: skip
    assert code == 0, output.err
    base, half, nothing = json.loads((tmp_path / "out" / "scores.json").read_text())["rows"]
    assert [row["adapter"] for row in (base, half, nothing)] == ["base", "dog", "dog-2"]
    assert half["scores"]["subject"] != base["scores"]["subject"] == nothing["scores"]["subject"]


def test_scores_belong_to_their_adapter_whatever_it_adapts_and_is_called(tiny_base, photo_folder, tmp_path):
    """An adapter of the text encoder alone comes first here, and last among those that the pipeline carries."""
    pipeline = open_base_model(str(tiny_base)).pipeline
    paths = []
    for name, components, scale in (("a", ("text_encoder",), 0.0), ("a-2", ("unet",), 3.0), ("base", ("unet",), 0.0)):
        adapter = make_adapter(pipeline, components=components, scale=scale)
        adapter.instance_prompt = "a photo of sks dog"
        paths.append(save_adapter(adapter, tmp_path / f"{name}.safetensors"))
    model = open_for_adapters([(path, 1.0) for path in paths], str(tiny_base), device="cpu")
    order = [paths[0], paths[0], paths[1], paths[2]]
    rows = evaluate_adapters(
        model, [Candidate(path, 1.0, photo_folder) for path in order], Features(pixels), tmp_path / "out",
        templates=["a photo of {}"], num_images=1, num_inference_steps=1, height=16, width=16,
    )  # fmt: skip
    assert [row.adapter for row in rows] == ["base", "a", "a-3", "a-2", "base-2"]
    assert [row.scores.drift > 1e-4 for row in rows] == [False, False, False, True, False]


def test_without_a_network_that_sees_it_says_so_before_painting(capsys, tiny_base, path, photo_folder, tmp_path):
    code, output = run(
        capsys, "--adapter", path, "--instance_data_dir", photo_folder, "--output_dir", tmp_path / "out",
        "--pretrained_model_name_or_path", tiny_base,
    )  # fmt: skip
    assert code == 2 and "--dino_path" in output.err and not (tmp_path / "out").exists()


def test_two_adapters_and_three_folders_are_a_mistake(capsys, path, photo_folder, tmp_path):
    folders = [argument for _ in range(3) for argument in ("--instance_data_dir", photo_folder)]
    code, output = run(capsys, "--adapter", path, "--adapter", path, *folders, "--output_dir", tmp_path)
    assert code == 2 and "2 adapters and 3 folders" in output.err
