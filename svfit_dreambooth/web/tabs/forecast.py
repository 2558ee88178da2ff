"""What a run would take: its memory by the base's shapes, its time by earlier runs like it."""

from pathlib import Path
from typing import Any

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.web.rooms.app import App
from svfit_dreambooth.web.rooms.laid_out import photo_files
from svfit_dreambooth.web.rooms.libraries import libraries
from svfit_dreambooth.web.rooms.progress import sum_up
from svfit_dreambooth.web.rooms.workspace import Visitor
from svfit_dreambooth.web.tabs.form import in_form_words

ALIKE = (  # options that a step's time depends on
    "pretrained_model_name_or_path", "preset", "resolution", "train_batch_size", "train_text_encoder", "mixed_precision",
    "gradient_checkpointing", "with_prior_preservation", "keep_base", "quantize",
)  # fmt: skip


def estimate(app: App, visitor: Visitor, options: dict[str, Any]) -> list[str]:
    """What a run would take, in plain lines: memory, and time as far as earlier runs tell.  No weight is read."""
    libraries()
    from svfit_dreambooth.training.estimate import estimate_memory
    from svfit_dreambooth.training.plan import prepare

    if not photo_files(visitor.photos):
        raise SVFitError("there are no photos yet: add 3 to 10 of your subject.")
    options = {"instance_data_dir": str(visitor.photos), "adapter_name": "estimate", **options}
    config = TrainConfig(**options, output_dir=str(visitor.folder), dry_run=True)  # refuses before anything slow
    base = config.pretrained_model_name_or_path
    if not (Path(base).exists() or app.studio.bases.is_here(base)):
        memory = [f"memory: told when {base} is on this disk; a run downloads it first"]
    else:
        memory = estimate_memory(prepare(config, weightless=True)).lines()
    time = time_of_runs_like(app, visitor, options, config.max_train_steps)
    unknown = "told after the first steps, as no run like it has been made on this computer yet"
    return [*map(in_form_words, memory), f"time: {time or unknown}"]


def time_of_runs_like(app: App, visitor: Visitor, options: dict[str, Any], steps: int) -> str | None:
    """How long earlier runs like it took; None where there was none."""
    for job in app.jobs.listed(visitor):
        state = sum_up(app.jobs.run_folder(job))
        if not state.seconds_a_step or any(job.options.get(name) != options.get(name) for name in ALIKE):
            continue
        if state.seconds is not None and state.status == "finished" and state.of == steps:
            return f"about {duration(state.seconds)}, going by {job.name}"
        seconds = steps * state.seconds_a_step
        return f"about {duration(seconds)} for the steps alone, going by {job.name}"
    return None


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
