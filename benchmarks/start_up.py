"""What comes before and beside training: decomposing a base, the cache, changing adapters, generating, `--help`.

    python benchmarks/start_up.py --config_dir FOLDER [--skip decompose] [--output FILE.json]

FOLDER is a diffusers model folder of which only configs and tokenizer are needed: weights are random.
Alternatives take turns and ratios are medians over the rounds, but for the decomposition, which is done once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from random_base import random_pipeline

from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.families import find_projections, pipeline_components
from svfit_dreambooth.method.basis import cached_files, fingerprint, model_basis, weight_hashes
from svfit_dreambooth.method.targets import svfit_layers
from svfit_dreambooth.painting.loading import load_adapter, merge_adapters, set_adapters

COMMANDS = {
    "training command, --help": ["train_dreambooth_svfit.py", "--help"],
    "other commands, --help": ["-m", "svfit_dreambooth", "--help"],
    "web page, --help": ["app.py", "--help"],
    "import svfit_dreambooth": ["-c", "import svfit_dreambooth"],
    "import torch, for comparison": ["-c", "import torch"],
}


def seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def decomposition(weights: dict[str, torch.Tensor], cache: Path) -> dict[str, float]:
    """Cold against LAPACK's SVD one by one, warm, and the sizes."""
    figures = {"cold, s": seconds(lambda: model_basis(weights, cache_dir=cache))}
    figures["LAPACK float64 SVD one by one, s"] = seconds(
        lambda: [torch.linalg.svd(weight.double(), full_matrices=False) for weight in weights.values()]
    )
    figures["cold of LAPACK"] = figures["cold, s"] / figures["LAPACK float64 SVD one by one, s"]
    hashing, warm = [], []
    for _ in range(3):
        hashes: dict[str, str] = {}
        hashing.append(seconds(lambda hashes=hashes: hashes.update(weight_hashes(weights))))
        warm.append(seconds(lambda hashes=hashes: model_basis(weights, cache_dir=cache, hashes=hashes)))
    figures["warm: hashing the weights, s"] = statistics.median(hashing)
    figures["warm: mapping the basis, s"] = statistics.median(warm)
    figures["cache, MB"] = sum(size for _, size in cached_files(cache)) / 1e6
    figures["adapted weights in float32, MB"] = sum(4 * weight.numel() for weight in weights.values()) / 1e6
    return figures


def changing(pipeline, weights: dict[str, torch.Tensor], cache: Path, rounds: int) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Two adapters on one pipeline: strengths changed with factored layers, and with merged ones."""
    recorded = fingerprint(weights)
    for number in range(2):
        shifts = {name: 0.01 * torch.randn(min(weight.shape)) for name, weight in weights.items()}
        adapter = Adapter(shifts, "random", recorded, title=f"adapter{number}")
        load_adapter(pipeline, adapter, basis_cache_dir=cache)
    strengths = [0.3 + 0.01 * number for number in range(rounds)]
    factored = [seconds(lambda s=s: set_adapters(pipeline, {"adapter0": s, "adapter1": 1 - s})) for s in strengths]
    same = [seconds(lambda: set_adapters(pipeline, {"adapter0": 1.0})) for _ in range(rounds)]
    merging = []
    with merge_adapters(pipeline):
        for s in strengths[:3]:
            merging.append(seconds(lambda s=s: set_adapters(pipeline, {"adapter0": s, "adapter1": 1 - s})))
        unchanged = seconds(lambda: set_adapters(pipeline, {"adapter0": strengths[2], "adapter1": 1 - strengths[2]}))
        copies = sum(
            layer.unmerged_weight.nbytes
            for model in pipeline_components(pipeline).values()
            for layer in svfit_layers(model).values()
            if layer.unmerged_weight is not None
        )
    return {
        "strengths changed, factored, ms": 1e3 * statistics.median(factored),
        "nothing changed, factored, ms": 1e3 * statistics.median(same[1:]),
        "strengths changed, merged, ms": 1e3 * statistics.median(merging),
        "nothing changed, merged, ms": 1e3 * unchanged,
        "copies of the merged weights, MB": copies / 1e6,
    }


@torch.no_grad()
def generation(pipeline, base_unet, rounds: int) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """One call of the UNet with guidance, 512 px: base, adapter merged, adapter factored, taking turns."""
    sample, hidden = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768)
    taken: dict[str, list[float]] = {"base": [], "merged": [], "factored": []}
    for number in range(rounds + 1):
        own = {"base": seconds(lambda: base_unet(sample, 500, hidden))}
        with merge_adapters(pipeline):
            own["merged"] = seconds(lambda: pipeline.unet(sample, 500, hidden))
        own["factored"] = seconds(lambda: pipeline.unet(sample, 500, hidden))
        if number:  # the first warms up
            for name, value in own.items():
                taken[name].append(value)
    figures = {f"UNet call, {name}, s": statistics.median(values) for name, values in taken.items()}
    for name in ("merged", "factored"):
        ratios = [a / b for a, b in zip(taken[name], taken["base"], strict=True)]
        figures[f"{name} of base"] = statistics.median(ratios)
    return figures


def commands(rounds: int) -> dict[str, float]:
    """Seconds until each of `COMMANDS` has answered, the median of processes that find warm disk caches."""
    figures = {}
    for name, arguments in COMMANDS.items():
        run = [sys.executable, *arguments]
        taken = [
            seconds(lambda run=run: subprocess.run(run, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL))
            for _ in range(rounds + 1)
        ]
        figures[f"{name}, s"] = statistics.median(taken[1:])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config_dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", choices=["decompose", "generate", "commands"], nargs="*", default=[])
    parser.add_argument("--cache_dir", type=Path, help="of the bases; empty, or the decomposition is not a cold one")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    print(f"{os.cpu_count()} processors, {torch.get_num_threads()} threads, torch {torch.__version__}")
    figures: dict[str, float] = {}

    def tell(found: dict[str, float]) -> None:
        figures.update(found)
        for name, value in found.items():
            print(f"{name:40} {value:10.3f}", flush=True)

    if "commands" not in options.skip:
        tell(commands(options.rounds))
    pipeline = random_pipeline(options.config_dir)
    base_unet = random_pipeline(options.config_dir).unet
    weights = {
        f"{component}.{name}": layer.weight.detach()
        for component, model in pipeline_components(pipeline).items()
        for name, (_, _, layer) in find_projections(model).items()
    }
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache_dir or Path(temporary)
        if "decompose" not in options.skip:
            tell(decomposition(weights, cache))
        tell(changing(pipeline, weights, cache, options.rounds))
        if "generate" not in options.skip:
            tell(generation(pipeline, base_unet, options.rounds))
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
