"""What measuring the sensitivity costs, beside 40 training steps of batch 4, and how far it can be trusted.

    OMP_NUM_THREADS=1 python benchmarks/sensitivity_cost.py [--rounds 2] [--target_modules all]

Cost: CPU seconds of this process, both by turns in it, nothing of the base in the cache but its directions.  Trust: what is
measured again with other noise, and with pictures of more denoising steps at the same noise, beside the first: the
standard deviation over all values of the logarithm of their scales' quotient, and the quotient of the `auto` rates.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from svfit_dreambooth import TrainConfig, train
from svfit_dreambooth.bases.devices import default_device
from svfit_dreambooth.bases.names import SUBJECTS_FOLDER, TOYBOX
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.method.basis import model_triplets
from svfit_dreambooth.training import base_pictures, sensitivity
from svfit_dreambooth.training.optimizer import auto_rate, step_scales
from svfit_dreambooth.training.sensitivity import Sensitivity

STEPS, UNTIMED = 22, 2  # training steps of a round; the first of them
OTHER_NOISE = 1000  # the number of the first pass


def training_seconds(base: Any, cache: Path, targets: list[str] | None) -> float:
    """CPU seconds of 40 steps of batch 4."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            instance_data_dir=str(SUBJECTS_FOLDER / "dog_patch"),
            instance_prompt="a photo of sks dog",
            output_dir=folder,
            max_train_steps=STEPS,
            train_batch_size=4,
            checkpointing_steps=STEPS + 1,
            validation_steps=0,
            fixed_loss_examples=0,
            final_pictures=False,
            basis_cache_dir=str(cache),
            target_modules=targets or ["attention"],
        )
        train(config, on_step=lambda _: ends.append(time.process_time()), base=base)
    return 40 * (ends[-1] - ends[UNTIMED - 1]) / (STEPS - UNTIMED)


def differences(first: Sensitivity, second: Sensitivity) -> str:
    """How far steps by the second are from steps by the first."""
    scales = [step_scales(found.values) for found in (first, second)]
    quotients = torch.cat([scales[1][name] / own for name, own in scales[0].items()])
    rates = [
        auto_rate(found.values, own, found.power, STEPS) for found, own in zip((first, second), scales, strict=True)
    ]
    return f"scales off by {quotients.log().std():.3f}, auto rate {rates[1]:.4f} in place of {rates[0]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--target_modules", nargs="+")
    options = parser.parse_args()
    base = open_base_model(TOYBOX, content_filter=False)
    base.pipeline.set_progress_bar_config(disable=True)
    _ = base.digest
    layers = base.family.adapted_layers(options.target_modules, False)
    targets, weights = {component: list(own) for component, own in layers.items()}, base.weights(layers)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        model_triplets(weights, "full", cache_dir=cache)

        def measured() -> Sensitivity:
            for kind in ("sensitivity", "base_pictures"):
                shutil.rmtree(cache / kind, ignore_errors=True)
            return sensitivity.base_sensitivity(base, targets, weights, device=default_device(), cache_dir=cache)

        for _ in range(options.rounds):
            began = time.process_time()
            first = measured()
            seconds, steps = time.process_time() - began, training_seconds(base, cache, options.target_modules)
            print(f"{seconds:.1f} s beside {steps:.1f} s of 40 steps: {seconds / steps:.2f}", flush=True)
        print(f"relative standard error of a value, the median: {first.error:.2f}")
        own = sensitivity._generator
        with patch.object(sensitivity, "_generator", lambda number, use: own(OTHER_NOISE + number, use)):
            print(f"other noise: {differences(first, measured())}", flush=True)
        with patch.object(sensitivity, "STEPS", base_pictures.STEPS):
            print(f"pictures of {base_pictures.STEPS} denoising steps: {differences(first, measured())}")


if __name__ == "__main__":
    main()
