"""How much the base's predictions depend on each singular value: the estimate, and finding it again."""

import logging

import pytest
import torch
from conftest import tiny_pipeline
from flow_bases import tiny_klein

from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.method.basis import model_basis
from svfit_dreambooth.method.targets import apply_svfit, remove_svfit, svfit_layers
from svfit_dreambooth.training import sensitivity as room
from svfit_dreambooth.training.sensitivity import base_sensitivity

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few pictures and passes; what was measured so is not mistaken for the real thing."""
    monkeypatch.setattr(room, "PICTURES", 2)
    monkeypatch.setattr(room, "STEPS", 2)
    monkeypatch.setattr(room, "PASSES", 6)


def base_of(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return BaseModel("tiny", pipeline)


def asked(base, targets=None, text=False):
    """`targets` and `weights` as `base_sensitivity` takes them."""
    found = base.family.adapted_layers(targets, text)
    return {component: list(layers) for component, layers in found.items()}, base.weights(found)


def measure(base, targets=None, text=False, **options):
    return base_sensitivity(base, *asked(base, targets, text), device=CPU, resolution=16, **options)


def test_it_is_the_mean_square_of_the_answers_derivative(tmp_path, monkeypatch):
    """By differences of the answers, not by gradients, on the very examples of the passes."""
    monkeypatch.setattr(room, "PASSES", 64)
    base = base_of(tiny_pipeline())
    targets, weights = asked(base, ["attn2.to_v"])
    seen, answer = [], room._answer

    def note(*args):
        seen.append(args)
        return answer(*args)

    monkeypatch.setattr(room, "_answer", note)
    found = base_sensitivity(base, targets, weights, device=CPU, resolution=16, cache_dir=tmp_path)
    name = next(iter(found.values))
    unet, layer = base.pipeline.unet, name.partition(".")[2]
    U, Vh = model_basis(weights, cache_dir=tmp_path)[name]
    shifts = apply_svfit(unet, target_modules=[layer], basis={layer: (U, Vh)})
    squares = []
    eps = 1e-2
    with torch.no_grad():
        for args in seen[:24]:
            both = []
            for sign in (1, -1):
                shifts[layer].zero_()[0] = sign * eps
                both.append(answer(*args))
            squares.append(((both[0] - both[1]) / (2 * eps)).square().mean().item())
    remove_svfit(unet)
    expected = sum(squares) / len(squares)
    assert found.values[name][0].item() == pytest.approx(expected, rel=5 * max(found.error, 0.05))
    assert 0.5 * (2 / 64) ** 0.5 < found.error < 4 * (2 / 64) ** 0.5  # squares of nearly normal numbers vary by 2 F^2


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_klein])
def test_it_covers_all_targets_of_any_family_and_leaves_the_base_as_it_was(make, tmp_path):
    base = base_of(make())
    text = base.family.adaptable_text_encoders
    networks = list(base.family.components.values())
    before = [tensor.clone() for network in networks for tensor in network.state_dict().values()]
    found = measure(base, ["all"], text, cache_dir=tmp_path)
    _, weights = asked(base, ["all"], text)
    assert {name: len(own) for name, own in found.values.items()} == {n: min(w.shape) for n, w in weights.items()}
    assert found.power > 0 and all((own >= 0).all() for own in found.values.values())
    for component in base.family.components if text else [base.family.denoiser_name]:
        assert any(own.max() > 0 for name, own in found.values.items() if name.startswith(component + "."))
    after = [tensor for network in networks for tensor in network.state_dict().values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert not any(svfit_layers(network) for network in networks)


def test_bf16_checkpointing_and_a_lower_rank_find_the_same(tmp_path):
    plain = measure(base_of(tiny_pipeline()), cache_dir=tmp_path)
    spared = measure(base_of(tiny_pipeline()), cache_dir=tmp_path / "spared", checkpointing=True)
    rounded = measure(base_of(tiny_pipeline()), cache_dir=tmp_path, dtype=torch.bfloat16)
    shorter = measure(base_of(tiny_pipeline()), cache_dir=tmp_path, rank=3)
    for name, own in plain.values.items():
        assert torch.allclose(spared.values[name], own, rtol=1e-3, atol=1e-12)
        assert torch.allclose(shorter.values[name], own[:3], rtol=1e-3, atol=1e-12)
    every, others = (torch.cat(list(found.values.values())) for found in (plain, rounded))
    assert torch.corrcoef(torch.stack([every, others]).log())[0, 1] > 0.99


def test_it_is_measured_once_and_announced_before(tmp_path):
    told = []
    base = base_of(tiny_pipeline())
    first = measure(base, cache_dir=tmp_path, on_measuring=told.append)
    again = measure(base_of(tiny_pipeline()), cache_dir=tmp_path, on_measuring=told.append)
    assert len(told) == 1 and "about the time of" in told[0]
    assert again.power == first.power and again.error == first.error
    assert all(torch.equal(again.values[name], own) for name, own in first.values.items())
    measure(base_of(tiny_pipeline(seed=1)), cache_dir=tmp_path, on_measuring=told.append)
    measure(base, ["attn1.to_q"], cache_dir=tmp_path, on_measuring=told.append)
    assert len(told) == 3  # another base, other layers


def test_a_damaged_file_is_measured_again(tmp_path, caplog):
    first = measure(base_of(tiny_pipeline()), cache_dir=tmp_path)
    (path,) = (tmp_path / "sensitivity").iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    with caplog.at_level(logging.INFO):
        again = measure(base_of(tiny_pipeline()), cache_dir=tmp_path)
    assert "measuring how much" in caplog.text
    assert all(torch.equal(again.values[name], own) for name, own in first.values.items())


def test_a_place_that_cannot_be_written_costs_only_the_next_start(tmp_path, caplog):
    (tmp_path / "sensitivity").write_text("in the way")
    assert measure(base_of(tiny_pipeline()), cache_dir=tmp_path).power > 0
    assert "the next start measures it again" in caplog.text
