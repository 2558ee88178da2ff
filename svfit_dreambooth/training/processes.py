"""The processes and devices of a run, by accelerate."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
)

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.journal import RunFolder

PATIENCE = timedelta(hours=24)  # of processes that wait while the first paints class pictures or looks
# accelerate's environment may ask for ways of training that this loop does not go
OTHER_WAYS = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """What places networks, adds up gradients, scales fp16's loss and logs, for one process of a run.

    The options of the run stand, whatever accelerate's environment says.  Raises SVFitError where that asks for
    another way of training, and for a tracker or precision that is not to be had here.
    """
    _check_environment()
    _check_tracker(config.report_to)
    AcceleratorState._reset_state()  # or a second run in one process could not have another precision
    try:
        return Accelerator(
            mixed_precision=config.mixed_precision,
            # as a plugin, or ACCELERATE_GRADIENT_ACCUMULATION_STEPS would win
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
            dynamo_backend="no",
            log_with=config.report_to,
            project_dir=str(RunFolder(config.output_dir).logs),
            # U and Vh are buffers, equal everywhere; and processes may call the denoiser a different number of times
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    except ValueError as error:
        raise SVFitError(
            f"mixed_precision {config.mixed_precision} does not work on this machine ({error}): use bf16 or no."
        ) from error


@contextmanager
def accelerated(config: TrainConfig) -> Iterator[Accelerator]:
    """`make_accelerator`, whose memory is freed afterwards."""
    accelerator = make_accelerator(config)
    try:
        yield accelerator
    finally:
        accelerator.free_memory()


def _check_environment() -> None:
    for way in OTHER_WAYS:
        name = f"ACCELERATE_USE_{way}"
        if os.environ.get(name, "false").lower() in ("true", "1", "yes"):
            raise SVFitError(
                f"{name} is set, and a few thousand values are not trained that way: unset it, or choose plain "
                "processes in `accelerate config`."
            )


def _check_tracker(name: str | None) -> None:
    if name is None or name == LoggerType.ALL.value:
        return
    known = [kind.value for kind in LoggerType if kind is not LoggerType.ALL]
    if name not in known:
        raise SVFitError(f"report_to is {name!r}, but must be one of: {', '.join(known)}.")
    if name not in {getattr(each, "value", each) for each in get_available_trackers()}:
        raise SVFitError(
            f"report_to {name} needs a package that is not installed: `pip install {name}`, or leave it out."
        )
