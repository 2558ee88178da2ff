"""The training command for several subjects."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svfit_dreambooth.commands.wording import printable, with_dashes
from svfit_dreambooth.errors import SVFitError

if TYPE_CHECKING:
    from svfit_dreambooth.subjects.together import Outcome
    from svfit_dreambooth.training.config import TrainConfig
    from svfit_dreambooth.training.plan import Plan

AT_ONCE = 8


def add_subjects(parser: argparse.ArgumentParser) -> None:
    """Adds the options of several subjects to the parser of a run."""
    group = parser.add_argument_group("several subjects")
    group.add_argument(
        "--subjects",
        metavar="FOLDER",
        help="Folder of folders of photos, a subject each, in place of --instance_data_dir; each is trained into its "
        "own folder in --output_dir.  Words: instance_prompt in subject.yaml beside the photos, else {} in "
        "--instance_prompt stands for the folder's name.",
    )
    group.add_argument(
        "--subjects_at_once",
        metavar="N",
        help=f"Subjects that share each step: faster, with memory for as many batches (default: {AT_ONCE}).",
    )


def several(config: "TrainConfig", folders: Sequence[str], given: dict[str, Any]) -> list[Path]:
    """The folders of photos that a command names.  Raises SVFitError where it names them in two ways, or in none."""
    from svfit_dreambooth.subjects.configs import subject_folders

    if "subjects" not in given:
        return [Path(folder).expanduser() for folder in folders]
    if folders or config.instance_data_dir is not None:
        raise SVFitError("subjects and instance_data_dir both name photos: leave one out.", "subjects")
    return subject_folders(given["subjects"])


def at_once(given: dict[str, Any], otherwise: int = AT_ONCE) -> int:
    """How many subjects share each step."""
    text = given.get("subjects_at_once")
    if text is None:
        return otherwise
    if not (text.isdecimal() and 0 < int(text[:6]) < 10**5):
        raise SVFitError(f"subjects_at_once is {text!r}: give a whole number of 1 or more.", "subjects_at_once")
    return int(text)


def train_subjects(config: "TrainConfig", folders: Sequence[str], given: dict[str, Any], names: Iterable[str]) -> None:
    """Trains them, and prints what became of each.  Raises SVFitError in the end where one of them failed."""
    from svfit_dreambooth.subjects.configs import subject_configs
    from svfit_dreambooth.subjects.together import train_all

    configs, refused = subject_configs(several(config, folders, given), config)
    refusals = [f"{each.name}: failed: {each.message}" for each in refused]
    if config.dry_run:
        _print_plans(configs, names)
        print(with_dashes("\n".join(map(printable, refusals)), names))
        return
    outcomes = train_all(configs, at_once(given)) if configs else []
    print(with_dashes("\n".join(map(printable, [*summary(outcomes), *refusals])), names))
    bad = len(refused) + sum(outcome.state == "failed" for outcome in outcomes)
    if bad:
        raise SVFitError(f"{bad} of {len(outcomes) + len(refused)} subjects failed, for the reasons above.")


def summary(outcomes: Sequence["Outcome"]) -> list[str]:
    """What became of each subject, in a plain line each."""
    lines = []
    for outcome in outcomes:
        result = outcome.result
        steps = "" if result is None else f" after {result.steps} steps, step {result.kept_step} kept"
        said = outcome.message if outcome.adapter is None else f"{outcome.adapter}"
        if outcome.adapter is not None and outcome.message is not None:
            said = f"{outcome.message}  Saved: {outcome.adapter}"
        lines.append(f"{outcome.name}: {outcome.state}{steps}: {said}")
    if any(outcome.state == "stopped" for outcome in outcomes):
        lines.append("to go on: the same command with resume_from_checkpoint latest")
    return lines


def print_plan(plan: "Plan", names: Iterable[str]) -> None:
    """The options of a run, all definite, and what it would do."""
    from svfit_dreambooth.training.config import config_to_yaml
    from svfit_dreambooth.training.estimate import estimate_memory

    estimate = estimate_memory(plan)
    print(config_to_yaml(plan.config))
    print(with_dashes("\n".join(plan.report()), names))
    print(with_dashes("\n".join(estimate.lines()), names, estimate.parameters))


def _print_plans(configs: Sequence["TrainConfig"], names: Iterable[str]) -> None:
    from svfit_dreambooth.training.plan import open_run_base, prepare

    base = open_run_base(configs[0]) if configs else None
    for config in configs:
        try:
            print_plan(prepare(config, base=base), names)
        except SVFitError as error:
            print(with_dashes(printable(f"{config.adapter_name}: {error}"), names, error.parameters))
