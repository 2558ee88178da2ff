"""What a run leaves: the adapter file, and what is made from it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from svfit_dreambooth.adapter.describe import annotate_adapter
from svfit_dreambooth.adapter.file import Adapter, read_adapter, save_adapter
from svfit_dreambooth.bases.devices import MIXED_PRECISION
from svfit_dreambooth.bases.opening import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.sharing.export import export_lora
from svfit_dreambooth.sharing.hub import push_adapter
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.loop import stop_signals
from svfit_dreambooth.training.plan import Run, open_run_base
from svfit_dreambooth.training.showcase import Showing, show_result

logger = logging.getLogger(__name__)

ALSO_ERROR = 0.1  # of the LoRA that `also` writes: smaller ones lose much, the change is spread over all directions


@dataclass
class TrainResult:
    """What a run made."""

    adapter_path: Path
    steps: int
    kept_step: int  # the step whose values the file holds
    seconds: float  # of the loop alone
    values: int  # singular values trained
    file_bytes: int
    loss_before: float | None  # on fixed noise and timesteps; None: not measured
    loss_after: float | None
    stopped: bool  # by on_step or Ctrl-C, before the last step
    run: Run
    showing: Showing | None = None  # the pictures at the end; None: not painted
    extras: list[str] = field(default_factory=list)  # what else was made, in plain lines

    def summary(self) -> str:
        """The run in a few plain lines."""
        lines = [
            f"{self.steps} steps in {self.seconds:.0f} s" + (", stopped early" if self.stopped else ""),
            f"{self.values:,} singular values trained, {self.file_bytes:,} bytes in {self.adapter_path}",
        ]
        if self.loss_before is not None and self.loss_after is not None:
            lines.append(f"loss on fixed noise: {self.loss_before:.4f} before, {self.loss_after:.4f} after")
        if self.kept_step != self.steps:
            lines.append(f"kept: step {self.kept_step}, the best of those measured (keep last for the last)")
        if self.stopped:
            lines.append("to go on: the same command with resume_from_checkpoint latest")
        if self.showing is not None:
            lines.append(self.showing.summary())
        lines += self.extras
        return "\n".join(lines)


def save_result(adapter: Adapter, path: Path, config: TrainConfig) -> None:
    """Writes the adapter and opens it again; a file that holds the very same already is left alone."""
    fresh = path.with_name(f".{path.stem}.new.safetensors")
    save_adapter(adapter, fresh, getattr(torch, config.save_dtype))
    written = read_adapter(fresh)
    if path.exists() and _same(path, written):
        fresh.unlink()
        return
    os.replace(fresh, path)
    if not any(shift.any() for shift in written.shifts.values()):
        logger.warning("nothing was learnt, every shift in %s is zero: train longer or with a higher rate.", path)


def _same(path: Path, written: Adapter) -> bool:
    try:
        present = read_adapter(path)
    except SVFitError:
        return False  # an unreadable file is replaced
    hashes = [adapter.metadata["payload_sha256"] for adapter in (present, written)]
    return hashes[0] == hashes[1] and present.training == written.training


def training_record(
    run: Run, num_processes: int, steps: int, kept: int, loss_before: float | None, loss_after: float | None
) -> dict[str, Any]:
    """What the file says of its run."""
    config = run.config
    record: dict[str, Any] = {
        "steps": steps,
        **({"kept_step": kept} if kept != steps else {}),
        "photos": len(run.photos),
        "batch_size": config.train_batch_size * config.gradient_accumulation_steps * num_processes,
    }
    for name in ("resolution", "rank", "energy", "budget", "learning_rate", "lr_scheduler", "mixed_precision", "seed"):
        record[name] = getattr(config, name)
    if config.train_text_encoder:
        record["text_encoder_lr"] = config.text_encoder_lr
    if loss_before is not None and loss_after is not None:
        record["fixed_loss"] = [round(loss_before, 5), round(loss_after, 5)]
    return record


def finish(result: TrainResult) -> None:
    """Makes from the saved file what the run was asked for besides: a LoRA, and pictures, which take longer.

    What fails is a warning, and so is what Ctrl-C or SIGTERM cut short; the rest is made all the same.
    """
    run, config = result.run, result.run.config
    run.base.pipeline.to("cpu")
    with stop_signals(at_once=True):
        if config.also is not None:
            with warned(f"there is no LoRA for {config.also}", run.adapter_path):
                result.extras.append(_export(run))
        if config.final_pictures:
            with warned("the pictures at the end are missing", run.adapter_path):
                result.showing = show_result(run, _stored_base(run), MIXED_PRECISION[config.mixed_precision])
                if "modelspec.thumbnail" not in read_adapter(run.adapter_path).metadata:
                    annotate_adapter(run.adapter_path, thumbnail=result.showing.first)
                    result.file_bytes = run.adapter_path.stat().st_size
    if run.base.family.denoiser.device.type != "meta":  # as it stays where its files could not be opened again
        run.base.pipeline.to("cpu")


@contextmanager
def warned(what: str, saved: Path) -> Iterator[None]:
    """Within it full disks, unreadable files, a lack of memory and Ctrl-C are a warning: the adapter is `saved`."""
    try:
        yield
    except (SVFitError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        reason = "out of memory" if is_out_of_memory(error) else str(error).rstrip(".") or "interrupted"
        logger.warning("%s (%s).  The adapter is saved in %s.", what, reason, saved)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a lack of memory, by its type or, as of torch's allocators, by its words."""
    words = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "out of memory" in words or "not enough memory" in words or "can't allocate memory" in words
    )


def _stored_base(run: Run) -> BaseModel:
    """The run's base in float32, with the directions of its files, which training may have rounded.

    Rounded to float16 they are the same (see `basis.canonical_weight`); after bfloat16 the base is opened once more.
    """
    family = run.base.family
    if family.denoiser.dtype == torch.float16:
        family.cast(torch.float32)
    elif family.denoiser.dtype == torch.bfloat16:
        for module in family.pipeline.components.values():
            if isinstance(module, nn.Module):
                module.to("meta")  # makes room, whoever else still holds it
        run.base = open_run_base(run.config)
    return run.base


def _export(run: Run) -> str:
    """Writes the LoRA that --also asks for; returns what it is, in a plain line."""
    config = run.config
    export = export_lora(
        run.adapter_path,
        _stored_base(run),
        run.folder.lora(str(config.also)),
        cast(Literal["kohya", "diffusers"], config.also),
        error=ALSO_ERROR,
        without_words=True,
        overwrite=True,  # of the run that is resumed
        basis_cache_dir=config.basis_cache_dir,
    )
    without = f", without the word {config.learned_word}" if config.learned_word else ""
    return f"LoRA{without}: {export.summary()}; {export.plan.lines()[1]}"


def publish(result: TrainResult) -> None:
    """Uploads the run if it was asked for; after its end is noted, so that the card has the figures."""
    if result.run.config.push_to_hub:
        figures = at_the_end(result).get("figures")
        upload = push_adapter(result.adapter_path, result.run.config.hub_model_id, figures=figures)
        result.extras.append(f"uploaded: {upload.url}")


def at_the_end(result: TrainResult) -> dict[str, Any]:
    """What the last event says of the pictures and figures."""
    showing = result.showing
    if showing is None:
        return {}
    figures = None
    if showing.figures is not None:
        figures = {name: scores.known() for name, scores in showing.figures.items()}
    return {"sheet": showing.sheet.name, "figures": figures}
