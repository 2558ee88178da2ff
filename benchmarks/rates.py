"""Is the `auto` rate the right one?  Whole runs by it, by multiples of it and by other rules, on several bases.

    python benchmarks/rescaled_base.py toybox /tmp/rescaled
    python benchmarks/rates.py --results rates.jsonl --bases toybox /tmp/rescaled [--layers attention budget all text]
                               [--arms factor=1 factor=0.5 factor=2 ...] [--subjects cat_tiger ...] [--seeds 0]
    python benchmarks/rates.py --results rates.jsonl --table

Bases are of toybox's world: its subjects, prompts and judge are used, whatever folder they come from.  An arm is a text of
NAME=VALUE: `factor` (of `auto`), `power`, `floor`, `between` (see `rule`), or any option of the training command, such as
"learning_rate=0.02" (equal steps) or "factor=2 keep_base=true".  A finished run is a line of JSON in --results; whatever
is there is not repeated, so the command may be killed at any time and called again.  Runs are made subject by
subject, base by base, arms first.  The table compares what all arms of a cell have finished, and says where `auto`
(factor=1) is behind the best of them.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compare_methods import TOYBOX_TEST, TOYBOX_TUNING, class_words, painted
from torch import Tensor

from svfit_dreambooth import TrainConfig, load_adapter, train, unload_adapter
from svfit_dreambooth.adapter.file import read_adapter
from svfit_dreambooth.bases.devices import default_device
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.names import DEFAULT_BASE, SUBJECTS_FOLDER, TOYBOX
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.evaluation.features import Features, open_features
from svfit_dreambooth.evaluation.measures import number
from svfit_dreambooth.evaluation.protocol import Answers, bundled_questions, score
from svfit_dreambooth.training import optimizer
from svfit_dreambooth.training.plan import Plan

LAYERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["attention"]},
    "budget": {"target_modules": ["attention"], "budget": 2000},
    "all": {"target_modules": ["all"]},
    "text": {"target_modules": ["attention"], "train_text_encoder": True},
}
AUTO = "factor=1"
ARMS = (AUTO, "factor=0.5", "factor=2", "factor=0.25", "factor=4", "learning_rate=0.02", "learning_rate=0.05")
BEHIND = {"subject": 0.03, "drift": 0.01}  # of likeness and of drift: more than that is too much
PICTURES, INFERENCE_STEPS = 2, 10  # of each setting; of each picture


@dataclass(frozen=True)
class Run:
    """What tells a run from others."""

    base: str  # digest of its weights
    layers: str
    arm: str
    subject: str
    seed: int
    steps: int
    batch_size: int


@dataclass(frozen=True)
class Outcome(Run):
    """A finished run."""

    base_name: str
    rate: float  # of the denoiser, at the peak of the schedule
    values: int
    cpu_seconds: float
    scores: dict[str, float | None]  # see protocol.Scores


def options_of(arm: str) -> dict[str, Any]:
    """ "factor=2 keep_base=true" as a dictionary."""
    return {name: yaml.safe_load(value) for name, _, value in (change.partition("=") for change in arm.split())}


def scales_between(sensitivity: Mapping[str, Tensor], between: float) -> dict[str, Tensor]:
    """Another rule for scales: by the layers' mean F to the power -`between`, and as usual within a layer.

    scale_i = m^(-between) * ((F_i + floor * median of its layer) / m)^(-power), m being the mean of F over the layer;
    of mean 1.  With 1/2 it does not matter by which factor a layer's weights were multiplied.
    """
    raw = {}
    for name, own in sensitivity.items():
        own = own.double()
        if not own.any():  # none of its values is ever moved
            raw[name] = torch.zeros_like(own)
            continue
        m, floor = own.mean(), optimizer.FLOOR * own[own > 0].median()
        raw[name] = m**-between * ((own + floor) / m) ** -optimizer.POWER
    mean_scale = torch.cat(list(raw.values())).mean()
    return {name: (own / mean_scale).float() for name, own in raw.items()}


@contextmanager
def rule(
    factor: float = 1.0, power: float | None = None, floor: float | None = None, between: float | None = None
) -> Iterator[None]:
    """Within it steps follow from other constants than those of optimizer.py; None: its own.

    `factor`: of the relative change of the answers.  `between`: exponent between layers, see `scales_between`.
    """
    changed: dict[str, Any] = {"CHANGE": factor * optimizer.CHANGE}
    changed |= {} if power is None else {"POWER": power}
    changed |= {} if floor is None else {"FLOOR": floor}
    if between is not None:
        changed["step_scales"] = lambda sensitivity: scales_between(sensitivity, between)
    with patch.multiple(optimizer, **changed):
        yield


@cache
def opened(place: str) -> BaseModel:
    """The base at `place`, as one of toybox's world; its digest is that of its weights as they are stored."""
    base = BaseModel(DEFAULT_BASE, open_base_model(place, content_filter=False).pipeline)
    _ = base.digest
    return base


