"""Photos to adapter: the training loop, a plain function that anyone can call.

Each training example follows from the seed and its number alone (see denoising.py): the same run gives the same
adapter, and several processes share the work of one.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from svfit_dreambooth.adapter import Adapter, read_adapter, save_adapter
from svfit_dreambooth.attention import apply_svfit, get_shifts, remove_svfit, set_shifts
from svfit_dreambooth.basis import fingerprint, model_basis, same_base
from svfit_dreambooth.config import TrainConfig
from svfit_dreambooth.denoising import Denoiser
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.preparation import Run, encode_examples, prepare

logger = logging.getLogger(__name__)

WEIGHT_DTYPE = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Step:
    """What `on_step` is told after every optimizer step."""

    step: int  # optimizer steps done
    of: int
    loss: float  # mean over the step's examples
    learning_rate: float


@dataclass
class TrainResult:
    """What a run made."""

    adapter_path: Path
    steps: int
    seconds: float  # of the loop alone
    values: int  # singular values trained
    file_bytes: int
    loss_before: float | None  # on fixed noise and timesteps; None: not measured
    loss_after: float | None
    stopped: bool  # by on_step or Ctrl-C, before the last step
    run: Run

    def summary(self) -> str:
        """The run in a few plain lines."""
        lines = [
            f"{self.steps} steps in {self.seconds:.0f} s" + (", stopped early" if self.stopped else ""),
            f"{self.values:,} singular values trained, {self.file_bytes:,} bytes in {self.adapter_path}",
        ]
        if self.loss_before is not None and self.loss_after is not None:
            lines.append(f"loss on fixed noise: {self.loss_before:.4f} before, {self.loss_after:.4f} after")
        return "\n".join(lines)


def train(config: TrainConfig, on_step: Callable[[Step], bool | None] | None = None) -> TrainResult:
    """Trains an adapter as `config` says and saves it as <output_dir>/<adapter_name>.safetensors.

    `on_step` is called after every optimizer step; a true value ends the run there, and what was learnt is saved.
    Ctrl-C does the same.  Raises SVFitError for input that cannot be used, before anything slow starts.
    """
    AcceleratorState._reset_state()  # or a second run in one process could not have another precision
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.gradient_accumulation_steps
        )
    except ValueError as error:
        raise SVFitError(
            f"--mixed_precision {config.mixed_precision} does not work on this machine ({error}): use bf16 or no."
        ) from error
    run = prepare(config)
    config = run.config
    for line in run.report():
        logger.info(line)
    pipeline = run.base.pipeline
    examples = encode_examples(run, accelerator.device)
    shifts, base_fingerprint = _patch(run)
    weight_dtype = WEIGHT_DTYPE[config.mixed_precision]
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    unet.to(accelerator.device, weight_dtype).train()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    pipeline.vae.to("cpu")
    if config.train_text_encoder:
        text_encoder.to(accelerator.device, weight_dtype).train()
        if config.gradient_checkpointing:
            text_encoder.gradient_checkpointing_enable()
    else:
        text_encoder.to("cpu")
    optimizer = torch.optim.AdamW(
        [
            {"params": list(shifts["unet"].values()), "lr": config.learning_rate},
            *(
                [{"params": list(shifts["text_encoder"].values()), "lr": config.text_encoder_lr}]
                if config.train_text_encoder
                else []
            ),
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    if config.train_text_encoder:
        unet, text_encoder, optimizer = accelerator.prepare(unet, text_encoder, optimizer)
        adapted_models = [unet, text_encoder]
    else:
        unet, optimizer = accelerator.prepare(unet, optimizer)
        adapted_models = [unet]
    model = Denoiser(run, examples, unet, text_encoder, accelerator.device, weight_dtype)
    trained = [shift for group in shifts.values() for shift in group.values()]

    loss_before = model.fixed_loss()
    started = time.perf_counter()
    done, stopped, failure = 0, False, None
    bar = tqdm(total=config.max_train_steps, desc="training", unit="step", disable=not accelerator.is_main_process)
    try:
        while done < config.max_train_steps and not stopped:
            losses = []
            for micro in range(config.gradient_accumulation_steps):
                number = done * config.gradient_accumulation_steps + micro
                with accelerator.accumulate(*adapted_models):
                    loss = model.loss(number, accelerator.process_index, accelerator.num_processes).total
                    losses.append(accelerator.reduce(loss.detach(), "mean").item())
                    if not math.isfinite(losses[-1]):  # before it reaches the shifts
                        raise FloatingPointError(f"the loss is {losses[-1]} at step {done + 1}")
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(trained, config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            rate = schedule.get_last_lr()[0]
            schedule.step()
            done += 1
            mean_loss = sum(losses) / len(losses)
            bar.update()
            bar.set_postfix(loss=f"{mean_loss:.4f}")
            if on_step is not None:
                stopped = bool(on_step(Step(done, config.max_train_steps, mean_loss, rate)))
    except KeyboardInterrupt:
        stopped = True
    except FloatingPointError as error:
        failure = str(error)
    finally:
        bar.close()
    if failure is not None and done == 0:
        raise SVFitError(f"{failure}: use --mixed_precision no, or another base model.")
    seconds = time.perf_counter() - started
    loss_after = model.fixed_loss() if failure is None else None

    values = sum(shift.numel() for shift in trained)
    adapter = Adapter(
        shifts={
            f"{component}.{name}": shift
            for component in shifts
            for name, shift in get_shifts(getattr(pipeline, component)).items()
        },
        base_model=run.base.name,
        base_fingerprint=base_fingerprint,
        instance_prompt=config.instance_prompt,
        class_prompt=config.class_prompt,
        training=_training_record(run, done, loss_before, loss_after),
        title=run.adapter_name,
        architecture=run.base.architecture,
    )
    path = run.adapter_path
    if accelerator.is_main_process:
        save_adapter(adapter, path, getattr(torch, config.save_dtype))
        if not any(shift.any() for shift in read_adapter(path).shifts.values()):
            logger.warning("nothing was learnt, every shift in %s is zero: train longer or with a higher rate.", path)
    accelerator.wait_for_everyone()
    for component in shifts:
        module = getattr(pipeline, component)
        remove_svfit(module)
        module.eval()
    if config.gradient_checkpointing:
        pipeline.unet.disable_gradient_checkpointing()
    accelerator.free_memory()
    if failure is not None:
        raise SVFitError(f"{failure}: lower --learning_rate; what was learnt before is saved in {path}.")
    size = path.stat().st_size
    return TrainResult(path, done, seconds, values, size, loss_before, loss_after, stopped, run)


def _patch(run: Run) -> tuple[dict[str, dict[str, nn.Parameter]], dict[str, Any]]:
    """Puts SVFit layers in; returns the shifts by component and name, and the base's fingerprint."""
    config = run.config
    weights = run.weights
    initial = None if config.init_adapter is None else read_adapter(config.init_adapter)
    if initial is not None:
        _check_initial(initial, weights, config.init_adapter)
    rank: Any = config.rank_value
    bases = model_basis(
        weights,
        rank,
        energy=config.energy,
        cache_dir=None if config.basis_cache_dir is None else Path(config.basis_cache_dir),
    )
    shifts: dict[str, dict[str, nn.Parameter]] = {}
    for component in run.targets:
        module = getattr(run.base.pipeline, component)
        own_bases = {name: bases[f"{component}.{name}"] for name in run.targets[component]}
        shifts[component] = apply_svfit(module, target_modules=run.targets[component], basis=own_bases)
        if initial is not None:
            set_shifts(module, initial.component_shifts(component))
    run.base.pipeline.text_encoder.requires_grad_(False)
    run.base.pipeline.vae.requires_grad_(False)
    if config.train_text_encoder:
        for shift in shifts["text_encoder"].values():
            shift.requires_grad_(True)
    return shifts, fingerprint(weights)


def _check_initial(initial: Adapter, weights: dict[str, Tensor], path: str | None) -> None:
    missing = sorted(set(initial.shifts) - set(weights))
    if missing:
        raise SVFitError(
            f"--init_adapter {path} adapts {missing[0]}, which this run does not train: "
            "use the same --target_modules and --train_text_encoder as its run."
        )
    own = {name: weights[name] for name in initial.shifts}
    if same_base(initial.base_fingerprint, own) == "different":
        raise SVFitError(f"--init_adapter {path} was trained on another base model, {initial.base_model}.")


def _training_record(run: Run, steps: int, loss_before: float | None, loss_after: float | None) -> dict[str, Any]:
    config = run.config
    record: dict[str, Any] = {
        "steps": steps,
        "photos": len(run.photos),
        "batch_size": config.train_batch_size * config.gradient_accumulation_steps,
    }
    for name in ("resolution", "rank", "energy", "learning_rate", "lr_scheduler", "mixed_precision", "seed"):
        record[name] = getattr(config, name)
    if config.train_text_encoder:
        record["text_encoder_lr"] = config.text_encoder_lr
    if loss_before is not None and loss_after is not None:
        record["fixed_loss"] = [round(loss_before, 5), round(loss_after, 5)]
    return record
