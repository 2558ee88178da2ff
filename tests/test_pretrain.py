"""Pre-training: the tokenizer spells anything, a tiny run resumes exactly and exports, the shipped model draws."""

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
from toybox.dataset import batch_indices
from toybox.judge import load_judge
from toybox.loop import Budget, fit, rate_factor
from toybox.pretrain import main
from toybox.tokenizer import build_tokenizer
from toybox.world import canonical_caption

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


def test_rates_follow_the_budget():
    factors = [rate_factor(fraction) for fraction in np.linspace(0, 1, 101)]
    assert max(factors) == 1.0 and factors[-1] == pytest.approx(0, abs=1e-9)
    assert all(a >= b for a, b in pairwise(factors[2:]))
    with pytest.raises(ValueError, match="limit"):
        Budget().fraction(1.0, 1)


def test_batches_of_an_epoch_show_everything_once():
    seen = np.concatenate([batch_indices(step, 5, 20) for step in range(4)])
    assert sorted(seen) == list(range(20))


def _fit(folder: Path, *limits: int) -> torch.Tensor:
    torch.manual_seed(0)
    modules = nn.ModuleDict({"line": nn.Linear(3, 1)})

    def compute_loss(step: int) -> torch.Tensor:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (modules["line"](x) - x.sum(1, keepdim=True)).square().mean()

    for limit in limits:
        # An interruption leaves the schedule as it was: only the number of steps of the loop is cut.
        budget = _Cut(max_steps=20, cut=limit)
        fit(modules, compute_loss, folder / "line.pt", budget, {"line": 1e-2}, Accelerator(cpu=True))
    return modules["line"].weight.detach().clone()


class _Cut(Budget):
    def __init__(self, max_steps: int, cut: int):
        super().__init__(max_steps=max_steps)
        object.__setattr__(self, "cut", cut)

    def fraction(self, seconds: float, step: int) -> float:
        return 1.0 if step >= self.cut else super().fraction(seconds, step)


def test_resumed_equals_uninterrupted(tmp_path):
    whole = _fit(tmp_path / "whole", 20)
    parts = _fit(tmp_path / "parts", 7, 20)
    assert torch.equal(whole, parts)


def test_a_tiny_run_goes_from_nothing_to_a_pipeline(tmp_path):
    common = ["--work_dir", str(tmp_path / "work"), "--output_dir", str(tmp_path / "weights"), "--size", "tiny"]
    common += ["--num_pictures", "16", "--max_steps", "2", "--batch_size", "8", "--mixed_precision", "no"]
    for stage in ("render", "autoencoder", "decoder", "text", "unet", "export"):
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


def test_shipped_model_draws_the_colour_and_setting_asked_for():
    pipeline, judge = load_pipeline(), load_judge()
    wanted = [("red", "snow", "car"), ("yellow", "underwater", "duck")]
    prompts = [canonical_caption(kind, colour, setting) for colour, setting, kind in wanted]
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    images = pipeline(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generators).images
    assert [image.size for image in images] == [(64, 64)] * 2
    found = judge.attributes(images)
    assert [(each["colour"], each["setting"]) for each in found] == [each[:2] for each in wanted]
