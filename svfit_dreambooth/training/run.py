"""Photos to adapter: the training loop, a plain function that anyone can call.

Each training example follows from the seed and its number alone (see denoising.py): the same run gives the same
adapter, and several processes share the work of one.
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list

from svfit_dreambooth.adapter.describe import base_metadata
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.devices import MIXED_PRECISION
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.features import Features, open_features
from svfit_dreambooth.files import write_atomically
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.method.targets import get_shifts, remove_svfit
from svfit_dreambooth.sharing.hub import check_login
from svfit_dreambooth.training.budget import choose_positions, narrowed, spread
from svfit_dreambooth.training.checkpoints import TrainState, delete_later, restore, resume_state, run_identity
from svfit_dreambooth.training.config import TrainConfig, config_to_yaml
from svfit_dreambooth.training.curves import plot_run
from svfit_dreambooth.training.estimate import estimate_memory
from svfit_dreambooth.training.events import End, Start
from svfit_dreambooth.training.examples import encode_examples
from svfit_dreambooth.training.loop import Loop, Step, stop_signals
from svfit_dreambooth.training.objective import Denoiser
from svfit_dreambooth.training.plan import Run, prepare
from svfit_dreambooth.training.result import (
    TrainResult,
    at_the_end,
    finish,
    is_out_of_memory,
    publish,
    save_result,
    training_record,
    warned,
)
from svfit_dreambooth.training.slim import spare_memory, spend_memory
from svfit_dreambooth.training.trainable import patch_run
from svfit_dreambooth.training.watch import Watch
from svfit_dreambooth.training.words import learn_words, learned_words, remove_words, word_rows

logger = logging.getLogger(__name__)

PATIENCE = timedelta(hours=24)  # of processes that wait while the first paints class pictures or looks


def train(config: TrainConfig, on_step: Callable[[Step], bool | None] | None = None) -> TrainResult:
    """Trains an adapter as `config` says and saves it as <output_dir>/<adapter_name>.safetensors.

    `on_step` is called after every optimizer step; a true value ends the run there: a checkpoint is written, and what
    was learnt is saved.  Ctrl-C and SIGTERM do the same.  What an earlier run left in <output_dir> is moved to
    <output_dir>/earlier.  Raises SVFitError for input that cannot be used, before anything slow starts, and for
    `dry_run`, which asks for no training.
    """
    if config.dry_run:
        raise SVFitError("dry_run asks for no training: use prepare(config).report(), as the command does.")
    accelerator = _accelerator(config)
    try:
        run = prepare(config)
        features = Features()
        if accelerator.is_main_process:  # what may be missing is found out now, not after the hours of training
            if config.push_to_hub:
                check_login()
            if run.config.validation_steps:
                features = open_features(run.base.name, config.dino_path, config.clip_path, accelerator.device)
        with run.folder.locked() if accelerator.is_main_process else nullcontext():
            return _train(run, accelerator, features, on_step)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SVFitError(
            "out of memory: go on with resume_from_checkpoint latest and validation_steps 0 or "
            "gradient_checkpointing, or start anew with mixed_precision bf16, a smaller train_batch_size (with "
            "gradient_accumulation_steps for the same result) or a smaller resolution.",
            "resolution",
        ) from error
    finally:
        accelerator.free_memory()


def _train(
    run: Run, accelerator: Accelerator, features: Features, on_step: Callable[[Step], bool | None] | None
) -> TrainResult:
    config, family = run.config, run.base.family
    identity = run_identity(run, accelerator.num_processes)
    resumed = resume_state(run, identity)
    if accelerator.is_main_process:
        _open_folder(run, resumed)
    if accelerator.is_main_process:
        for line in run.report():
            logger.info(line)
        estimate = estimate_memory(run)
        for line in estimate.lines():
            logger.log(logging.INFO if estimate.fits else logging.WARNING, line)
    with accelerator.main_process_first():  # it paints class pictures, the others then find them
        examples = encode_examples(run, accelerator.device)
    if config.with_prior_preservation:
        identity = run_identity(run, accelerator.num_processes)  # with the class pictures that are there by now
    dtype = MIXED_PRECISION[config.mixed_precision]
    of_word = word_rows(family, config.learned_word)  # before the networks are cast
    whole, positions = run, None
    _step_aside(run, accelerator)
    if config.budget is not None:
        chosen = None  # by one process: rounding must not give others different layers
        if accelerator.is_main_process:
            chosen = choose_positions(run, examples, accelerator.device, dtype)
        (positions,) = broadcast_object_list([chosen])
        run = narrowed(whole, positions)
    with accelerator.main_process_first():  # it decomposes, the others then find the bases
        shifts = patch_run(run, positions)
    # hashed at the start already, unless a budget left layers out or a word came in
    known = positions is None and not of_word
    base_fingerprint = identity["base"] if known else fingerprint(run.weights | of_word, run.hashes)
    for each in (whole, run):
        each.release_weights()
    words = learn_words(family, config.learned_word, run.initial)
    networks = _place(run, accelerator)
    model = Denoiser(run, examples, networks, dtype=dtype, device=accelerator.device)
    values = {f"{component}.{name}": shift for component in shifts for name, shift in shifts[component].items()}
    rates = {name: config.rate_of(family.role(name)) for name in values}
    values |= words
    rates |= dict.fromkeys(words, config.learned_word_lr)
    watch = Watch(run, features) if config.validation_steps else None
    loop = Loop(
        config, accelerator, model, [networks[component] for component in run.trained], values, rates, identity, watch
    )

    accelerator.init_trackers("svfit", config={k: str(v) for k, v in dataclasses.asdict(config).items()})
    count = sum(value.numel() for name, value in values.items() if name not in words)
    loss_before = model.fixed_loss()
    if not any(isinstance(event, Start) for event in run.folder.events()):
        loop.note(Start(time.time(), 0, config.max_train_steps, run.adapter_name, run.base.name, count))
    if resumed is None:
        loop.look(loss_before)
    else:
        loop.go_to(resumed)
    started, first = time.perf_counter(), loop.step
    stopped, failure = _run_loop(loop, on_step)
    seconds = time.perf_counter() - started
    if loop.step == 0 and failure:
        loop.note(End("failed", time.time(), 0, str(failure)))
        raise failure
    if loop.step > first and failure is None:
        loop.save()
    kept = loop.step
    if loop.best is not None and config.keep == "best" and not stopped and failure is None:
        kept = loop.best.step
        restore(TrainState(kept, loop.best.values), values, loop.raw_optimizer)
    loss_after = model.fixed_loss() if failure is None else None

    learnt = {
        f"{component}.{name}": shift
        for component in shifts
        for name, shift in get_shifts(family.components[component]).items()
    }
    adapter = Adapter(
        shifts=learnt if positions is None else spread(learnt, positions),
        base_model=run.base.name,
        base_fingerprint=base_fingerprint,
        instance_prompt=config.instance_prompt,
        class_prompt=config.class_prompt,
        training=training_record(run, accelerator.num_processes, loop.step, kept, loss_before, loss_after),
        title=run.adapter_name,
        architecture=run.base.architecture,
        metadata=base_metadata(run.base.architecture, run.base.resolution, run.base.pipeline.scheduler.config),
        learned_words=learned_words(family, config.learned_word, words),
    )
    if accelerator.is_main_process:
        save_result(adapter, run.adapter_path, config)
        with warned("curve.png is missing", run.adapter_path):
            plot_run(run.folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    for component in shifts:
        module = family.components[component]
        remove_svfit(module)
        spend_memory(module)
        module.eval()
    remove_words(family)
    result = TrainResult(
        run.adapter_path, loop.step, kept, seconds, count, run.adapter_path.stat().st_size, loss_before, loss_after,
        stopped, run,
    )  # fmt: skip
    if not stopped and failure is None and accelerator.is_main_process:
        finish(result)
    status = "failed" if failure is not None else "stopped" if stopped else "finished"
    message = None if failure is None else str(failure)
    loop.note(End(status, time.time(), loop.step, message, kept, run.adapter_path.name, **at_the_end(result)))
    if failure is not None:
        raise SVFitError(f"{failure} What was learnt until step {loop.step} is saved in {run.adapter_path}.")
    if not stopped and accelerator.is_main_process:
        publish(result)
    return result


def _accelerator(config: TrainConfig) -> Accelerator:
    AcceleratorState._reset_state()  # or a second run in one process could not have another precision
    try:
        return Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=config.report_to,
            project_dir=str(Path(config.output_dir) / "logs"),
            # U and Vh are buffers, equal everywhere; and processes may call the denoiser a different number of times
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    except ValueError as error:
        raise SVFitError(f"mixed_precision {config.mixed_precision} and report_to {config.report_to} do not work "
                         f"on this machine ({error}): use bf16 or no, and a tracker that is installed.") from error  # fmt: skip


def _open_folder(run: Run, resumed: TrainState | None) -> None:
    """Makes the run folder ready: another run is moved aside, one that goes on loses what it will make again."""
    folder, asked = run.folder, run.config.resume_from_checkpoint
    goes_on = asked == "latest" or (asked is not None and Path(asked).resolve().parent == folder.checkpoints.resolve())
    if goes_on and resumed is not None:
        folder.rewind(resumed.step)
        delete_later(folder.checkpoints, resumed.step)
    elif goes_on and not folder.adapter.exists():
        folder.rewind(-1)
    else:
        aside = folder.set_aside(run.config.init_adapter)
        if aside is not None:
            logger.info("the earlier files in %s lie in %s now.", folder.path, aside)
    write_atomically(folder.config, config_to_yaml(run.config))


def _step_aside(run: Run, accelerator: Accelerator) -> None:
    """Brings what has no part in the steps out of their way: only looks at the run need it on its device."""
    waiting = accelerator.device if run.config.validation_steps else torch.device("cpu")
    run.base.pipeline.vae.to(waiting)
    for component, module in run.base.family.components.items():
        if component not in run.trained:
            module.to(waiting)


def _place(run: Run, accelerator: Accelerator) -> dict[str, Any]:
    """Brings the networks to where they work; returns denoiser and text encoders by name, prepared where they train."""
    config = run.config
    placed: dict[str, Any] = run.base.family.components
    for component in run.trained:
        module = placed[component].to(accelerator.device, MIXED_PRECISION[config.mixed_precision]).train()
        spare_memory(module, config.gradient_checkpointing)
        placed[component] = accelerator.prepare(module)
    return placed


def _run_loop(loop: Loop, on_step: Callable[[Step], bool | None] | None) -> tuple[bool, SVFitError | None]:
    """Runs it to its end; returns whether it was stopped early, and what it failed from."""
    with stop_signals() as asked:
        try:
            return loop.run(on_step, asked), None
        except KeyboardInterrupt:
            if not loop.between_steps:
                loop.go_to(loop.good)
            return True, None
        except SVFitError as error:
            return False, error
