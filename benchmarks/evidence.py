"""Tables, plot and contact sheet of what `compare_methods.py` has finished.

    python benchmarks/evidence.py [--results benchmarks/comparison] [--plot P.png] [--rates R.png] [--sheet S.png]
    python benchmarks/evidence.py --methods svfit svfit-relative svfit-word --against svfit

Every figure is the mean over subjects of the mean over seeds, with a 95 % bootstrap interval over subjects; a method
counts the subjects that all shown methods have finished, so that the rows can be compared.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from records import TUNING_SEED, Record, read_records
from scipy.stats import bootstrap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from methods import METHODS

from svfit_dreambooth.evaluation.measures import MEASURES
from svfit_dreambooth.files import save_png
from svfit_dreambooth.painting.sheets import contact_sheet
from svfit_dreambooth.training.watch import cut

CHIEF = ("subject", "right", "drift")  # shown with their intervals
NONE = "none"


def final_records(records: Sequence[Record], method: str) -> list[Record]:
    """Its runs on the test subjects, at the rate of its sweep."""
    own = [record for record in records if record.method == method and record.seed != TUNING_SEED]
    rates = {record.rate for record in own}
    return [record for record in own if record.rate == max(rates, key=[r.rate for r in own].count)]


def by_subject(runs: Sequence[Record], step: int, score: str) -> dict[str, float]:
    """The mean over seeds for every subject; without those where it was not measured."""
    values: dict[str, list[float]] = {}
    for run in runs:
        value = run.reading(step).get(score)
        if value is not None:
            values.setdefault(run.subject, []).append(value)
    return {subject: mean(own) for subject, own in values.items()}


def common(table: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """The same with only those subjects and seeds that every method has finished."""
    shared = set.intersection(*({(run.subject, run.seed) for run in runs} for runs in table.values()))
    return {name: [run for run in runs if (run.subject, run.seed) in shared] for name, runs in table.items()}


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of `values` under resampling them (Efron and Tibshirani, 1993)."""
    if len(values) < 2:
        return values[0], values[0]
    interval = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=0).confidence_interval
    return float(interval.low), float(interval.high)


def with_interval(values: Sequence[float]) -> str:
    low, high = bootstrap_interval(values)
    return f"{mean(values):.3f} [{low:.3f}, {high:.3f}]"


def measured(table: dict[str, list[Record]]) -> list[str]:
    """The scores that every run has."""
    readings = [reading for runs in table.values() for run in runs for reading in run.readings.values()]
    return [score for score in MEASURES if all(reading[score] is not None for reading in readings)]


def fit_score(table: dict[str, list[Record]]) -> str:
    """What tells how pictures fit their prompts: the judge's share, else the cosine, else likeness alone."""
    return next((score for score in ("right", "prompt") if score in measured(table)), "subject")


def main_table(table: dict[str, list[Record]], step: int) -> list[str]:
    """Markdown: what each method cost and reached at `step`."""
    scores = measured(table)
    lines = [
        "| method | rate | trained values | file, kB | " + " | ".join(scores) + " |",
        "|---|---|---|---|" + "---|" * len(scores),
    ]
    for name, runs in table.items():
        rate = "" if name == NONE else f"{runs[0].rate:g}"
        cells = []
        for score in scores:
            values = list(by_subject(runs, step, score).values())
            cells.append(with_interval(values) if score in CHIEF else f"{mean(values):.3f}")
        lines.append(
            f"| {name} | {rate} | {runs[0].values:,} | {runs[0].file_bytes / 1e3:,.0f} | {' | '.join(cells)} |"
        )
    return lines