def make(run: Run, place: str, features: Features, untouched: dict[Any, Answers]) -> Outcome:
    """Trains once, and asks the judge."""
    began, base, options = time.process_time(), opened(place), options_of(run.arm)
    constants = {name: options.pop(name) for name in ("factor", "power", "floor", "between") if name in options}
    questions = bundled_questions(run.subject, pictures_per_prompt=PICTURES)
    words = class_words(run.subject)
    with tempfile.TemporaryDirectory() as folder, rule(**constants):
        config = TrainConfig(
            pretrained_model_name_or_path=place,
            instance_data_dir=str(SUBJECTS_FOLDER / run.subject),
            instance_prompt=f"a photo of sks {words}",
            class_prompt=f"a photo of a {words}",
            output_dir=folder,
            max_train_steps=run.steps,
            train_batch_size=run.batch_size,
            checkpointing_steps=run.steps + 1,
            validation_steps=0,
            fixed_loss_examples=0,
            final_pictures=False,
            seed=run.seed,
            **LAYERS[run.layers] | options,
        )
        result = train(config, base=base)
        if result.stopped:  # by a signal: what it has learnt by then is no result
            sys.exit(f"stopped in the run of {run.subject} by {run.arm}: call again to go on.")
        adapter = read_adapter(result.adapter_path)
    pipeline = base.pipeline.to(default_device())

    def answers(plan: Plan) -> Answers:
        return painted(plan, INFERENCE_STEPS, questions, run.seed)

    key = (run.base, run.subject, run.seed)
    if key not in untouched:
        untouched[key] = answers(result.plan)
    load_adapter(pipeline, adapter, name="learnt")
    changed = answers(result.plan)
    unload_adapter(pipeline)
    scores = {
        name: None if value is None else round(value, 5)
        for name, value in asdict(score(changed, untouched[key], questions, features)).items()
    }
    return Outcome(
        *asdict(run).values(), Path(place).name, adapter.training["learning_rate"], result.values,
        round(time.process_time() - began, 1), scores,
    )  # fmt: skip


def read_outcomes(path: Path) -> list[Outcome]:
    """The finished runs; a last line that was cut off does not count."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [Outcome(**json.loads(line)) for line in lines]


def add_outcome(path: Path, outcome: Outcome) -> None:
    """Adds a line, after what a killed process may have left of one."""
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])
    with path.open("a") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """A table for each cell, the best arm by likeness plus right less drift; and where `auto` is behind it."""
    lines: list[str] = []
    cells = dict.fromkeys((o.base, o.layers, o.steps, o.batch_size) for o in outcomes)
    for cell in cells:
        own = [o for o in outcomes if (o.base, o.layers, o.steps, o.batch_size) == cell]
        lines += ["", f"**{own[0].base_name}, {cell[1]}**: {cell[2]} steps of batch {cell[3]}", ""]
        arms = {arm: {(o.subject, o.seed): o for o in own if o.arm == arm} for arm in dict.fromkeys(o.arm for o in own)}
        lines += _cell_table(arms)
    return lines[1:]


def _cell_table(arms: Mapping[str, Mapping[tuple[str, int], Outcome]]) -> list[str]:
    """Rows of the arms; those of fewer subjects than the widest one are compared with that one over their own."""
    columns = ("subject", "right", "drift", "preservation")
    lines = ["| arm | rate | runs | likeness | right | drift | preservation | less auto: likeness | drift |"]
    lines.append("|---" * 9 + "|")
    auto = arms.get(AUTO, {})
    behind = []
    for arm, runs in arms.items():
        values = {column: _mean(o.scores[column] for o in runs.values()) for column in columns}
        shared = runs.keys() & auto.keys()
        less = {
            column: _mean(_difference(runs[key].scores[column], auto[key].scores[column]) for key in shared)
            for column in BEHIND
        }
        rate = mean(o.rate for o in runs.values())
        row = [arm, f"{rate:.3g}", str(len(runs)), *(number(values[c]) for c in columns)]
        lines.append("| " + " | ".join([*row, *(number(less[column]) for column in BEHIND)]) + " |")
        if arm != AUTO and shared:
            behind.append((arm, shared, less))
    if best := _best(arms, auto, behind):
        lines += ["", best]
    return lines


def _best(arms: Mapping[str, Any], auto: Mapping[Any, Outcome], behind: Sequence[tuple[str, Any, Any]]) -> str:
    """What is to be said of `auto` beside the best arm over the subjects that both have finished."""
    gains = {
        arm: _mean(_points(arms[arm][key]) - _points(auto[key]) for key in shared) or 0.0 for arm, shared, _ in behind
    }
    if not gains:
        return ""
    arm = max(gains, key=lambda name: gains[name])
    if gains[arm] <= 0:
        return f"{AUTO} is the best of these."
    shared, less = next((keys, own) for name, keys, own in behind if name == arm)
    lacks = [
        f"{abs(less[column]):.3f} of {'likeness' if column == 'subject' else column}"
        for column, most in BEHIND.items()
        if less[column] is not None and (less[column] if column == "subject" else -less[column]) > most
    ]
    said = f"behind by {' and '.join(lacks)}" if lacks else "not behind by more than it may"
    return f"{AUTO} beside {arm}, the best of these over {len(shared)} runs: {said}."


def _points(outcome: Outcome) -> float:
    scores = outcome.scores
    fit = scores["prompt"] if scores["right"] is None else scores["right"]
    return float(scores["subject"] or 0) + float(fit or 0) - float(scores["drift"] or 0)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="file of finished runs, which grows")
    parser.add_argument("--bases", nargs="+", default=[TOYBOX], help="toybox, or folders of bases of its world")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--subjects", nargs="+", default=[*TOYBOX_TUNING, *TOYBOX_TEST])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--table", action="store_true", help="only show what is finished")
    options = parser.parse_args()
    if not options.table:
        features, untouched = open_features(TOYBOX, None, None, default_device()), {}
        for seed, subject, layers, place, arm in product(
            options.seeds, options.subjects, options.layers, options.bases, options.arms
        ):
            run = Run(opened(place).digest, layers, arm, subject, seed, options.steps, options.train_batch_size)
            if any(asdict(run).items() <= asdict(done).items() for done in read_outcomes(options.results)):
                continue
            outcome = make(run, place, features, untouched)
            add_outcome(options.results, outcome)
            print(json.dumps(asdict(outcome)), flush=True)
    print("\n".join(table(read_outcomes(options.results))))


if __name__ == "__main__":
    main()
