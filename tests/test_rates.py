"""The benchmark of rates: a rescaled base is the same base, and runs are made once and compared fairly."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_pipeline

from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.training import optimizer
from svfit_dreambooth.training import sensitivity as room
from svfit_dreambooth.training.sensitivity import base_sensitivity

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import rates
from rates import AUTO, Outcome, add_outcome, options_of, read_outcomes, rule, scales_between
from rescaled_base import rescale_base


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weights_of(pipeline):
    return {
        f"{part}.{name}": value.clone()
        for part in ("unet", "text_encoder")
        for name, value in getattr(pipeline, part).named_parameters()
    }


def test_a_rescaled_base_paints_the_same_with_other_weights():
    plain, other = quiet(tiny_pipeline()), quiet(tiny_pipeline())
    rescale_base(other)
    before, after = weights_of(plain), weights_of(other)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = ("to_q.", "to_k.", "to_v.", "to_out.0.", "norm1.", "norm2.", "proj_in.", "ff.net.0.", "ff.net.2.")
    kinds += ("q_proj.", "k_proj.", "v_proj.", "out_proj.", "layer_norm1.")
    assert all(any(kind in name for name in changed) for kind in kinds)
    latents = torch.randn(1, plain.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 5, 7, 2]])
    answers = []
    with torch.no_grad():
        for pipeline in (plain, other):
            told = pipeline.text_encoder(ids)[0]
            answers.append(pipeline.unet(latents, 400, told).sample)
    assert (answers[0] - answers[1]).abs().max() < 1e-5 * answers[0].abs().max()


def test_the_sensitivity_sees_through_the_rescaling(tmp_path, monkeypatch):
    """A value that is a times as large, of a layer whose answers the next one divides by a, matters a^-2 times as much."""
    monkeypatch.setattr(room, "PICTURES", 1)
    monkeypatch.setattr(room, "PASSES", 4)
    monkeypatch.setattr(room, "STEPS", 1)
    plain, other = quiet(tiny_pipeline()), quiet(tiny_pipeline())
    rescale_base(other)
    products, factors = [], []
    for pipeline in (plain, other):
        base = BaseModel("tiny", pipeline)
        layers = base.family.adapted_layers(None, False)
        weights = base.weights(layers)
        S = {name: torch.linalg.svdvals(weight.double()) for name, weight in weights.items()}
        targets = {component: list(own) for component, own in layers.items()}
        found = base_sensitivity(base, targets, weights, device=torch.device("cpu"), resolution=16, cache_dir=tmp_path)
        products.append({name: own * S[name].square() for name, own in found.values.items()})
        factors.append({name: own[0] for name, own in S.items()})
    assert len({round(float(factors[1][name] / own), 3) for name, own in factors[0].items()}) > 3
    for name, own in products[0].items():
        assert torch.allclose(products[1][name], own, rtol=1e-2, atol=1e-3 * own.max())


def test_with_one_half_between_layers_it_does_not_matter_how_large_their_weights_are():
    generator = torch.Generator().manual_seed(0)
    F = {f"unet.{i}": 10.0 ** (-6 + i + torch.rand(5, generator=generator)) for i in range(4)}
    factors = {name: 2.0**i for i, name in enumerate(F)}
    rescaled = {name: own / factors[name] ** 2 for name, own in F.items()}

    def steps(own, scales):
        """How far each value moves at the auto rate, in units of its layer's weights."""
        rate = optimizer.auto_rate(own, scales, 1.0, 100)
        return {name: rate * scale for name, scale in scales.items()}

    before, after = (steps(own, scales_between(own, 0.5)) for own in (F, rescaled))
    for name, own in before.items():
        assert torch.allclose(after[name], own * factors[name], rtol=1e-4)


