"""How the steps of a run ended, and what its file says of it."""

from dataclasses import dataclass
from typing import Any, Literal

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.optimizer import Steps
from svfit_dreambooth.training.plan import Plan


@dataclass(frozen=True)
class Ending:
    """How the steps of a run ended, and what its file says of it."""

    step: int  # the last one made
    kept: int  # the one whose values are in place now
    seconds: float  # of the steps
    loss_before: float | None  # on fixed noise and timesteps; None: not measured
    loss_after: float | None
    stopped: bool = False  # before the last step
    hurried: bool = False  # asked to stop while the last step was made: what takes long after it is left out
    failure: SVFitError | None = None  # numbers that stayed bad; the values are the last good ones

    @property
    def status(self) -> Literal["finished", "stopped", "failed"]:
        return "failed" if self.failure is not None else "stopped" if self.stopped else "finished"


def training_record(plan: Plan, steps: Steps, ending: Ending, num_processes: int) -> dict[str, Any]:
    """What the file says of its run."""
    config = plan.config
    record: dict[str, Any] = {
        "steps": ending.step,
        **({"kept_step": ending.kept} if ending.kept != ending.step else {}),
        "photos": len(plan.photos),
        "batch_size": config.train_batch_size * config.gradient_accumulation_steps * num_processes,
    }
    for name in ("resolution", "rank", "energy", "budget", "learning_rate", "lr_scheduler", "mixed_precision", "seed"):
        record[name] = getattr(config, name)
    if plan.base.vae_name is not None:
        record["vae"] = plan.base.vae_name
    if config.quantize is not None:
        record["quantize"] = config.quantize
    if config.clip_skip:
        record["clip_skip"] = config.clip_skip
    record["learning_rate"] = float(f"{steps.learning_rate:.4g}")  # a number, also where it was left to the base
    if config.step_scaling != "none":
        record["step_scaling"] = config.step_scaling
    if config.train_text_encoder and config.text_encoder_lr != config.learning_rate:
        record["text_encoder_lr"] = config.text_encoder_lr
    if config.keep_base:
        record["keep_base_weight"] = config.keep_base_weight
    if ending.loss_before is not None and ending.loss_after is not None:
        record["fixed_loss"] = [round(ending.loss_before, 5), round(ending.loss_after, 5)]
    return record
