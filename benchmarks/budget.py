"""What `--budget N` is worth: N singular values chosen by their gradients, against one rank for all layers, at equal N.

    python benchmarks/budget.py [--subjects dog_patch mug_king] [--ranks 3 12] [--steps 60] [--target_modules ...]

For every subject and flat rank r, three adapters of the same number of values learn from the same examples:

    flat         the leading r values of every layer
    by layer     the leading values of every layer, ranks chosen so that the scores of `svfit_dreambooth.training.budget` add up
                 to most
    by value     the values of the highest scores, as --budget takes them

Printed are two losses on fixed noise and timesteps: on the photos, and on true pictures of the subject in settings
that no photo shows.  JSON lines with --output.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from svfit_dreambooth import TrainConfig
from svfit_dreambooth.bases.families import apply_svfit
from svfit_dreambooth.bases.names import SUBJECTS_FOLDER
from svfit_dreambooth.method.basis import model_basis
from svfit_dreambooth.method.targets import remove_svfit
from svfit_dreambooth.photos.reading import find_photos
from svfit_dreambooth.training.budget import allocate, score_values
from svfit_dreambooth.training.examples import encode_examples
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.plan import Plan, prepare
from toybox.world import PHOTO_SETTINGS, SETTING_PHRASES, SUBJECTS, render, sample_scene

CPU = torch.device("cpu")


def levelled(score: Tensor) -> Tensor:
    """The non-increasing sequence closest to `score` (k,): pool adjacent violators (Barlow et al., 1972)."""
    blocks: list[tuple[float, int]] = []  # mean, length
    for value in score.tolist():
        mean, length = value, 1
        while blocks and blocks[-1][0] <= mean:
            other, others = blocks.pop()
            mean, length = (mean * length + other * others) / (length + others), length + others
        blocks.append((mean, length))
    return torch.tensor([mean for mean, length in blocks for _ in range(length)], dtype=torch.float64)


def by_layer(scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Leading positions only: the highest of the levelled scores, which never rise within a layer, are leading ones."""
    counts = {name: len(p) for name, p in allocate({n: levelled(s) for n, s in scores.items()}, budget).items()}
    return {name: torch.arange(count) for name, count in counts.items()}


def true_pictures(run: Plan, folder: Path) -> Plan:
    """`run` with one true picture of its subject in every setting that its photos do not show."""
    name = Path(str(run.config.instance_data_dir)).name
    subject, rng = SUBJECTS[name], np.random.default_rng(7)
    for place in [place for place in SETTING_PHRASES if place not in PHOTO_SETTINGS[name]]:
        render(sample_scene(rng, subject, place, "photo")).save(folder / f"{place}.png")
        (folder / f"{place}.txt").write_text(f"a photo of sks {subject.kind} {SETTING_PHRASES[place]}")
    return dataclasses.replace(run, photos=find_photos(str(folder)))


def fit(run: Plan, positions: Mapping[str, Tensor], photos: Objective, unseen: Objective) -> dict[str, float]:
    """Trains the values at `positions` as `train` does, and measures."""
    config, unet = run.config, run.base.pipeline.unet
    bases = {name.partition(".")[2]: basis for name, basis in model_basis(
        {name: weight for name, weight in run.weights().items() if name in positions}, positions).items()}  # fmt: skip
    shifts = list(apply_svfit(unet, target_modules=list(bases), basis=bases).values())
    optimizer = torch.optim.AdamW(shifts, betas=(config.adam_beta1, config.adam_beta2), weight_decay=0.0)
    for step in range(config.max_train_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 + math.cos(math.pi * step / config.max_train_steps)) / 2
        photos.loss(step, 0, 1).total.backward()
        torch.nn.utils.clip_grad_norm_(shifts, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    measured = {"photos": photos.fixed_loss() or 0.0, "unseen": unseen.fixed_loss() or 0.0}
    remove_svfit(unet)
    return {"values": sum(shift.numel() for shift in shifts), "layers": len(shifts), **measured}


def compare(subject: str, options: argparse.Namespace, folder: Path) -> list[dict]:
    """All arrangements for one subject."""
    config = TrainConfig(
        instance_data_dir=str(SUBJECTS_FOLDER / subject),
        instance_prompt=f"a photo of sks {subject.partition('_')[0]}",
        output_dir=str(folder / "run"),
        learning_rate=options.learning_rate,
        max_train_steps=options.steps,
        train_batch_size=4,
        target_modules=options.target_modules,
        fixed_loss_examples=options.fixed_loss_examples,
    )
    run = prepare(config)
    (folder / "true").mkdir()
    examples = encode_examples(run, CPU)
    networks = (run.base.family.components, CPU, torch.float32)
    photos = Objective(run, examples, *networks)
    unseen = Objective(run, encode_examples(true_pictures(run, folder / "true"), CPU), *networks)
    scores = score_values(run, examples, CPU)
    results = []

    def note(kind: str, rank: int | str, **measured: float | None) -> None:
        results.append({"subject": subject, "rank": rank, "kind": kind, "steps": options.steps, **measured})
        print(json.dumps(results[-1]), flush=True)

    note("base", 0, values=0, photos=photos.fixed_loss(), unseen=unseen.fixed_loss())
    everything = {name: torch.arange(len(score)) for name, score in scores.items()}
    for rank in options.ranks:
        flat = {name: positions[:rank] for name, positions in everything.items()}
        budget = sum(len(positions) for positions in flat.values())
        for kind, positions in (
            ("flat", flat),
            ("by layer", by_layer(scores, budget)),
            ("by value", allocate(scores, budget)),
        ):
            note(kind, rank, **fit(run, positions, photos, unseen))
    if options.full:
        note("full", "full", **fit(run, everything, photos, unseen))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--subjects", nargs="+", default=["dog_patch", "mug_king"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[3, 12])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning_rate", type=float, default=5e-2)
    parser.add_argument("--target_modules", nargs="+", default=["attention"])
    parser.add_argument("--fixed_loss_examples", type=int, default=32)
    parser.add_argument("--full", action="store_true", help="train all values too")
    parser.add_argument("--output", type=Path, help="JSON lines, appended")
    options = parser.parse_args()
    for subject in options.subjects:
        with tempfile.TemporaryDirectory() as folder:
            results = compare(subject, options, Path(folder))
        if options.output:
            with options.output.open("a") as file:
                file.writelines(json.dumps(result) + "\n" for result in results)


if __name__ == "__main__":
    main()
