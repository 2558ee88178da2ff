"""A budget of singular values: who gets them, the sparse shifts that result, and a run that spends one."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_adapter_checks import refuses, write_with

from svfit_dreambooth import TrainConfig, load_adapter, read_adapter, save_adapter, train
from svfit_dreambooth.adapter.describe import describe_adapter
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.families import apply_svfit, find_projections
from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import model_basis
from svfit_dreambooth.method.targets import svfit_layers
from svfit_dreambooth.training.budget import allocate, choose_positions, score_values, spread
from svfit_dreambooth.training.examples import encode_examples
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.plan import prepare

SCORES = {
    "unet.a": torch.tensor([5.0, 1.0, 4.0]),
    "unet.b": torch.tensor([0.1, 0.2]),
    "unet.c": torch.tensor([3.0, 9.0, 3.0, 0.0]),
}


def lists(positions):
    return {name: places.tolist() for name, places in positions.items()}


def test_the_highest_scores_share_the_budget():
    assert lists(allocate(SCORES, 1)) == {"unet.c": [1]}
    assert lists(allocate(SCORES, 3)) == {"unet.a": [0, 2], "unet.c": [1]}
    assert lists(allocate(SCORES, 4)) == {"unet.a": [0, 2], "unet.c": [0, 1]}  # the first of equals
    everything = {"unet.a": [0, 1, 2], "unet.b": [0, 1], "unet.c": [0, 1, 2, 3]}
    assert lists(allocate(SCORES, 9)) == lists(allocate(SCORES, 10**9)) == everything


def test_no_other_choice_promises_more():
    torch.manual_seed(0)
    scores = {f"unet.{i}": torch.rand(int(torch.randint(1, 9, ()))) for i in range(12)}
    for budget in (1, 7, 20):
        chosen = allocate(scores, budget)
        total = sum(scores[name][places].sum() for name, places in chosen.items())
        assert sum(len(places) for places in chosen.values()) == budget
        assert torch.allclose(total, torch.cat(list(scores.values())).sort(descending=True).values[:budget].sum())


def test_every_component_gets_its_best_value():
    scores = {**SCORES, "text_encoder.q": torch.tensor([1e-9, 3e-9])}
    assert lists(allocate(scores, 2)) == {"unet.c": [1], "text_encoder.q": [1]}
    with pytest.raises(SVFitError, match="budget of 1 singular values is too small: give 2 or more"):
        allocate(scores, 1)


def test_spread_is_the_inverse_of_choosing():
    positions = {"a": torch.tensor([1, 4]), "b": torch.tensor([0])}
    wide = spread({"a": torch.tensor([0.5, -2.0]), "b": torch.tensor([3.0])}, positions)
    assert wide["a"].tolist() == [0, 0.5, 0, 0, -2.0] and wide["b"].tolist() == [3.0]


def test_a_basis_at_positions_computes_what_spread_shifts_compute(tmp_path):
    torch.manual_seed(0)
    linear = torch.nn.Linear(9, 7)
    positions = {"0": torch.tensor([1, 3, 6])}
    few = torch.nn.Sequential(torch.nn.Linear(9, 7))
    few[0].load_state_dict(linear.state_dict())
    weights = {"0": linear.weight.detach()}
    shift = apply_svfit(few, basis=model_basis(weights, positions, cache_dir=tmp_path))["0"]
    shift.data = torch.randn(3)
    full = torch.nn.Sequential(linear)
    apply_svfit(full, basis=model_basis(weights, cache_dir=tmp_path))["0"].data[: 6 + 1] = spread(
        {"0": shift.data}, positions
    )["0"]
    input = torch.randn(5, 9)
    assert torch.allclose(few(input), full(input), atol=1e-5)


# ---------------------------------------------------------------- the file


def sparse_adapter():
    torch.manual_seed(0)
    wide, dense = torch.zeros(300), torch.randn(40)
    wide[torch.tensor([0, 17, 299])] = torch.tensor([0.5, -1.0, 2.0])
    return Adapter({"unet.wide": wide, "unet.dense": dense, "unet.zero": torch.zeros(500)}, DEFAULT_BASE, {})


def test_mostly_zeros_are_written_as_positions(tmp_path):
    adapter = sparse_adapter()
    path = save_adapter(adapter, tmp_path / "a.safetensors", torch.float32)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"unet.wide.shift", "unet.wide.index", "unet.dense.shift", "unet.zero.shift"}
        assert file.get_tensor("unet.wide.index").tolist() == [0, 17, 299]
        assert file.get_tensor("unet.wide.shift").tolist() == [0.5, -1.0, 2.0]
        assert json.loads(file.metadata()["targets"]) == {"unet.wide": 3, "unet.dense": 40, "unet.zero": 500}
    back = read_adapter(path)
    assert all(torch.equal(back.shifts[name], shift) for name, shift in adapter.shifts.items())
    assert back.ranks == adapter.ranks == {"unet.wide": 3, "unet.dense": 40, "unet.zero": 500}
    assert describe_adapter(back)["total"]["values"] == 543


def test_values_that_float16_rounds_to_zero_are_left_out(tmp_path):
    adapter = sparse_adapter()
    adapter.shifts["unet.wide"][17] = 1e-12
    assert read_adapter(save_adapter(adapter, tmp_path / "a.safetensors")).ranks["unet.wide"] == 2


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ([1, 1, 2], "unet.a.index' .* doesn't ascend from 0"),
        ([2, 1, 3], "doesn't ascend"),
        ([-1, 0, 1], "doesn't ascend"),
        ([0, 1], r"has shape \[2\], its targets say \[3\]"),
        ([0, 1, 2**30], "reaches 1073741824, 65536 is the limit here"),
    ],
)
def test_bad_positions_are_refused(tmp_path, index, match):
    tensors = {"unet.a.shift": torch.ones(3), "unet.a.index": torch.tensor(index, dtype=torch.int32)}
    refuses(write_with(tmp_path / "a", tensors, targets='{"unet.a":3}'), match)


def test_positions_without_values_are_surplus(tmp_path):
    tensors = {"unet.a.shift": torch.ones(3), "unet.b.index": torch.ones(3, dtype=torch.int16)}
    refuses(write_with(tmp_path / "a", tensors, targets='{"unet.a":3}'), "1 tensors.*unet.b.index")


def test_the_loader_on_the_page_takes_positions_and_kernels(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "adapter-format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {}
    exec(code, names)  # noqa: S102 - our own page
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(24, 120, 3, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(conv.weight.half().bfloat16())
    U, S, Vh = torch.linalg.svd(conv.weight.detach().flatten(1), full_matrices=False)
    shift = torch.zeros(110)
    shift[torch.tensor([2, 109])] = torch.tensor([0.5, -0.25])
    path = save_adapter(Adapter({"unet.c": shift}, DEFAULT_BASE, {}), tmp_path / "a.safetensors", torch.float32)
    assert read_adapter(path).ranks == {"unet.c": 2}
    names["merge"](path, {"unet": torch.nn.ModuleDict({"c": conv})})
    S[:110] += shift
    assert torch.allclose(conv.weight.flatten(1), U @ torch.diag(S) @ Vh, atol=1e-12)


# ---------------------------------------------------------------- a run


@pytest.fixture
def config(tiny_options, monkeypatch):
    monkeypatch.setattr("svfit_dreambooth.training.budget.SCORING_BATCHES", 2)
    return tiny_options | {
        "max_train_steps": 3,
        "learning_rate": 0.05,
        "fixed_loss_examples": 4,
        "validation_steps": 0,
        "save_dtype": "float32",
    }


def test_scores_are_mean_gradients_and_leave_the_base_untouched(config):
    run = prepare(TrainConfig(**config, train_text_encoder=True))
    pipeline, cpu = run.base.pipeline, torch.device("cpu")
    examples = encode_examples(run, cpu)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    scores = score_values(run, examples, cpu)
    assert not svfit_layers(pipeline.unet) and not svfit_layers(pipeline.text_encoder)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipeline.unet.state_dict().items())
    assert {name: len(score) for name, score in scores.items()} == {n: min(shape) for n, shape in run.shapes.items()}

    bases = model_basis(run.weights())
    own = {name.partition(".")[2]: basis for name, basis in bases.items() if name.startswith("unet.")}
    shifts = apply_svfit(pipeline.unet, target_modules=list(own), basis=own)
    denoiser = Objective(run, examples, run.base.family.components, cpu, torch.float32)
    name = next(iter(shifts))
    eps = 1e-2  # by differences of the loss, not by gradients
    losses = []
    for sign in (1, -1):
        shifts[name].data[0] = sign * eps
        with torch.no_grad():
            losses.append(sum(denoiser.loss(number, 0, 1).total for number in range(2)))
    expected = config["learning_rate"] * abs(losses[0] - losses[1]) / (2 * eps)
    assert scores[f"unet.{name}"][0] == pytest.approx(expected.item(), rel=0.05)


def test_scoring_spares_memory_as_the_run_does(config, monkeypatch):
    run = prepare(TrainConfig(**config, gradient_checkpointing=True, learned_word="sks"))
    cpu, unet, encoder = torch.device("cpu"), run.base.pipeline.unet, run.base.pipeline.text_encoder
    examples, seen, loss = encode_examples(run, cpu), [], Objective.loss

    def spared():
        return unet.is_gradient_checkpointing, "forward" in vars(unet.conv_in)

    def note(self, *args):
        seen.append((*spared(), any(weight.requires_grad for weight in encoder.parameters())))
        return loss(self, *args)

    monkeypatch.setattr(Objective, "loss", note)
    scores = score_values(run, examples, cpu)
    assert seen == [(True, True, False)] * 2 and spared() == (False, False)
    monkeypatch.undo()
    monkeypatch.setattr("svfit_dreambooth.training.budget.SCORING_BATCHES", 2)
    plain = score_values(prepare(TrainConfig(**config)), examples, cpu)
    assert all(torch.allclose(scores[name], score, rtol=1e-3, atol=1e-7) for name, score in plain.items())


def test_as_many_values_are_chosen_as_were_asked_for(config):
    plan, cpu = prepare(TrainConfig(**config, budget=40)), torch.device("cpu")
    positions = choose_positions(plan, encode_examples(plan, cpu), cpu)
    assert sum(len(places) for places in positions.values()) == 40 and set(positions) <= set(plan.shapes)
    assert "a budget of 40 of 624 values in all" in "\n".join(plan.report())


def test_a_run_that_goes_on_keeps_the_positions_of_its_checkpoint(config, tmp_path, monkeypatch):
    """Elsewhere rounding might choose others, and the values would land on other directions."""
    options = {**config, "max_train_steps": 4, "checkpointing_steps": 1}
    whole = train(TrainConfig(**{**options, "output_dir": str(tmp_path / "whole")}, budget=25))
    train(TrainConfig(**options, budget=25), on_step=lambda step: step.step == 2)
    monkeypatch.setattr("svfit_dreambooth.training.run.choose_positions", None)  # never called again
    again = train(TrainConfig(**options, budget=25, resume_from_checkpoint="latest"))
    first, second = read_adapter(whole.adapter_path).shifts, read_adapter(again.adapter_path).shifts
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_with_a_budget_writes_a_small_file_that_loads(config, tmp_path):
    options = {**config, "target_modules": ["conv", "attn2.to_k"]}
    result = train(TrainConfig(**options, budget=25))
    adapter = read_adapter(result.adapter_path)
    assert result.values == 25 and 0 < sum(shift.count_nonzero() for shift in adapter.shifts.values()) <= 25
    assert set(adapter.base_fingerprint["unet"]) == {"sha256", "sample"} and adapter.training["budget"] == 25
    pipeline = prepare(TrainConfig(**config)).base.pipeline
    load_adapter(pipeline, result.adapter_path)
    assert set(svfit_layers(pipeline.unet)) == {name.partition(".")[2] for name in adapter.shifts}
    again = train(TrainConfig(**{**options, "output_dir": str(tmp_path / "again")}, budget=25))
    other = read_adapter(again.adapter_path).shifts
    assert all(torch.equal(other[name], shift) for name, shift in adapter.shifts.items())


def test_wide_targets_train_and_load(config):
    result = train(TrainConfig(**config, target_modules=["attention", "feed-forward", "conv"]))
    unet = result.base.pipeline.unet
    names = set(find_projections(unet, ["attention", "feed-forward", "conv"]))
    assert {name.partition(".")[2] for name in read_adapter(result.adapter_path).shifts} == names
    load_adapter(result.base.pipeline, result.adapter_path)
    assert set(svfit_layers(unet)) == names


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": 0}, "budget is 0: it must be 1 or more"),
        ({"budget": 9, "rank": 3}, "leave rank out"),
        ({"budget": 9, "energy": 0.9}, "leave energy out"),
        ({"budget": 9, "init_adapter": "a.safetensors"}, "leave init_adapter out"),
    ],
)
def test_options_that_contradict_a_budget(options, match):
    with pytest.raises(SVFitError, match=match):
        TrainConfig(**options)
