"""Pre-training: the tokenizer spells anything, a tiny run resumes exactly and exports, the shipped model draws."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import CLIPTokenizer

from toybox.architecture import (
    TINY,
    WEIGHTS,
    assemble,
    build_autoencoder,
    build_text_encoder,
    build_unet,
    load_pipeline,
)
from toybox.dataset import as_tensor, batch_indices
from toybox.denoiser import OBJECT_WEIGHT, Lessons, draw_timesteps, object_weights
from toybox.judge import load_judge
from toybox.loop import Budget, average_share, fit, rate_factor
from toybox.pretrain import main
from toybox.stages import fit_encoder
from toybox.tokenizer import build_tokenizer
from toybox.world import canonical_caption, training_scenes

WORDS = ["a", "photo", "of", "the", "red", "car", "in", "snow"]


@pytest.mark.parametrize("text", ["a photo of sks car", "zyzzyva, quux-42!", "größe", "東京 🙂"])
def test_any_text_is_spelled_and_read_back(text):
    tokenizer = build_tokenizer(WORDS)
    read = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert read.replace(" ", "") == text.replace(" ", "")


def test_known_words_are_single_tokens_and_survive_saving(tmp_path):
    tokenizer = build_tokenizer(WORDS)
    tokenizer.save_pretrained(tmp_path)
    sentence = "a photo of the red car in the snow"
    for each in (tokenizer, CLIPTokenizer.from_pretrained(tmp_path)):
        assert len(each(sentence).input_ids) == len(sentence.split()) + 2


def test_a_vocabulary_is_the_same_however_often_it_is_built():
    first = build_tokenizer(WORDS).get_vocab()
    assert all(build_tokenizer(reversed(WORDS)).get_vocab() == first for _ in range(5))


def test_rates_follow_the_budget():
    factors = [rate_factor(fraction) for fraction in np.linspace(0, 1, 101)]
    assert max(factors) == 1.0 and factors[-1] == pytest.approx(0, abs=1e-9)
    assert all(a >= b for a, b in pairwise(factors[2:]))
    with pytest.raises(ValueError, match="limit"):
        Budget().fraction(1.0, 1)


def test_batches_of_an_epoch_show_everything_once():
    seen = np.concatenate([batch_indices(step, 5, 20) for step in range(4)])
    assert sorted(seen) == list(range(20))


def _fit(folder: Path, *limits: int, muon_rate: float | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    modules = nn.ModuleDict({"line": nn.Linear(3, 1)})

    def compute_loss(step: int) -> torch.Tensor:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (modules["line"](x) - x.sum(1, keepdim=True)).square().mean()

    for limit in limits:
        # An interruption leaves the schedule as it was: only the number of steps of the loop is cut.
        budget = _Cut(max_steps=20, cut=limit)
        accelerator = Accelerator(cpu=True)
        fit(modules, compute_loss, folder / "line.pt", budget, {"line": 1e-2}, accelerator, muon_rate)
    return modules["line"].weight.detach().clone()


class _Cut(Budget):
    def __init__(self, max_steps: int, cut: int):
        super().__init__(max_steps=max_steps)
        object.__setattr__(self, "cut", cut)

    def fraction(self, seconds: float, step: int) -> float:
        return 1.0 if step >= self.cut else super().fraction(seconds, step)


@pytest.mark.parametrize("muon_rate", [None, 1e-2])
def test_resumed_equals_uninterrupted(tmp_path, muon_rate):
    whole = _fit(tmp_path / "whole", 20, muon_rate=muon_rate)
    parts = _fit(tmp_path / "parts", 7, 20, muon_rate=muon_rate)
    assert torch.equal(whole, parts)


def test_the_average_ends_at_the_last_weights():
    shares = [average_share(10_000, fraction, 0.998) for fraction in (0.3, 0.6, 0.8, 0.9, 0.99, 0.9999)]
    assert shares[:2] == [pytest.approx(0.002)] * 2 and shares == sorted(shares) and shares[-1] == 1.0
    assert average_share(0, 0.0, 0.998) == 0.9


def test_lessons_are_the_same_whoever_makes_them():
    scenes = list(training_scenes(np.random.default_rng(0), 12))
    lessons = Lessons(scenes, build_tokenizer(WORDS), batch_size=4)
    asked, ahead = lessons.from_step(3, 2, workers=0), lessons.from_step(3, 2, workers=2)
    for step in (3, 5, 7, 9):
        one, other = next(asked), next(ahead)
        assert all(map(torch.equal, one, other)) and all(map(torch.equal, one, lessons[step]))


def test_a_tiny_run_goes_from_nothing_to_a_pipeline(tmp_path):
    common = ["--work_dir", str(tmp_path / "work"), "--output_dir", str(tmp_path / "weights"), "--size", "tiny"]
    common += ["--num_pictures", "16", "--max_steps", "2", "--batch_size", "8", "--mixed_precision", "no"]
    for stage in ("render", "autoencoder", "text", "unet", "export"):
        main([stage, *common])
    pipeline = load_pipeline(tmp_path / "weights")
    assert pipeline.vae_scale_factor == 4
    assert {parameter.dtype for parameter in pipeline.text_encoder.parameters()} == {torch.float32}
    image = pipeline("a photo of sks dog", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    # A longer run goes on from the checkpoint, and another may start from the exported folder.
    main(["unet", *common, "--max_steps", "3"])
    assert torch.load(tmp_path / "work" / "unet.pt")["step"] == 3
    main(["text", *common, "--init_from", str(tmp_path / "weights"), "--work_dir", str(tmp_path / "work")])


def test_parts_fit_together():
    tokenizer = build_tokenizer(WORDS)
    pipeline = assemble(build_autoencoder(TINY), build_text_encoder(tokenizer, TINY), tokenizer, build_unet(TINY))
    image = pipeline("red car", num_inference_steps=1, output_type="pt").images
    assert image.shape == (1, 3, 64, 64)


def test_shipped_weights_are_small_and_complete():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 28_000_000
    assert (WEIGHTS / "model_index.json").exists() and not list(WEIGHTS.rglob("*.bin"))


def test_the_encoder_is_the_principal_components_of_patches():
    pictures = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    pictures[:, ::2] //= 2  # rows differ, so that patches have a structure
    vae = build_autoencoder(TINY)
    fit_encoder(vae, pictures)
    pixel_values = as_tensor(pictures)
    latents = vae.encode(pixel_values).latents.detach()  # (40, 20, 16, 16)
    patches = torch.nn.functional.pixel_unshuffle(pixel_values, 4).movedim(1, -1).flatten(0, -2).double()  # (n, 48)
    _, S, Vh = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)
    expected = (patches - patches.mean(0)) @ Vh[:20].mT / (S[:20] / len(patches) ** 0.5).sqrt()  # s^-1/2, half whitened
    found = latents.movedim(1, -1).flatten(0, -2).double()  # (n, 20)
    found = found / found.std(0) * expected.std(0)
    agreement = (found * expected).sum(0).abs() / (found.norm(dim=0) * expected.norm(dim=0))
    assert agreement.min() > 0.999  # the same directions, either way round
    assert latents.square().mean().sqrt().item() == pytest.approx(0.5, rel=0.01)
    spread = latents.std(dim=(0, 2, 3))
    assert torch.allclose(spread / spread[0], (S[:20] / S[0]).sqrt().float(), rtol=0.02)


def test_the_toy_weighs_more_than_its_surroundings():
    scene = next(training_scenes(np.random.default_rng(0), 1))
    weights = object_weights([dataclasses.replace(scene, x=0.25, y=0.75, size=0.25)], 16)[0, 0]
    assert weights[12, 4] == OBJECT_WEIGHT and weights[2, 12] == 1 and weights.shape == (16, 16)
    assert (weights == OBJECT_WEIGHT).sum().item() == pytest.approx(torch.pi * 2**2, abs=4)  # a disc of radius 2


def test_timesteps_reach_every_level_and_prefer_the_middle():
    draws = torch.cat([draw_timesteps(32, 1000, torch.Generator().manual_seed(seed)) for seed in range(200)])
    share = torch.histc(draws.float(), bins=10, min=0, max=1000) / len(draws)
    assert draws.min() < 20 and draws.max() > 980
    assert share.argmax() in (5, 6, 7) and share.min() > 0.025


def test_shipped_model_draws_what_it_is_asked_for():
    pipeline, judge = load_pipeline(), load_judge()
    wanted = [
        ("red", "snow", "car"),
        ("yellow", "underwater", "duck"),
        ("blue", "stage", "mug"),
        ("green", "city", "fish"),
    ]
    prompts = [canonical_caption(kind, colour, setting) for colour, setting, kind in wanted]
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    images = pipeline(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generators).images
    assert [image.size for image in images] == [(64, 64)] * len(wanted)
    found = judge.attributes(images)
    assert [(each["colour"], each["setting"]) for each in found] == [each[:2] for each in wanted]
    assert sum(each["kind"] == kind for each, (_, _, kind) in zip(found, wanted, strict=True)) >= len(wanted) - 1
