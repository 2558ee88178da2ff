"""What a run leaves: the adapter file, and what is made from it."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

from svfit_dreambooth.adapter.describe import annotate_adapter, base_metadata
from svfit_dreambooth.adapter.file import Adapter, read_adapter, save_adapter
from svfit_dreambooth.bases.devices import MIXED_PRECISION, is_out_of_memory
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.quantizing import empty
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import NotWritten
from svfit_dreambooth.sharing.export import LoraExport, export_lora
from svfit_dreambooth.sharing.hub import push_adapter
from svfit_dreambooth.training.curves import plot_run
from svfit_dreambooth.training.ending import Ending, training_record
from svfit_dreambooth.training.events import End
from svfit_dreambooth.training.plan import Plan, open_run_base
from svfit_dreambooth.training.showcase import Showing, show_result
from svfit_dreambooth.training.signals import stop_signals
from svfit_dreambooth.training.trainable import Trained

logger = logging.getLogger(__name__)

ALSO_ERROR = 0.1  # of the LoRA that `also` writes: smaller ones lose much, the change is spread over all directions


@dataclass
class TrainResult:
    """What a run made."""

    adapter_path: Path
    ending: Ending
    values: int  # singular values trained
    file_bytes: int
    plan: Plan
    # the run's, without what it learnt; opened anew where training had rounded it beyond return.  Where networks are
    # opened one at a time, the text encoders are let go, and only the run's own prompts can be painted.
    base: BaseModel
    showing: Showing | None = None  # the pictures at the end; None: not painted
    extras: list[str] = field(default_factory=list)  # what else was made, in plain lines

    @property
    def steps(self) -> int:
        return self.ending.step

    @property
    def kept_step(self) -> int:
        """The step whose values the file holds."""
        return self.ending.kept

    @property
    def stopped(self) -> bool:
        """By on_step or a signal, before the last step."""
        return self.ending.stopped

    @property
    def loss_before(self) -> float | None:
        """On fixed noise and timesteps; None: not measured."""
        return self.ending.loss_before

    @property
    def loss_after(self) -> float | None:
        return self.ending.loss_after

    def summary(self) -> str:
        """The run in a few plain lines."""
        lines = [
            f"{self.steps} steps in {self.ending.seconds:.0f} s" + (", stopped early" if self.stopped else ""),
            f"{self.values:,} singular values trained, {self.file_bytes:,} bytes in {self.adapter_path}",
        ]
        if self.loss_before is not None and self.loss_after is not None:
            lines.append(f"loss on fixed noise: {self.loss_before:.4f} before, {self.loss_after:.4f} after")
        why = "the last" if self.kept_step == self.steps else "the best of those measured (keep last for the last)"
        lines.append(f"kept: step {self.kept_step}, {why}")
        if self.stopped:
            lines.append("to go on: the same command with resume_from_checkpoint latest")
        if self.showing is not None:
            lines.append(self.showing.summary())
        return "\n".join(lines + self.extras)


def make_adapter(plan: Plan, trainable: Trained, ending: Ending, num_processes: int) -> Adapter:
    """What was learnt, with all that its file says of it."""
    return Adapter(
        **trainable.learnt(),
        base_model=plan.base.name,
        base_fingerprint=trainable.base_fingerprint,
        instance_prompt=plan.config.instance_prompt,
        class_prompt=plan.config.class_prompt,
        training=training_record(plan, trainable.steps, ending, num_processes),
        title=plan.adapter_name,
        architecture=plan.base.architecture,
        metadata=base_metadata(plan.base.architecture, plan.base.resolution, plan.base.family.prediction_type),
    )


def save_result(adapter: Adapter, plan: Plan) -> Path:
    """Writes the adapter and opens it again; returns where it lies.

    A file that holds the very same already is left alone.  On a full disk the run's older checkpoints and its looks
    make room; where that is not enough, the adapter goes into the system's folder for temporary files, and a warning
    says so.  Raises SVFitError where that is full too.
    """
    path, dtype = plan.adapter_path, getattr(torch, plan.config.save_dtype)
    plan.folder.reserve.unlink(missing_ok=True)
    while True:
        try:
            return _write(adapter, path, dtype)
        except NotWritten as error:
            if not plan.folder.make_room():
                reason = error
                break
    place = Path(tempfile.mkdtemp(prefix="svfit-")) / path.name
    try:
        saved = _write(adapter, place, dtype)
    except NotWritten:
        raise SVFitError(
            f"{reason}  The values of the last checkpoint are not lost: make room, and go on with "
            "resume_from_checkpoint latest."
        ) from None
    logger.warning("%s  The adapter is saved in %s: move it from there.", reason, saved)
    return saved


def _write(adapter: Adapter, path: Path, dtype: torch.dtype) -> Path:
    fresh = path.with_name(f".{path.stem}.new.safetensors")
    save_adapter(adapter, fresh, dtype)
    written = read_adapter(fresh)
    if path.exists() and _same(path, written):
        fresh.unlink()
        return path
    os.replace(fresh, path)
    if not any(shift.any() for shift in written.shifts.values()):
        logger.warning("nothing was learnt, every shift in %s is zero: train longer or with a higher rate.", path)
    return path


def _same(path: Path, written: Adapter) -> bool:
    try:
        present = read_adapter(path)
    except SVFitError:
        return False  # an unreadable file is replaced
    hashes = [adapter.metadata["payload_sha256"] for adapter in (present, written)]
    return hashes[0] == hashes[1] and present.training == written.training


def finish(result: TrainResult) -> None:
    """Makes from the saved file what the run was asked for besides: a LoRA, and pictures, which take longer.

    What fails is a warning, and so is what a signal cuts short; the rest is made all the same.
    """
    plan, config, path = result.plan, result.plan.config, result.adapter_path
    with warned("curve.png is missing", path):
        plot_run(plan.folder)
    if result.ending.status != "finished":
        return
    if result.ending.hurried:
        if config.final_pictures or config.also is not None:
            logger.warning("stopped after the last step: pictures and LoRA are left out.")
        return
    result.base.to("cpu")
    lora: LoraExport | None = None
    with stop_signals(at_once=True):
        if config.also is not None:
            with warned(f"there is no LoRA for {config.also}", path):
                lora = _export(result)
        if config.final_pictures:
            with warned("the pictures at the end are missing", path):
                result.base = stored_base(plan, result.base)
                result.showing = show_result(plan, result.base, path, MIXED_PRECISION[config.mixed_precision])
                if "modelspec.thumbnail" not in read_adapter(path).metadata:
                    annotate_adapter(path, thumbnail=result.showing.first)
                    result.file_bytes = path.stat().st_size
                    if lora is not None:
                        lora.show(read_adapter(path))
    if lora is not None:
        result.extras += [f"LoRA: {lora.summary()}; {lora.plan.lines()[1]}", *lora.lines()[1:]]
    result.base.to("cpu")


@contextmanager
def warned(what: str, saved: Path) -> Iterator[None]:
    """Within it full disks, unreadable files, a lack of memory and signals are a warning: the adapter is `saved`."""
    try:
        yield
    except (SVFitError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        reason = "out of memory" if is_out_of_memory(error) else str(error).rstrip(".") or "interrupted"
        logger.warning("%s (%s).  The adapter is saved in %s.", what, reason, saved)


@contextmanager
def plain_memory_errors() -> Iterator[None]:
    """Within it a lack of memory is a sentence that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SVFitError(
            "out of memory: go on with resume_from_checkpoint latest and validation_steps 0 or "
            "gradient_checkpointing, or start anew with mixed_precision bf16, a smaller train_batch_size (with "
            "gradient_accumulation_steps for the same result) or a smaller resolution.",
            "resolution",
        ) from error


