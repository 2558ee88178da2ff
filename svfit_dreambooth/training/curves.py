"""The curves of a run."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svfit_dreambooth.files import write_atomically
from svfit_dreambooth.training.journal import read_progress


def by_step(events: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The events of one kind, ascending; of a step that was made again after a return to an earlier one, the last."""
    found = {event["step"]: event for event in events if event["event"] == kind}
    return [found[step] for step in sorted(found)]


def plot_run(folder: Path, path: Path) -> Path | None:
    """Draws the loss and the measures of the run in `folder` over its steps; None if it has not made a step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = read_progress(folder)
    steps, measures = by_step(events, "step"), by_step(events, "measure")
    if not steps:
        return None
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([e["step"] for e in steps], [e["loss"] for e in steps], color="0.8", linewidth=0.8)
    window = max(1, len(steps) // 20)
    smooth = [
        sum(e["loss"] for e in steps[max(0, i - window) : i + 1]) / len(steps[max(0, i - window) : i + 1])
        for i in range(len(steps))
    ]
    left.plot([e["step"] for e in steps], smooth, label="loss, running mean")
    for axes, name, label in (
        (left, "fixed_loss", "loss on fixed noise"),
        (right, "subject", "likeness to the photos"),
        (right, "prompt", "fit to the prompts"),
        (right, "drift", "change of other pictures"),
    ):
        points = [(e["step"], e[name]) for e in measures if e.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    for event in events:
        if event["event"] == "rollback":
            left.axvline(event["step"], color="tab:red", linewidth=0.8)
    for axes in (left, right):
        axes.set_xlabel("step")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    if not right.lines:
        right.set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return write_atomically(path, content.getvalue())
