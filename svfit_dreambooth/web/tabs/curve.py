"""The loss of a run, drawn."""

import gradio as gr
import pandas as pd

from svfit_dreambooth.training.curves import loss_lines
from svfit_dreambooth.web.rooms.progress import Progress

COLOURS = ("#9ca3af", "#0d9488", "#d97706")  # of the lines of loss_lines; seen on light and on dark
SHOWN = 400  # points of a line


def loss_plot(progress: Progress, over: bool) -> gr.LinePlot:
    """The loss over the steps; of a run that is over, the title names the step whose values were kept."""
    lines = loss_lines(progress.losses, progress.fixed_losses)
    rows = [
        (step, loss, name) for name, points in lines.items() for step, loss in points[:: max(1, len(points) // SHOWN)]
    ]
    kept = f", kept: step {progress.kept_step}" if over and progress.kept_step else ""
    return gr.LinePlot(
        pd.DataFrame(rows, columns=["step", "loss", "line"]).astype(
            {"step": float, "loss": float}
        ),  # also without rows
        x="step",
        y="loss",
        color="line",
        color_map=dict(zip(lines, COLOURS, strict=True)),
        x_lim=[0, max(progress.of, 1)],
        color_title=" ",
        x_title="step",
        y_title="loss" + kept,
        height=240,
        show_label=False,
        visible=len(progress.losses) > 1,
        elem_id="curve",
    )