def stored_base(plan: Plan, base: BaseModel) -> BaseModel:
    """The run's base with the directions of its files, which training may have rounded; in float32, or as it is stored.

    Rounded to float16 they are the same (see `basis.canonical_weight`); after bfloat16 the base is opened once more,
    and the rounded one is emptied to make room.
    """
    family = base.family
    if base.stored is not None:
        if family.denoiser.dtype not in (torch.float32, base.stored.dtype(family.denoiser_name)):
            base.let_go(family.denoiser_name)
        base.open(family.denoiser_name, "vae")
    elif family.denoiser.dtype == torch.float16:
        family.cast(torch.float32)
    elif family.denoiser.dtype == torch.bfloat16:
        for module in family.pipeline.components.values():
            if isinstance(module, nn.Module):
                empty(module)
        return open_run_base(plan.config)
    return base


def _export(result: TrainResult) -> LoraExport:
    """Writes the LoRA that `also` asks for."""
    plan, config = result.plan, result.plan.config
    result.base = stored_base(plan, result.base)
    return export_lora(
        result.adapter_path,
        result.base,
        plan.folder.lora(str(config.also)),
        cast(Literal["kohya", "diffusers"], config.also),
        error=ALSO_ERROR,
        overwrite=True,  # of the run that is resumed
        basis_cache_dir=config.basis_cache_dir,
    )


def publish(result: TrainResult) -> None:
    """Uploads a finished run if it was asked for; after its end is noted, so that the card has the figures."""
    if result.plan.config.push_to_hub and result.ending.status == "finished":
        figures = end_of(result, time.time()).figures
        upload = push_adapter(result.adapter_path, result.plan.config.hub_model_id, figures=figures)
        result.extras.append(f"uploaded: {upload.url}")


def end_of(result: TrainResult, now: float) -> End:
    """What the run's last event says."""
    ending, showing, path = result.ending, result.showing, result.adapter_path
    at_home = path.parent == result.plan.folder.path
    message = None if ending.failure is None else str(ending.failure)
    figures: dict[str, dict[str, float | None]] | None = None
    if showing is not None and showing.figures is not None:
        figures = {name: dict(scores.known()) for name, scores in showing.figures.items()}
    return End(
        ending.status,
        now,
        ending.step,
        message if at_home else f"{message or ''} The adapter is saved in {path}.".strip(),
        ending.kept,
        path.name if at_home else None,
        None if showing is None else showing.sheet.name,
        figures,
    )
