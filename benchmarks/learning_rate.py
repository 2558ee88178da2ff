"""What the default learning rate and number of steps rest on: a sweep on toybox subjects, judged in unseen settings.

    python benchmarks/learning_rate.py [--subjects cat_tiger car_racer] [--rates 1e-2 5e-2 1e-1] [--steps 200 400]

Prints a line a run as it finishes, then the means over subjects; JSON lines with --output, and runs that are in that
file already are not repeated.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from svfit_dreambooth import TrainConfig, train
from svfit_dreambooth.base_model import TOYBOX_SUBJECTS
from svfit_dreambooth.generation import open_for_adapters
from svfit_dreambooth.training.showcase import judge_subject


def measure(subject: str, rate: float, steps: int, options: argparse.Namespace) -> dict:
    """Trains once and asks the judge."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            instance_data_dir=str(TOYBOX_SUBJECTS / subject),
            instance_prompt=f"a photo of sks {subject.partition('_')[0]}",
            output_dir=folder,
            learning_rate=rate,
            max_train_steps=steps,
            train_batch_size=options.batch_size,
            train_text_encoder=options.train_text_encoder,
            keep="last",
            validation_steps=0,
            final_pictures=False,
        )
        result = train(config)
        model = open_for_adapters([(result.adapter_path, 1.0)])
        figures = judge_subject(model, subject, {"num_inference_steps": 25})
    return {
        "subject": subject,
        "rate": rate,
        "steps": steps,
        "batch_size": options.batch_size,
        "text_encoder": options.train_text_encoder,
        "seconds": round(result.seconds, 1),
        "fixed_loss": [result.loss_before, result.loss_after],
        "base": dataclasses.asdict(figures["base"]),
        "adapter": dataclasses.asdict(figures["adapter"]),
    }


def line(runs: list[dict]) -> str:
    """Means over `runs`, one line."""

    def mean(*keys: str | int) -> float:
        total = 0.0
        for run in runs:
            value = run
            for key in keys:
                value = value[key]  # type: ignore[index,call-overload,assignment]
            total += float(value)  # type: ignore[arg-type]
        return total / len(runs)

    return (
        f"{runs[0]['rate']:8g} x {runs[0]['steps']:4} steps  loss {mean('fixed_loss', 0):.4f} to "
        f"{mean('fixed_loss', 1):.4f}  subject {mean('base', 'subject'):.3f} to {mean('adapter', 'subject'):.3f}  "
        f"prompt {mean('base', 'prompt'):.0%} to {mean('adapter', 'prompt'):.0%}  drift {mean('adapter', 'drift'):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--subjects", nargs="+", default=["cat_tiger", "car_racer"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-2, 2e-2, 5e-2, 1e-1])
    parser.add_argument("--steps", nargs="+", type=int, default=[200, 400])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--train_text_encoder", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON lines, appended")
    options = parser.parse_args()
    runs: list[dict] = []
    if options.output and options.output.exists():
        runs = [json.loads(text) for text in options.output.read_text().splitlines()]
    keys = ("subject", "rate", "steps", "batch_size", "text_encoder")
    done = {tuple(run[key] for key in keys) for run in runs}
    for steps, rate, subject in itertools.product(options.steps, options.rates, options.subjects):
        if (subject, rate, steps, options.batch_size, options.train_text_encoder) in done:
            continue
        runs.append(measure(subject, rate, steps, options))
        print(f"{subject:12}", line(runs[-1:]), flush=True)
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    print("means over subjects")
    for key, group in itertools.groupby(
        sorted(runs, key=lambda run: (run["steps"], run["rate"])), key=lambda run: (run["steps"], run["rate"])
    ):
        del key
        print(line(list(group)))


if __name__ == "__main__":
    main()