def test_constants_of_an_arm_hold_for_its_run_alone():
    usual = (optimizer.CHANGE, optimizer.POWER, optimizer.FLOOR, optimizer.step_scales)
    with rule(factor=2, power=0.5, floor=0.3, between=0.5):
        assert (2 * usual[0], 0.5, 0.3) == (optimizer.CHANGE, optimizer.POWER, optimizer.FLOOR)
        assert optimizer.step_scales is not usual[3]
    assert (optimizer.CHANGE, optimizer.POWER, optimizer.FLOOR, optimizer.step_scales) == usual
    assert options_of("factor=2 keep_base=true target_modules=[all]") == {
        "factor": 2, "keep_base": True, "target_modules": ["all"],
    }  # fmt: skip


def outcome(arm, subject="cat", likeness=0.5, drift=0.01):
    scores = {"subject": likeness, "right": 1.0, "prompt": 0.7, "drift": drift, "preservation": 0.2}
    return Outcome("d" * 64, "attention", arm, subject, 0, 100, 4, "toybox", 0.1, 9216, 20.0, scores)


def test_a_line_that_a_killed_process_left_is_made_again(tmp_path):
    path = tmp_path / "rates.jsonl"
    add_outcome(path, outcome(AUTO))
    add_outcome(path, outcome("factor=2"))
    path.write_text(path.read_text()[:-20])
    assert read_outcomes(path) == [outcome(AUTO)]
    add_outcome(path, outcome("factor=4"))
    assert read_outcomes(path) == [outcome(AUTO), outcome("factor=4")]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_the_table_says_where_auto_is_behind_over_shared_subjects_alone():
    runs = [outcome(AUTO, "cat"), outcome(AUTO, "dog"), outcome("factor=2", "cat", likeness=0.54)]
    runs += [outcome("factor=4", "cat", likeness=0.6, drift=0.3), outcome("factor=0.5", "cat", likeness=0.4)]
    text = "\n".join(rates.table(runs))
    assert "factor=1 beside factor=2, the best of these over 1 runs: behind by 0.040 of likeness." in text
    assert "| factor=2 | 0.1 | 1 | 0.540 | 1.000 | 0.010 | 0.200 | 0.040 | 0.000 |" in text
    near = [outcome(AUTO), outcome("factor=2", likeness=0.52)]
    assert "not behind by more than it may" in rates.table(near)[-1]
    steadier = [outcome(AUTO, drift=0.03), outcome("factor=0.5", drift=0.01)]
    assert "behind by 0.020 of drift" in rates.table(steadier)[-1]
    assert "is the best of these" in rates.table([outcome(AUTO), outcome("factor=2", likeness=0.4)])[-1]


@pytest.mark.slow
def test_a_run_is_made_once_and_leaves_the_base_as_it_was(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rates.jsonl"
    arguments = ["rates.py", "--results", str(path), "--layers", "attention", "--subjects", "cat_tiger", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--arms", "learning_rate=0.02"])
    rates.opened.cache_clear()
    before = weights_of(rates.opened("toybox").pipeline)
    rates.main()
    (first,) = read_outcomes(path)
    assert first.rate == 0.02 and first.values == 9216 and 0 <= first.scores["right"] <= 1
    monkeypatch.setattr(rates, "make", None)  # never called again
    rates.main()
    assert [asdict(run) for run in read_outcomes(path)] == [asdict(first)]
    after = weights_of(rates.opened("toybox").pipeline)
    assert all(torch.equal(after[name], own) for name, own in before.items())


def test_a_run_that_a_signal_stopped_is_no_result(tmp_path, monkeypatch):
    pipeline = quiet(tiny_pipeline())
    monkeypatch.setattr(rates, "opened", lambda place: BaseModel("tiny", pipeline))
    monkeypatch.setattr(rates, "train", lambda config, base: SimpleNamespace(stopped=True))
    run = rates.Run("0" * 64, "attention", "factor=2", "dog_patch", 0, 10, 1)
    with pytest.raises(SystemExit, match="stopped in the run of dog_patch by factor=2: call again"):
        rates.make(run, str(tmp_path), None, {})
