"""The memory estimate against what the real network keeps."""

from dataclasses import replace

import pytest
import torch

from svfit_dreambooth.bases.devices import available_memory
from svfit_dreambooth.bases.families import apply_svfit
from svfit_dreambooth.method.targets import remove_svfit
from svfit_dreambooth.training import plan as preparation
from svfit_dreambooth.training.counting import kept_for_backward
from svfit_dreambooth.training.estimate import _activations, estimate_memory
from svfit_dreambooth.training.slim import slim, unslim


@pytest.fixture
def run(tiny_run):
    return tiny_run(resolution=32, train_batch_size=3)


@pytest.mark.parametrize("changes", [{}, {"rank": "4"}, {"train_batch_size": 1}, {"gradient_checkpointing": True}])
def test_activations_are_those_of_the_real_network(run, changes):
    run = replace(run, config=replace(run.config, **changes))
    unet = run.base.pipeline.unet.train()
    apply_svfit(unet, rank=run.config.rank_value)
    slim(unet)
    batch = run.config.train_batch_size
    with kept_for_backward(unet, run.base.family.checkpointed, run.config.gradient_checkpointing) as count:
        unet(torch.randn(batch, 4, 16, 16), torch.zeros(batch), torch.randn(batch, 77, 24))
    real = count()
    remove_svfit(unet)
    unslim(unet)
    assert _activations(run, run.config) == pytest.approx(real, rel=0.02)


def test_the_estimate_grows_with_what_costs_memory(run):
    def total(**changes):
        return estimate_memory(replace(run, config=replace(run.config, **changes)))

    plain = total()
    assert plain.networks >= 4 * sum(p.numel() for p in run.base.pipeline.unet.parameters()) and plain.fits
    checkpointed = total(gradient_checkpointing=True)
    assert checkpointed.activations < plain.activations and checkpointed.bases == plain.bases
    half = total(mixed_precision="bf16")
    assert half.networks < plain.networks and half.bases * 2 == plain.bases and half.activations < plain.activations


def advice(run, free, **changes):
    found = estimate_memory(replace(run, free_memory=free, config=replace(run.config, **changes)))
    return found.lines()[1].removeprefix("this will hardly fit: ")


def total(run, **changes):
    return estimate_memory(replace(run, config=replace(run.config, **changes))).total


def test_what_does_not_fit_comes_with_all_that_would_make_it_fit(run):
    """Each by itself, the mildest value of an option, and none that would not."""
    needed = total(run)
    assert advice(run, needed - 1) == (
        "use one of gradient_checkpointing, mixed_precision bf16, train_batch_size 1, rank 16."
    )
    alone = {
        "gradient_checkpointing": total(run, gradient_checkpointing=True),
        "mixed_precision bf16": total(run, mixed_precision="bf16"),
        "train_batch_size 1": total(run, train_batch_size=1),
        "rank 16": total(run, rank="16"),
    }
    for free in alone.values():
        words = [word for word, size in alone.items() if size <= free]
        assert advice(run, free) == f"use {'one of ' if len(words) > 1 else ''}{', '.join(words)}."


def test_what_none_makes_fit_they_may_together(run):
    least = min(total(run, gradient_checkpointing=True, mixed_precision="bf16"), total(run))
    assert advice(run, least) == "use gradient_checkpointing mixed_precision bf16."
    said = advice(run, 1000)
    assert said.startswith(
        "even gradient_checkpointing mixed_precision bf16 train_batch_size 1 rank 16 is too much, use"
    )
    spared = {"gradient_checkpointing": True, "mixed_precision": "bf16", "train_batch_size": 1, "rank": "16"}
    assert advice(run, 1000, **spared) == "use a machine with more memory or a smaller base."


def test_without_looks_autoencoder_and_text_encoder_leave_a_gpu_alone(tiny_run, monkeypatch):
    run = tiny_run(resolution=32, validation_steps=2)
    pipeline = run.base.pipeline
    waiting = 4 * sum(p.numel() for module in (pipeline.vae, pipeline.text_encoder) for p in module.parameters())

    def with_looks_less_without():
        blind = replace(run, config=replace(run.config, validation_steps=0))
        return estimate_memory(run).networks - estimate_memory(blind).networks

    assert with_looks_less_without() == 0  # on the CPU there is no other place
    monkeypatch.setattr("svfit_dreambooth.training.estimate.default_device", lambda: torch.device("cuda"))
    assert with_looks_less_without() == waiting
    tight = replace(run, free_memory=estimate_memory(run).total - 1)
    assert estimate_memory(tight).lines()[1].startswith("this will hardly fit: use one of validation_steps 0, ")


def test_what_is_free_on_a_mac_is_shared_with_other_programs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for most in (1000, 2**60):
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda most=most: most)
        assert 0 < available_memory() <= most
    assert available_memory() < 2**50


def test_a_base_that_is_open_is_not_counted_twice(tiny_run, monkeypatch):
    """What is free is read before the base takes its share of it."""
    free = [1000, 0]
    opened = preparation.open_run_base
    monkeypatch.setattr(preparation, "available_memory", lambda: free[0])
    monkeypatch.setattr(
        preparation, "open_run_base", lambda config, **options: free.pop(0) and opened(config, **options)
    )
    assert estimate_memory(tiny_run()).available == 1000
