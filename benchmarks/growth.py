"""How a training step grows with resolution, batch and rank: memory by the training command's estimate, time measured.

    python benchmarks/growth.py --config_dir FOLDER [--time] --picture growth.png [--output FILE.json]

FOLDER is a diffusers model folder of which only configs and tokenizer are needed; the estimate needs no weights at
all.  Prints the first resolution that does not fit 8, 12 and 24 GB.  With --time, steps are timed too, as CPU seconds
of the process, the faster of two: set OMP_NUM_THREADS=1 on a machine that others use.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from random_base import random_pipeline
from training_step import DTYPES, adapt, random_unet, stepper

from svfit_dreambooth import TrainConfig
from svfit_dreambooth.bases.families import find_projections
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.training.estimate import estimate_memory
from svfit_dreambooth.training.plan import Plan

RESOLUTIONS, BATCHES, RANKS = (256, 384, 512, 768), (1, 2, 4, 8), ("4", "64", "full")
TIMED_RESOLUTIONS, TIMED_BATCHES = (256, 384, 512), (1, 2, 4)
SIDE = 256  # of the pictures where batch and rank are timed
SIZES = (8, 12, 24)  # GB
PRECISIONS = {"fp32": "no", "bf16": "bf16"}


def run_without_weights(config_dir: Path) -> Plan:
    """What the training command would train on the base of `config_dir`: the UNet's attention, shapes alone."""
    with torch.device("meta"):
        pipeline = random_pipeline(config_dir)
    layers = {name: layer.weight for name, (_, _, layer) in find_projections(pipeline.unet).items()}
    shapes = {f"unet.{name}": (weight.shape[0], weight[0].numel()) for name, weight in layers.items()}
    return Plan(TrainConfig(), [], BaseModel("random", pipeline), "x", {"unet": list(layers)}, shapes)


def estimated(run: Plan, precision: str, resolution: int = 512, batch: int = 1, rank: str = "full") -> float:
    """Gigabytes of a run."""
    config = dataclasses.replace(
        run.config, mixed_precision=PRECISIONS[precision], resolution=resolution, train_batch_size=batch, rank=rank
    )
    return estimate_memory(dataclasses.replace(run, config=config)).total / 1e9  # no memory is known, so none is short


def first_too_large(run: Plan, precision: str, gigabytes: float) -> int:
    """The smallest multiple of 64 pixels at which a step of batch 1 is estimated above `gigabytes`."""
    low, high = 0, 64  # fits, does not
    while estimated(run, precision, high) <= gigabytes:
        low, high = high, 2 * high
    while high - low > 64:
        middle = (low + high) // 128 * 64
        low, high = (middle, high) if estimated(run, precision, middle) <= gigabytes else (low, middle)
    return high


def timed(options: argparse.Namespace, resolution: int, batch: int = 1, rank: str = "full") -> float:
    """CPU seconds of a float32 step."""
    unet = random_unet(options.config_dir, torch.float32)
    chosen = argparse.Namespace(resolution=resolution, clock="cpu")
    trained = adapt(unet, "svfit", None if rank == "full" else int(rank))
    step = stepper(unet, trained, batch, chosen, torch.float32)
    started = time.perf_counter()
    seconds = [step(), step()]
    print(f"timed {resolution} px, batch {batch}, rank {rank}: {time.perf_counter() - started:.0f} s", flush=True)
    return min(seconds)


def draw(figures: dict, picture: Path) -> None:
    """Three panels: against resolution, batch and rank; memory as lines, time as bars behind where it was taken."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    labels = {
        "resolution": "resolution, px (batch 1, full rank)",
        "batch": "batch (512 px, full rank)",
        "rank": "rank (512 px, batch 1)",
    }
    for panel, (axis, label) in zip(panels, labels.items(), strict=True):
        values = list(figures["memory"]["fp32"][axis])
        for precision, style in (("fp32", "o-"), ("bf16", "s--")):
            panel.plot(values, list(figures["memory"][precision][axis].values()), style, label=f"memory, {precision}")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        if axis in figures.get("seconds", {}):
            side = "" if axis == "resolution" else f" at {SIDE} px"
            twin = panel.twinx()
            own = figures["seconds"][axis]
            places = [values.index(value) for value in own]
            twin.plot(places, list(own.values()), "k^:", label=f"time, fp32{side}")
            twin.set_ylim(0, 1.15 * max(own.values()))
            twin.set_ylabel("CPU seconds a step")
            twin.legend(loc="lower right", fontsize=7)
        panel.legend(loc="upper left", fontsize=7)
    panels[0].set_ylabel("GB, estimated")
    panels[0].set_ylim(bottom=0)  # of all three
    figure.tight_layout()
    figure.savefig(picture, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config_dir", type=Path, required=True)
    parser.add_argument("--time", action="store_true", help="time steps too")
    parser.add_argument("--picture", type=Path, required=True, help="PNG to write")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    run = run_without_weights(options.config_dir)
    figures: dict = {"memory": {}, "does not fit": {}}
    for precision in DTYPES:
        figures["memory"][precision] = {
            "resolution": {str(side): estimated(run, precision, resolution=side) for side in RESOLUTIONS},
            "batch": {str(batch): estimated(run, precision, batch=batch) for batch in BATCHES},
            "rank": {rank: estimated(run, precision, rank=rank) for rank in RANKS},
        }
        figures["does not fit"][precision] = {size: first_too_large(run, precision, size) for size in SIZES}
        print(precision, figures["memory"][precision], figures["does not fit"][precision], flush=True)
    if options.time:
        figures["seconds"] = {
            "resolution": {str(side): timed(options, side) for side in TIMED_RESOLUTIONS},
            "batch": {str(batch): timed(options, SIDE, batch=batch) for batch in TIMED_BATCHES},
            "rank": {rank: timed(options, SIDE, rank=rank) for rank in RANKS},
        }
        print(figures["seconds"])
    draw(figures, options.picture)
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
