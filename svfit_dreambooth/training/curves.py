"""The curves of a run."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from svfit_dreambooth.evaluation.measures import FIXED_LOSS, MEASURES
from svfit_dreambooth.files import write_atomically
from svfit_dreambooth.training.events import Event, Measured, Stepped, WentBack
from svfit_dreambooth.training.journal import RunFolder

Seen = TypeVar("Seen", Stepped, Measured)
Points = Sequence[tuple[int, float]]  # (step, value)

DOTTED: dict[str, Any] = {"marker": "o", "markersize": 3}


def by_step(events: Iterable[Event], kind: type[Seen]) -> list[Seen]:
    """The events of one kind, ascending; of a step that was made again after a return to an earlier one, the last."""
    found = {event.step: event for event in events if isinstance(event, kind)}
    return [found[step] for step in sorted(found)]


def loss_lines(losses: Points, fixed: Points) -> dict[str, Points]:
    """What a drawing of the loss shows: as measured, averaged with the twentieth of the run before, on fixed noise."""
    window = max(1, len(losses) // 20)
    means = [
        (step, fmean(loss for _, loss in losses[max(0, i - window) : i + 1])) for i, (step, _) in enumerate(losses)
    ]
    return {"loss": losses, "running mean": means, FIXED_LOSS.words: fixed}


def plot_run(folder: RunFolder) -> Path | None:
    """Draws the loss and the measures of a run over its steps, as its curve.png; None if it has not made a step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = folder.events()
    steps = [(event.step, event.loss) for event in by_step(events, Stepped) if event.loss is not None]
    measures = by_step(events, Measured)
    if not steps:
        return None
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    looks = {
        name: [(each.step, getattr(each, name)) for each in measures if getattr(each, name) is not None]
        for name in ("fixed_loss", "subject", "prompt", "drift")
    }
    styles: list[dict[str, Any]] = [{"color": "0.8", "linewidth": 0.8}, {}, DOTTED]
    for (label, points), style in zip(loss_lines(steps, looks.pop("fixed_loss")).items(), styles, strict=True):
        if points:
            left.plot(*zip(*points, strict=True), label=label, **style)
    for name, points in looks.items():
        if points:
            right.plot(*zip(*points, strict=True), label=MEASURES[name].words, **DOTTED)
    for event in events:
        if isinstance(event, WentBack):
            left.axvline(event.step, color="tab:red", linewidth=0.8)
    for axes in (left, right):
        axes.set_xlabel("step")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    if not right.lines:
        right.set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return write_atomically(folder.curve, content.getvalue())
