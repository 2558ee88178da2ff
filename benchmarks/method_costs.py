"""What a training step of every method of `compare_methods.py` takes on toybox: seconds and memory, beside LoRA r=8.

    python benchmarks/method_costs.py [--methods svfit lora-8 ...] [--rounds 5] [--output costs.json]

A process for each method and round, in turn; a process makes 2 steps that are not counted and 8 that are.  Seconds are
the median of a process, memory is what the steps add to what the process held before them: trained copies, gradients,
AdamW's memory, activations.  Printed are the medians over the rounds and their ratios to LoRA r=8.  Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from methods import METHODS
from training_step import resident

from svfit_dreambooth import TrainConfig
from svfit_dreambooth.bases.names import SUBJECTS_FOLDER
from svfit_dreambooth.training.examples import encode_examples
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.plan import prepare

AGAINST = "lora-8"


def measure(name: str) -> dict[str, float]:
    """In a process of its own."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(
            TrainConfig(
                instance_data_dir=str(SUBJECTS_FOLDER / "dog_patch"),
                instance_prompt="a photo of sks dog",
                output_dir=folder,
                learning_rate=1e-4,
                **{"target_modules": ["attention"], **METHODS[name].options},
            )
        )
        examples = encode_examples(run, device)
        before = resident("VmRSS")
        values = list(METHODS[name].put_in(run, examples).values.values())
        model = Objective(run, examples, run.base.family.components, device, torch.float32)
        optimizer = torch.optim.AdamW(values, lr=1e-4)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
        seconds = []
        for number in range(10):
            started = time.perf_counter()
            model.loss(number, 0, 1).total.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[2:]), "bytes": resident("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if name != "none"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child)))
        return
    names = list(dict.fromkeys([*options.methods, AGAINST]))
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(options.rounds):
        rounds.append({})
        for name in names:
            child = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, "--child", name], check=True, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            rounds[-1][name] = json.loads(child.stdout)
    print("| method | s / step | of LoRA r=8 | MB of a step | of LoRA r=8 |\n|---|---|---|---|---|")
    for name in names:
        cells = []
        for what, unit in (("seconds", 1.0), ("bytes", 1e6)):
            value = statistics.median(row[name][what] for row in rounds)
            ratio = statistics.median(row[name][what] / row[AGAINST][what] for row in rounds)
            cells += [f"{value / unit:.3g}", f"{ratio:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    if options.output:
        options.output.write_text(json.dumps(rounds, indent=2) + "\n")


if __name__ == "__main__":
    main()
