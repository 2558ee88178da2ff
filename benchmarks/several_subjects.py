"""What a step of one subject costs in a run of several, beside a run of its own.

    python benchmarks/several_subjects.py [--base toybox] [--subjects 1 2 4 8] [--steps 10] [--batch_size 1]
    python benchmarks/several_subjects.py --base sd15 --resolution 256    # real size, random weights

All in one process, on the same networks, taking turns: in every round a few steps of a run of one subject, as `train`
makes them, and of runs of several, as `train_together` does.  Photos are noise: time does not depend on them.  Printed
are seconds for each subject's step, the fastest of the rounds, and their ratio to a run of its own.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from random_base import random_base

from svfit_dreambooth import TrainConfig
from svfit_dreambooth.bases.devices import default_device
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.method.basis import weight_hashes
from svfit_dreambooth.subjects.shared import Shared
from svfit_dreambooth.subjects.steps import Member, step_together
from svfit_dreambooth.training.examples import Examples, encode_examples
from svfit_dreambooth.training.loop import Loop
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.optimizer import plan_steps
from svfit_dreambooth.training.plan import Plan, open_run_base, prepare
from svfit_dreambooth.training.processes import make_accelerator
from svfit_dreambooth.training.trainable import Trainable

EXAMPLES: dict[str, Examples] = {}  # of every subject, by its name


def plans(folder: Path, count: int, options: argparse.Namespace, base: BaseModel) -> list[Plan]:
    """A plan for each of `count` subjects of one photo of noise."""
    found = []
    for number in range(count):
        photos = folder / f"sks thing {number}"
        photos.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / "photo.png")
        config = TrainConfig(
            pretrained_model_name_or_path=options.base,
            instance_data_dir=str(photos),
            instance_prompt=f"a photo of sks thing {number}",
            output_dir=str(folder / "out" / str(number)),
            resolution=options.resolution,
            train_batch_size=options.batch_size,
            mixed_precision=options.precision,
            target_modules=["attention"],
            learning_rate=0.05,
            validation_steps=0,
            max_train_steps=10_000,
        )
        found.append(prepare(config, base=base))
    return found


def single(plan: Plan, steps: int) -> Callable[[], float]:
    """A function that makes `steps` steps of a run of one subject, and gives seconds for each."""

    def act() -> float:
        accelerator = make_accelerator(plan.config)
        weights = plan.weights()
        trainable = Trainable(plan, weights, weight_hashes(weights), None, accelerator)
        objective = Objective(plan, EXAMPLES[plan.adapter_name], trainable.networks, accelerator.device)
        loop = Loop(plan.config, accelerator, objective, trainable.modules, trainable.values,
                    plan_steps(trainable.roles, plan.config), plan.folder)  # fmt: skip
        seconds = timed(loop.make_step, steps)
        trainable.remove()
        return seconds

    return act


def several(all_plans: list[Plan], steps: int) -> Callable[[], float]:
    """The same of a run of several, for each subject's step."""

    def act() -> float:
        accelerators = [make_accelerator(plan.config) for plan in all_plans]
        weights = all_plans[0].weights()
        shared = Shared(all_plans, weights, weight_hashes(weights), [None] * len(all_plans), accelerators[0])
        members = []
        for plan, own, accelerator in zip(all_plans, shared.owns, accelerators, strict=True):
            member, networks = Member(), shared.trainable.networks
            objective = Objective(plan, EXAMPLES[plan.adapter_name], networks, accelerator.device)
            member.own = own
            member.loop = Loop(plan.config, accelerator, objective, shared.trainable.modules, own.values,
                               plan_steps(own.roles, plan.config), plan.folder)  # fmt: skip
            members.append(member)
        seconds = timed(lambda: step_together(members, shared), steps)
        shared.remove()
        return seconds / len(members)

    return act


def timed(step: Callable[[], object], steps: int) -> float:
    """Seconds of one call, the mean over `steps` after one that is not counted."""
    step()
    synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return (time.perf_counter() - started) / steps


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="toybox", help='"sd15" is Stable Diffusion 1.5 with random weights')
    parser.add_argument("--config_dir", type=Path, help="configs and tokenizer of a model, in place of a base")
    parser.add_argument("--subjects", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--batch_size", type=int, default=1, help="of each subject")
    parser.add_argument("--precision", choices=["no", "fp16", "bf16"], default="no")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.config_dir is not None or options.base == "sd15":
            options.base = str(random_base(options.config_dir, folder / "base"))
        base = open_run_base(TrainConfig(pretrained_model_name_or_path=options.base))
        found = plans(folder, max(options.subjects), options, base)
        EXAMPLES.update({plan.adapter_name: encode_examples(plan, default_device()) for plan in found})
        ways = {"own run": single(found[0], options.steps)}
        ways |= {f"{count} at once": several(found[:count], options.steps) for count in options.subjects}
        rounds = [{way: act() for way, act in ways.items()} for _ in range(options.rounds)]
    fastest = {way: min(row[way] for row in rounds) for way in ways}
    print(f"batch {options.batch_size}, {options.precision}, {default_device()}, {torch.get_num_threads()} threads")
    print("| way | s / subject-step | of an own run |\n|---|---|---|")
    for way, seconds in fastest.items():
        print(f"| {way} | {seconds:.3g} | {seconds / fastest['own run']:.2f} |")


if __name__ == "__main__":
    main()
