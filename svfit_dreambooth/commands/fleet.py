"""`fleet`: many subjects on many workers."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from svfit_dreambooth.commands.wording import printable, with_dashes
from svfit_dreambooth.errors import SVFitError

if TYPE_CHECKING:
    from svfit_dreambooth.fleet.worker import Report
    from svfit_dreambooth.training.config import TrainConfig

OWN = (
    "subjects", "subjects_at_once", "workers", "gpus_per_worker", "cpus_per_worker", "address", "startup_seconds",
)  # fmt: skip
PROG = "python -m svfit_dreambooth fleet"


def add_fleet(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a fleet to the parser of a run, whose other options are those of every subject."""
    group = parser.add_argument_group("fleet")
    group.add_argument("subjects", help="folder of folders of photos, a subject each; see the training command")
    group.add_argument("--workers", metavar="N", help="workers at most (default: one on each GPU; without GPUs, one)")
    group.add_argument("--gpus_per_worker", metavar="X", help="GPUs of each, .5 for two on one (default: 1, if any)")
    group.add_argument("--cpus_per_worker", metavar="N", help="threads of each (default: all, shared out evenly)")
    group.add_argument(
        "--address", help='Ray cluster, HOST:PORT or "auto" (default: this machine, started and ended here)'
    )
    group.add_argument(
        "--startup_seconds", metavar="N", help="for which the cluster and its machines are waited for (default: 0)"
    )
    group.add_argument("--subjects_at_once", metavar="N", help="subjects that share each step of a worker (default: 1)")


def fleet(arguments: Sequence[str], names: set[str]) -> None:
    """Trains them; a line of JSON on standard output for each when it is done, progress and a table on standard error."""
    from tqdm.auto import tqdm

    from svfit_dreambooth.commands.arguments import OPTION_NAMES, parse_runs
    from svfit_dreambooth.commands.subjects import at_once
    from svfit_dreambooth.fleet.cluster import Means
    from svfit_dreambooth.fleet.fleet import run_fleet
    from svfit_dreambooth.fleet.worker import Report
    from svfit_dreambooth.subjects.configs import subject_configs, subject_folders

    names.update((*OPTION_NAMES, *OWN))
    config, _, given = parse_runs(arguments, PROG, add_fleet)
    means = Means(
        _number(given, "workers", int),
        _number(given, "gpus_per_worker", float),
        _number(given, "cpus_per_worker", int),
        given.get("address"),
        at_once(given, 1),
        _number(given, "startup_seconds", float) or 0,
    )
    if config.instance_data_dir is not None:
        raise SVFitError("a fleet's photos are those of its subjects: leave instance_data_dir out.")
    if config.dry_run:
        raise SVFitError("dry_run is for the training command: give it subjects in place of a fleet.", "subjects")
    configs, refused = subject_configs(subject_folders(given["subjects"]), config)
    reports: list[Report] = []
    lines, count = sys.stdout, len(configs) + len(refused)
    # Ray's threads print what happens to workers, which would stand between the lines
    with redirect_stdout(sys.stderr), tqdm(total=count, desc="subjects", unit="subject") as bar:

        def hear(report: Report) -> None:
            reports.append(report)
            with bar.external_write_mode():
                print(printable(json.dumps(report.line())), file=lines, flush=True)
            bar.update()

        for each in refused:
            hear(Report(each.name, "failed", str(each.folder), message=each.message))
        run_fleet(configs, means, hear, lambda under_way: bar.set_postfix_str(progress(under_way)))
    print(with_dashes("\n".join(table(reports)), names), file=sys.stderr)
    bad = sum(report.state == "failed" for report in reports)
    if bad:
        raise SVFitError(f"{bad} of {len(reports)} subjects failed, for the reasons above.")


def progress(under_way: Sequence["TrainConfig"]) -> str:
    """Subjects and their steps."""
    from svfit_dreambooth.fleet.fleet import steps_made

    return ", ".join(f"{config.adapter_name} {steps_made(config)}" for config in under_way)


def table(reports: Sequence["Report"]) -> list[str]:
    """What became of each subject: the bad ones last, and how many there are of each."""
    order = {"finished before": 0, "finished": 1, "stopped": 2, "failed": 3}
    width = max((len(report.subject) for report in reports), default=0)
    lines = []
    for report in sorted(reports, key=lambda each: (order[each.state], each.subject)):
        said = report.message or report.adapter or ""
        lost = f", {report.workers_lost} workers lost" if report.workers_lost else ""
        lines.append(printable(f"{report.subject:<{width}}  {report.state}{lost}  {said}"))
    counts = Counter(report.state for report in reports)
    lines.append(", ".join(f"{counts[state]} {state}" for state in order if counts[state]))
    return [*lines, "to go on: the same command"] if counts["stopped"] else lines


def _number(given: dict[str, Any], name: str, kind: type[int] | type[float]) -> Any:
    """The number above 0 that was given as `name`; None: none was."""
    text = given.get(name)
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < 10**5 and not (name == "gpus_per_worker" and value == 0 and text.strip("0.") == ""):
        raise SVFitError(
            f"{name} is {text!r}: give {'a whole number of 1 or more' if kind is int else 'a number above 0'}.", name
        )
    return value
