"""What it costs to give every picture of a batch its own adapter, beside one adapter for all and beside merging.

    python benchmarks/many_adapters.py [--base toybox] [--pictures 8] [--steps 12] [--rounds 3]
    python benchmarks/many_adapters.py --base sd15 --resolution 512     # real size, random weights
    python benchmarks/many_adapters.py --config_dir CONFIGS     # the same of a folder of model configs

Painted in turn, within each round, as latents, so that the autoencoder does not hide the difference:
    one        a batch with one adapter for all pictures, its weights merged
    own        a batch with an adapter of its own for every picture
    factored   the same without memory for merged weights
    merges     for every picture: strengths set, weights merged, painted alone, weights put back
Times are printed as ratios within a round, the median of them over the rounds.  Shifts are random at full rank on all
attention projections: time does not depend on their values.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from random_base import random_pipeline, stable_diffusion_15

from svfit_dreambooth import adapter_mixes, load_adapter, merge_adapters, set_adapters
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.devices import default_device
from svfit_dreambooth.bases.families import family_of
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.method.basis import fingerprint

CLOCK = [time.perf_counter]  # what times are taken by


def random_adapters(pipeline, count: int) -> list[Adapter]:  # type: ignore[no-untyped-def]
    """`count` adapters of every attention projection of the pipeline."""
    family = family_of(pipeline)
    weights = {
        f"{component}.{path}": layer.weight
        for component in family.components
        for path, (_, _, layer) in family.find_projections(component).items()
    }
    known = fingerprint(weights)
    return [
        Adapter({n: 0.01 * torch.randn(min(w.shape)) for n, w in weights.items()}, "benchmark", known)
        for _ in range(count)
    ]


def measure(pipeline, names: list[str], steps: int, side: int | None) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Seconds of each way to paint a picture with each of the adapters `names`, once; `side` in pixels."""

    def paint(count: int) -> None:
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        pipeline(["a photo of a dog"] * count, height=side, width=side, num_inference_steps=steps, generator=generators,
                 output_type="latent")  # fmt: skip

    def one() -> None:
        set_adapters(pipeline, {names[0]: 1.0})
        with merge_adapters(pipeline):
            paint(len(names))

    def own() -> None:
        with adapter_mixes(pipeline, [{name: 1.0} for name in names]):
            paint(len(names))

    def factored() -> None:
        with adapter_mixes(pipeline, [{name: 1.0} for name in names], merged_bytes=0):
            paint(len(names))

    def merges() -> None:
        for name in names:
            set_adapters(pipeline, {name: 1.0})
            with merge_adapters(pipeline):
                paint(1)

    return {act.__name__: _seconds(act) for act in (one, own, factored, merges)}


def _seconds(act: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = CLOCK[0]()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCK[0]() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="toybox", help='"sd15" is Stable Diffusion 1.5 with random weights')
    parser.add_argument("--resolution", type=int, help="side in pixels; None: the base's own")
    parser.add_argument("--config_dir", type=Path, help="configs and tokenizer of a model, in place of a base")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine that others use too"
    )
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    options = parser.parse_args()
    if options.clock == "cpu":
        CLOCK[0] = time.process_time
    if options.config_dir:
        pipeline = random_pipeline(options.config_dir)
    else:
        pipeline = stable_diffusion_15() if options.base == "sd15" else open_base_model(options.base).pipeline
    pipeline.set_progress_bar_config(disable=True)
    known: dict[str, str] = {}
    names = []
    for number, adapter in enumerate(random_adapters(pipeline, options.pictures)):
        names.append(load_adapter(pipeline, adapter, 0.0, f"adapter {number}", known_hashes=known))
    pipeline.to(default_device(), getattr(torch, options.dtype))
    measure(pipeline, names, 1, options.resolution)
    rounds = [measure(pipeline, names, options.steps, options.resolution) for _ in range(options.rounds)]
    print(f"{options.pictures} pictures, {options.steps} steps, {options.rounds} rounds, {default_device()}")
    print("| way | s / picture | of one adapter for all | range |\n|---|---|---|---|")
    for way in rounds[0]:
        ratios = [row[way] / row["one"] for row in rounds]
        seconds = statistics.median(row[way] for row in rounds) / options.pictures
        print(f"| {way} | {seconds:.3g} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
