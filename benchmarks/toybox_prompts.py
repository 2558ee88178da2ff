"""Does toybox draw what it is asked for, and as the world looks?

300 prompts, a third of them of combinations it has never seen; and the Frechet distance between its pictures and the
world's own of the same words, less that between two sets of the world's.

`python benchmarks/toybox_prompts.py --output results.json --contact_sheet sheet.png`
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from svfit_dreambooth.bases.toybox import Toybox
from toybox.architecture import WEIGHTS, load_pipeline
from toybox.denoiser import contact_sheet
from toybox.judge import Judge, load_judge
from toybox.world import (
    COLOURS,
    KINDS,
    SETTINGS,
    canonical_caption,
    is_held_out,
    render,
    sample_individual,
    sample_scene,
)

TRAITS = ("kind", "colour", "setting")


def draw_combinations(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """`count` different combinations of kind, colour and setting; every third is one held out of pre-training."""
    everything = [(kind, colour, setting) for kind in KINDS for colour in COLOURS for setting in SETTINGS]
    rng = np.random.default_rng(seed)
    shuffled = [everything[i] for i in rng.permutation(len(everything))]
    held_out = [combination for combination in shuffled if is_held_out(*combination)]
    seen = [combination for combination in shuffled if not is_held_out(*combination)]
    return [held_out[i // 3] if i % 3 == 2 else seen[i - i // 3] for i in range(count)]


def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    steps: int,
    guidance_scale: float,
    guidance_rescale: float,
    batch_size: int = 25,
) -> list[Image.Image]:
    """One picture a prompt; the seed is the prompt's number, whatever the batch size."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        images += pipeline(
            batch,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            generator=generators,
        ).images
    return images


def score(judge: Judge, images: Sequence[Image.Image], wanted: Sequence[tuple[str, str, str]]) -> dict[str, dict]:
    """Share of pictures in which the judge finds each trait that was asked for, and all three; by sort of prompt."""
    found = judge.attributes(images)
    right = np.array(
        [[each[t] == w for t, w in zip(TRAITS, want, strict=True)] for each, want in zip(found, wanted, strict=True)]
    )
    held_out = np.array([is_held_out(*want) for want in wanted])
    right = np.concatenate([right, right.all(axis=1, keepdims=True)], axis=1)  # (n, 4)
    rows = {"all": np.ones_like(held_out), "seen": ~held_out, "held out": held_out}
    return {
        name: {
            "prompts": int(rows_.sum()),
            **dict(zip((*TRAITS, "all three"), right[rows_].mean(0).tolist(), strict=True)),
        }
        for name, rows_ in rows.items()
    }


def true_pictures(wanted: Sequence[tuple[str, str, str]], seed: int = 0) -> list[Image.Image]:
    """The world's own pictures of the same words."""
    rng = np.random.default_rng(seed)
    return [
        render(sample_scene(rng, sample_individual(rng, kind, colour), setting, "photo"))
        for kind, colour, setting in wanted
    ]


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features, (n, d) each (Heusel et al., 2017)."""
    one, other = one.double(), other.double()
    first, second = one.mT.cov(), other.mT.cov()  # (d, d)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT  # (d, d)
    middle = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return ((one.mean(0) - other.mean(0)).square().sum() + first.trace() + second.trace() - 2 * middle).item()


def excess_distance(judge: Judge, images: Sequence[Image.Image], wanted: Sequence[tuple[str, str, str]]) -> float:
    """The Frechet distance of `images` to true pictures, in the judge's features, less that of other true ones."""
    true, others = (judge.image_features(true_pictures(wanted, seed)) for seed in (1, 2))
    return frechet_distance(judge.image_features(images), true) - frechet_distance(others, true)


def beside_the_world(
    images: Sequence[Image.Image], wanted: Sequence[tuple[str, str, str]], columns: int
) -> Image.Image:
    """Rows of the model's pictures, each above a row of the world's own pictures of the same words."""
    true = true_pictures(wanted)
    rows: list[Image.Image] = []
    for start in range(0, len(images), columns):
        rows += [*images[start : start + columns], *true[start : start + columns]]
    return contact_sheet(rows, columns)


def print_table(table: dict[str, dict]) -> None:
    """The scores, a row for each sort of prompt."""
    print(f"{'prompts':10s} {'n':>4s} {'kind':>7s} {'colour':>7s} {'setting':>8s} {'all three':>10s}")
    for name, row in table.items():
        print(
            f"{name:10s} {row['prompts']:4d} {row['kind']:7.1%} {row['colour']:7.1%} {row['setting']:8.1%}"
            f" {row['all three']:10.1%}"
        )


def main() -> None:
    """Parse the command line, generate, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="pipeline folder; default: the shipped toybox")
    parser.add_argument("--num_prompts", type=int, default=300)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[4.0], help="several: a table for each")
    parser.add_argument("--guidance_rescale", type=float, default=Toybox.guidance_rescale, help="0: none")
    parser.add_argument("--num_threads", type=int, help="processor threads; None: all cores")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers; None: only printed")
    parser.add_argument(
        "--contact_sheet",
        type=Path,
        help="PNG of the first 24 pictures, each row above the world's own; None: not drawn",
    )
    args = parser.parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    wanted = draw_combinations(args.num_prompts)
    prompts = [canonical_caption(*combination) for combination in wanted]
    pipeline, judge = load_pipeline(args.model), load_judge()
    results: dict[str, Any] = {}
    for guidance_scale in args.guidance_scale:
        images = generate(pipeline, prompts, args.num_inference_steps, guidance_scale, args.guidance_rescale)
        results[str(guidance_scale)] = score(judge, images, wanted)
        print(f"guidance {guidance_scale} rescaled {args.guidance_rescale:g}, {args.num_inference_steps} steps")
        print_table(results[str(guidance_scale)])
        distance = excess_distance(judge, images, wanted)
        results[str(guidance_scale)]["frechet"] = distance
        print(f"Frechet distance to the world's pictures, beyond that of its own: {distance:.4f}")
    if args.contact_sheet:
        beside_the_world(images[:24], wanted[:24], columns=12).save(args.contact_sheet)
    if args.output:
        names = ("num_inference_steps", "num_prompts", "guidance_rescale")
        settings = {name: getattr(args, name) for name in names}
        args.output.write_text(json.dumps({**settings, "by_guidance_scale": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
