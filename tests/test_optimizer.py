"""How far values move: scales, rates that follow from the base, and AdamW under them."""

import math

import pytest
import torch
from torch import nn

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.optimizer import (
    CHANGE,
    FLOOR,
    POWER,
    Optimizer,
    ScaledAdamW,
    Steps,
    auto_rate,
    parameter_groups,
    plan_steps,
    step_scales,
)
from svfit_dreambooth.training.presets import with_preset
from svfit_dreambooth.training.sensitivity import Sensitivity

F = {"unet.a": torch.tensor([1e-2, 1e-6, 1e-8, 0.0]), "text_encoder.b": torch.tensor([1e-4, 1e-5, 1e-7])}
ROLES = {"unet.a": "denoiser", "text_encoder.b": "text_encoder", "text_encoder.word": "word"}
MEASURED = Sensitivity(F, power=0.5, error=0.2)


def config(**options):
    return with_preset(TrainConfig(**options), "some family")


def test_scales_fall_with_the_sensitivity_and_their_mean_is_one():
    scales = step_scales(F)
    every, scaled = (torch.cat(list(each.values())).double() for each in (F, scales))
    assert scaled.mean().item() == pytest.approx(1)
    floor = FLOOR * 1e-6  # the median of those that matter: 1e-6 is the third of six, which torch takes
    expected = (every + floor) ** -POWER
    assert torch.allclose(scaled, expected / expected.mean(), rtol=1e-5)
    assert torch.equal(step_scales({"a": torch.zeros(3)})["a"], torch.ones(3))


@pytest.mark.parametrize("scaled", [True, False])
def test_an_automatic_run_changes_the_answers_by_the_same_share_on_every_base(scaled):
    """A linear base, whose answers are J s: with random signs the mean square of a run's change is known."""
    torch.manual_seed(0)
    for size in (1.0, 30.0):  # of the singular values, and so of the shifts that matter as much
        J = torch.randn(2000, 40) / size  # (numbers of an answer, values)
        own = {"unet.a": J.square().mean(0)}
        scales = step_scales(own) if scaled else {}
        rate = auto_rate(own, scales, power=4.0, steps=9)
        signs = (torch.randint(0, 2, (9, 40, 500)) * 2.0 - 1).sum(0)  # of nine steps together
        change = J @ (rate * scales.get("unet.a", torch.ones(40))[:, None] * signs)  # (numbers, trials)
        assert change.square().mean().sqrt().item() / math.sqrt(4.0) == pytest.approx(CHANGE, rel=0.05)


def test_a_few_heavy_layers_do_not_set_the_rate_of_the_others():
    """As the first and last convolution of a network would, which hold most of its sensitivity."""
    usual = {f"unet.{i}": torch.full((50,), 1e-6) for i in range(20)}
    heavy = usual | {"unet.conv_in": torch.full((50,), 1e-2)}
    rate, with_heavy = (auto_rate(own, step_scales(own), 1.0, 100) for own in (usual, heavy))
    share = sum(float(own.sum()) for own in usual.values()) / sum(float(own.sum()) for own in heavy.values())
    assert share < 0.01 and 0.5 < with_heavy / rate <= 1


def test_the_rates_that_options_ask_for():
    auto = plan_steps(ROLES, config(), MEASURED)
    assert (
        auto.rates["unet.a"] == auto.rates["text_encoder.b"] == auto_rate(F, auto.scales, 0.5, config().max_train_steps)
    )
    assert auto.rates["text_encoder.word"] == 1e-3 and set(auto.scales) == set(F)
    equal = plan_steps(ROLES, config(step_scaling="none"), MEASURED)
    assert not equal.scales and equal.learning_rate == auto_rate(F, {}, 0.5, config().max_train_steps)
    plain = plan_steps(ROLES, config(learning_rate=0.05))
    assert plain == Steps({"unet.a": 0.05, "text_encoder.b": 2e-3, "text_encoder.word": 1e-3})
    scaled = plan_steps(ROLES, config(learning_rate=0.05, step_scaling="sensitivity"), MEASURED)
    assert scaled.rates == plain.rates and torch.equal(scaled.scales["unet.a"], auto.scales["unet.a"])
    with pytest.raises(SVFitError, match="need the base's"):
        plan_steps(ROLES, config())


def test_chosen_values_have_the_sensitivity_of_their_positions():
    positions = {"unet.a": torch.tensor([1, 3])}
    steps = plan_steps({"unet.a": "denoiser"}, config(), MEASURED, positions)
    chosen = {"unet.a": F["unet.a"][[1, 3]]}
    assert torch.equal(steps.scales["unet.a"], step_scales(chosen)["unet.a"])
    assert steps.learning_rate == auto_rate(chosen, steps.scales, 0.5, config().max_train_steps)


def moved(scales, steps=30, decay=0.1, **options):
    value = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))
    optimizer = ScaledAdamW([{"params": [value], **scales}], lr=0.01, weight_decay=decay, **options)
    for number in range(steps):
        optimizer.zero_grad()
        ((value - torch.tensor([1.0, 2.0, 3.0])) * math.sin(number)).square().sum().backward()
        optimizer.step()
    return value.detach()


def test_a_scaled_value_moves_as_one_of_that_rate_would():
    for lr_scale in (0.25, 3.0):
        alone = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))
        plain = torch.optim.AdamW([alone], lr=0.01 * lr_scale, weight_decay=0.1)
        for number in range(30):
            plain.zero_grad()
            ((alone - torch.tensor([1.0, 2.0, 3.0])) * math.sin(number)).square().sum().backward()
            plain.step()
        assert torch.allclose(moved({"scales": [torch.full((3,), lr_scale)]}), alone, rtol=1e-5)
    assert torch.equal(moved({}), moved({"scales": [None]}))
    each = torch.tensor([0.25, 1.0, 3.0])
    mixed = moved({"scales": [each]})
    for i, scale in enumerate(each):
        assert mixed[i].item() == pytest.approx(moved({"scales": [scale.expand(3)]})[i].item(), rel=1e-5)


def test_groups_for_a_loop_of_ones_own():
    values = {name: nn.Parameter(torch.zeros(len(own))) for name, own in F.items()}
    steps = plan_steps({name: ROLES[name] for name in values}, config(), MEASURED)
    (group,) = parameter_groups(values, steps)
    assert group["params"] == list(values.values()) and group["lr"] == steps.learning_rate
    optimizer = ScaledAdamW([group])
    sum(value.sum() for value in values.values()).backward()
    optimizer.step()  # the first step of Adam: rate times scale, against the sign
    for name, value in values.items():
        assert torch.allclose(value, -steps.learning_rate * steps.scales[name], rtol=1e-4)


def test_its_memory_is_adamws_and_goes_back(tmp_path):
    values = {"unet.a": nn.Parameter(torch.zeros(4))}
    steps = plan_steps({"unet.a": "denoiser"}, config(max_train_steps=9), MEASURED)
    optimizer = Optimizer(values, steps, config(max_train_steps=9))

    def go(count):
        for _ in range(count):
            optimizer.set_rates(0, 1.0)
            values["unet.a"].grad = torch.tensor([1.0, -2.0, 3.0, 0.5]) + values["unet.a"].detach()
            optimizer.inner.step()
        return values["unet.a"].detach().clone()

    middle, memory = go(3), optimizer.memory()
    whole = go(4)
    with torch.no_grad():
        values["unet.a"].copy_(middle)
    optimizer.restore(memory)
    assert torch.equal(go(4), whole)