def paired_table(table: dict[str, list[Record]], step: int, against: str) -> list[str]:
    """Markdown: differences from the method `against`, subject by subject."""
    scores = [score for score in ("subject", fit_score(table), "drift") if score in measured(table)]
    lines = [f"| less {against} | {' | '.join(scores)} |", "|---" * (len(scores) + 1) + "|"]
    for name, runs in table.items():
        if name in (against, NONE):
            continue
        cells = []
        for score in scores:
            own, other = by_subject(runs, step, score), by_subject(table[against], step, score)
            cells.append(with_interval([own[subject] - other[subject] for subject in sorted(own)]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def sweep_table(records: Sequence[Record]) -> list[str]:
    """Markdown: subject / right / drift of every rate on the tuning subjects, at the last step."""
    tuning = [record for record in records if record.seed == TUNING_SEED]
    lines = ["| method | rate: subject, right, drift |", "|---|---|"]
    for name in dict.fromkeys(record.method for record in tuning):
        own = [record for record in tuning if record.method == name]
        scored = {rate: mean(r.score() for r in own if r.rate == rate) for rate in {r.rate for r in own}}
        cells = []
        for rate in sorted(scored):
            figures = [
                mean([r.last[score] for r in own if r.rate == rate and r.last[score] is not None] or [float("nan")])
                for score in ("subject", "right", "drift")
            ]
            text = f"{rate:g}: {figures[0]:.2f}, {figures[1]:.2f}, {figures[2]:.2f}"
            cells.append(f"**{text}**" if rate == max(scored, key=lambda r: scored[r]) else text)
        lines.append(f"| {name} | {'; '.join(cells)} |")
    return lines


def plot(table: dict[str, list[Record]], steps: Sequence[int], path: Path) -> None:
    """Likeness against right pictures (left) and against drift (right); a line leads from step to step."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    fit = fit_score(table)
    for axis, score in zip(axes, (fit, "drift"), strict=True):
        for number, (name, runs) in enumerate(table.items()):
            points = [[mean(by_subject(runs, step, s).values()) for step in steps] for s in ("subject", score)]
            colour = "black" if name == NONE else f"C{number % 10}"
            marker = "x" if name == NONE else "os^D"[number % 4]
            axis.plot(*points, color=colour, linewidth=0.8)
            values = [list(by_subject(runs, steps[-1], s).values()) for s in ("subject", score)]
            (left, right), (low, high) = (bootstrap_interval(v) for v in values)
            x, y = points[0][-1], points[1][-1]
            axis.errorbar(
                x, y, xerr=[[x - left], [right - x]], yerr=[[y - low], [high - y]], color=colour, elinewidth=0.6,
                marker=marker, markersize=6, label=name,
            )  # fmt: skip
        axis.set_xlabel(MEASURES["subject"].words)
    axes[0].set_ylabel(MEASURES[fit].words)
    axes[1].set_ylabel(MEASURES["drift"].words)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def plot_rates(records: Sequence[Record], names: Sequence[str], path: Path) -> None:
    """Likeness against drift on the tuning subjects, a line through the rates of each method's sweep.

    Hollow where fewer than four pictures of five are right; the larger mark is the chosen rate.
    """
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, name in enumerate(names):
        own = [record for record in records if record.method == name and record.seed == TUNING_SEED]
        rates = sorted({record.rate for record in own})
        best = max(rates, key=lambda rate: mean(record.score() for record in own if record.rate == rate))
        colour, marker, points = f"C{number % 10}", "os^D"[number // 3 % 4], []
        for rate in rates:
            there = [record.last for record in own if record.rate == rate]
            if any(reading["subject"] is None or reading["drift"] is None for reading in there):
                continue
            points.append((mean(reading["drift"] for reading in there), mean(reading["subject"] for reading in there)))
            ruined = (
                any(reading["right"] is not None for reading in there)
                and mean(reading["right"] or 0 for reading in there) < 0.8
            )
            axis.plot(
                *points[-1], color=colour, marker=marker, markersize=9 if rate == best else 5,
                markerfacecolor="white" if ruined else colour,
            )  # fmt: skip
        axis.plot(*zip(*points, strict=True), color=colour, linewidth=0.8)
        axis.plot([], [], color=colour, marker=marker, label=name)
    axis.set(xscale="log", xlabel=MEASURES["drift"].words, ylabel=MEASURES["subject"].words)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def sheet(table: dict[str, list[Record]], results: Path, step: int, subject: str, path: Path) -> None:
    """One row a method: all its pictures of `subject` at seed 0."""
    rows = []
    for name, runs in table.items():
        for run in runs:
            strip = results / "pictures" / f"{Path(run.job.file_name).stem}-{step}.png"
            if (run.subject, run.seed) == (subject, 0) and strip.exists():
                with Image.open(strip) as image:
                    rows.append((name, cut(image.convert("RGB"), image.width // image.height)))
    whole = contact_sheet(rows, [])
    save_png(whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.LANCZOS).quantize(256), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("comparison"))
    parser.add_argument("--methods", nargs="+", help="default: those of the comparison that have finished a run")
    parser.add_argument("--against", default="lora-8")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rates", type=Path, help="where to plot the sweeps")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--subject", default="dog_patch", help="of the sheet")
    options = parser.parse_args()
    records = read_records(options.results)
    finals = {name: final_records(records, name) for name in dict.fromkeys(record.method for record in records)}
    chosen = options.methods or [name for name, runs in finals.items() if runs and name in METHODS]
    table = common({name: finals[name] for name in sorted(chosen, key=lambda name: finals[name][0].values)})
    steps = sorted(int(step) for step in next(iter(table.values()))[0].readings)
    runs = next(iter(table.values()))
    seeds = sorted({run.seed for run in runs})
    print(
        f"{len({run.subject for run in runs})} subjects, seeds {', '.join(map(str, seeds))}, {len(runs)} runs a method\n"
    )
    for step in steps:
        print(f"## {step} steps\n", *main_table(table, step), "", sep="\n")
        if options.against in table:
            print(*paired_table(table, step, options.against), "", sep="\n")
    print("## Sweeps\n", *sweep_table(records), sep="\n")
    if options.plot is not None:
        plot(table, steps, options.plot)
    if options.rates is not None:
        plot_rates(records, [name for name in table if name != NONE], options.rates)
    if options.sheet is not None:
        sheet(table, options.results, steps[-1], options.subject, options.sheet)


if __name__ == "__main__":
    main()
