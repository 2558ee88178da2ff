"""The comparison of methods: which runs it makes, and that every method starts at the base."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image

from svfit_dreambooth.bases.families import find_projections
from svfit_dreambooth.evaluation.features import Features
from svfit_dreambooth.method.targets import svfit_layers
from svfit_dreambooth.painting.sheets import CELL
from svfit_dreambooth.training.examples import encode_examples

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compare_methods
import evidence
import methods
import records
from records import Job, Record, neighbour, pack, read_records, sweep

RATES = (0.01, 0.02, 0.05, 0.1)


def record(rate, subject="cat", likeness=0.0, method="m", seed=100, right=None):
    scores = {"subject": likeness, "right": right, "prompt": 0.0, "drift": 0.0}
    return Record(method, subject, seed, rate, 10, 100, 0.1, {"5": {**scores, "subject": -9.0}, "20": scores})


def test_a_sweep_asks_for_what_is_missing_and_then_names_the_best_rate():
    done = [record(rate, likeness=-abs(rate - 0.05)) for rate in RATES]
    assert sweep("m", RATES, done[:2], ["cat"]) == ([Job("m", "cat", 100, rate) for rate in RATES[2:]], None)
    assert sweep("m", RATES, done, ["cat"]) == ([], 0.05)
    others = [record(0.05, method="other"), record(0.05, seed=0)]  # of no concern
    assert len(sweep("m", RATES, others, ["cat", "car"])[0]) == 8


@pytest.mark.parametrize(("better", "next_rate"), [(math.copysign, 0.2), (lambda rate, _: -rate, 0.005)])
def test_a_sweep_whose_best_rate_is_at_an_end_goes_on_there(better, next_rate):
    done = [record(rate, likeness=better(rate, 1)) for rate in RATES]
    assert sweep("m", RATES, done, ["cat"]) == ([Job("m", "cat", 100, next_rate)], None)
    best = 0.1 if next_rate == 0.2 else 0.01
    assert sweep("m", RATES, [*done, record(next_rate, likeness=-99.0)], ["cat"]) == ([], best)


def test_rates_are_chosen_by_the_last_reading_and_bad_numbers_lose():
    assert record(0.1, likeness=0.5, right=0.25).score() == pytest.approx(0.75)
    assert record(0.1, likeness=0.5).score() == pytest.approx(0.5)  # no judge: the cosine with the prompt, 0
    assert record(0.1, likeness=None).score() == -math.inf


def test_neighbours_follow_the_series_1_2_5():
    assert [neighbour(rate, True) for rate in (1e-3, 2e-3, 5e-3, 0.5, 5.0)] == [2e-3, 5e-3, 1e-2, 1.0, 10.0]
    assert [neighbour(rate, False) for rate in (1e-3, 2e-3, 5e-3, 10.0)] == [5e-4, 1e-3, 2e-3, 5.0]


def test_packed_records_count_once_beside_their_files(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    for rate in (0.01, 0.02):
        own = record(rate)
        (folder / own.job.file_name).write_text(json.dumps(vars(own)))
    assert pack(folder) == tmp_path / "runs.jsonl" and len(read_records(folder)) == 2
    (folder / record(0.01).job.file_name).unlink()
    assert {r.rate for r in read_records(folder)} == {0.01, 0.02}


@pytest.fixture
def run(tiny_run):
    return tiny_run(learning_rate=0.1)


def predict(unet, text):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return unet(sample, 500, text).sample


@pytest.mark.parametrize("name", [*methods.METHODS, *methods.ABLATIONS])
def test_every_method_starts_at_the_base_and_learns(run, name):
    examples = encode_examples(run, torch.device("cpu"))
    pipeline = run.base.pipeline
    before = predict(pipeline.unet, examples.conditions["prompt_embeds"])
    method = (methods.METHODS | methods.ABLATIONS)[name]
    config = dataclasses.replace(run.config, **method.options, class_prompt="a photo of a dog")
    run = dataclasses.replace(run, config=config)
    values, positions = method.put_in(run, examples)
    assert all(len(own) == len(values[key]) for key, own in positions.items())
    assert torch.allclose(predict(pipeline.unet, examples.conditions["prompt_embeds"]), before, atol=1e-5)
    trainable = [p for p in pipeline.unet.parameters() if p.requires_grad]
    inside = [value for key, value in values.items() if not key.startswith("text_encoder.")]
    assert {id(p) for p in trainable} <= {id(v) for v in inside}  # nothing else moves
    if name == "none":
        assert not values
        return
    target = torch.zeros_like(before)
    loss = (
        (pipeline.unet(torch.ones(1, 4, 8, 8), 500, examples.conditions["prompt_embeds"]).sample - target)
        .square()
        .mean()
    )
    loss.backward()
    assert any(value.grad is not None and value.grad.abs().sum() > 0 for value in inside)


def test_shares_top_bottom_and_random_take_equally_many(run):
    examples = encode_examples(run, torch.device("cpu"))
    sizes = [min(layer.weight.shape) for _, _, layer in find_projections(run.base.pipeline.unet).values()]
    for choose in ("top", "bottom", "random", "budget"):
        run.base.pipeline = tiny_pipeline()
        values, _ = methods.svfit(share=1 / 8, choose=choose)(run, examples)
        assert sum(value.numel() for value in values.values()) == sum(max(1, round(size / 8)) for size in sizes)


def test_relative_steps_move_values_in_proportion(run):
    examples = encode_examples(run, torch.device("cpu"))
    values, _ = methods.svfit(relative=True)(run, examples)
    layer = next(iter(svfit_layers(run.base.pipeline.unet).values()))
    value = next(iter(values.values()))
    with torch.no_grad():
        value += 1
    S = torch.linalg.svdvals(layer.weight.detach())
    assert torch.allclose(layer.shift, S / S.mean(), rtol=1e-3)


def pixels(images):
    return torch.tensor(np.stack([np.asarray(image.resize((4, 4))).reshape(-1) for image in images])).float() - 128


def test_it_runs_on_any_base_leaves_what_is_finished_and_tells_what_it_found(
    tiny_base, photo_folder, tmp_path, monkeypatch, capsys
):
    for name in ("dog1", "dog2", "dog6"):
        shutil.copytree(photo_folder, tmp_path / "subjects" / name)
    monkeypatch.setattr(records, "MOST_RATES", 1)
    monkeypatch.setitem(compare_methods.METHODS, "lora-4", methods.Method(methods.lora(4), (0.01,)))
    monkeypatch.setattr(compare_methods, "open_features", lambda *_: Features(pixels))
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--subjects", tmp_path / "subjects", "--steps", 1, 2]
    arguments += ["--methods", "none", "lora-4", "--seeds", 0, "--train_batch_size", 1, "--num_inference_steps", 1]
    results = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", [str(a) for a in ["compare", *arguments, "--results", results]])
    compare_methods.main()
    names = {path.name for path in results.glob("*.json")}
    tuned = {f"lora-4-{subject}-100-0.01.json" for subject in ("dog1", "dog2")}
    assert names == {*tuned, "none-dog6-0-0.json", "lora-4-dog6-0-0.01.json"}
    done = {r.job: r for r in records.read_records(results)}
    learnt = done[Job("lora-4", "dog6", 0, 0.01)]
    assert set(learnt.readings) == {"1", "2"} and learnt.readings["2"]["drift"] > 0 and learnt.values > 0
    assert learnt.readings["2"]["loss"] > 0 and done[Job("none", "dog6", 0, 0.0)].readings["2"]["drift"] == 0
    before = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    compare_methods.main()  # nothing is missing
    assert before == {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [str(a) for a in ["evidence", "--results", results, "--against", "none",
                        "--sheet", tmp_path / "s.png", "--subject", "dog6"]])  # fmt: skip
    evidence.main()
    text = capsys.readouterr().out
    assert "1 subjects, seeds 0, 1 runs" in text and "| lora-4 | 0.01 |" in text
    assert Image.open(tmp_path / "s.png").height > CELL  # two rows at half the size


def test_intervals_hold_the_mean_and_narrow_as_its_root():
    values = np.random.default_rng(0).normal(size=400).tolist()
    low, high = evidence.bootstrap_interval(values)
    error = np.std(values, ddof=1) / 20
    assert low < np.mean(values) < high and high - low == pytest.approx(2 * 1.96 * error, rel=0.05)  # of normal values
    assert evidence.bootstrap_interval([3.0] * 5) == evidence.bootstrap_interval([3.0]) == (3.0, 3.0)
    assert evidence.bootstrap_interval(values) == (low, high)  # repeats
