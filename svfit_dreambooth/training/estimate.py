"""How much memory a run will need, before it starts.

Activations are counted, not guessed: the denoiser runs once on PyTorch's fake tensors, which have shapes but no numbers,
and every tensor that it keeps for the backward pass is added up.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from svfit_dreambooth.bases.devices import MIXED_PRECISION, default_device
from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.bases.quantizing import BYTES, block_layers
from svfit_dreambooth.method.decomposition import matrix_shape
from svfit_dreambooth.method.one_sided import basis_numbers
from svfit_dreambooth.method.targets import apply_svfit
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.counting import Living, default_dtype, kept_for_backward
from svfit_dreambooth.training.keep_base import EXAMPLES
from svfit_dreambooth.training.plan import Plan
from svfit_dreambooth.training.slim import slim

WORKSPACE = 1.15  # peak over sum, measured on the SD 1.5 architecture: gradients of activations, fragments
COUNTED_OPTIONS = ("mixed_precision", "train_batch_size", "rank", "energy", "gradient_checkpointing")
RANKS = (256, 64, 16)  # lower ones that are suggested
RUNTIME = 600_000_000  # bytes of torch, diffusers and a device context themselves


@dataclass
class Estimate:
    """Bytes that a run will need at its peak."""

    networks: int  # denoiser, text encoders and autoencoder, those that stay on the device, in the precision of each
    bases: int  # directions of every adapted layer
    activations: int  # kept for the backward pass
    answers: int  # of the base, that `keep_base` keeps, where they lie on the same device
    available: int | None  # free on the device before the base was opened, which the rest counts; None: unknown
    suggestion: str | None = None  # what would make it fit
    parameters: tuple[str, ...] = ()  # that the suggestion names
    before: dict[str, int] = field(default_factory=dict)  # what is opened and let go before the steps: bytes of each

    @property
    def phases(self) -> dict[str, int]:
        """The peaks of what comes one after the other."""
        peaks = {**self.before, "steps": self.networks + self.bases + self.activations + self.answers}
        return {name: round(WORKSPACE * size) + RUNTIME for name, size in peaks.items()}

    @property
    def total(self) -> int:
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        return self.available is None or self.total <= self.available

    def lines(self) -> list[str]:
        """The estimate in plain words."""
        parts = {"networks": self.networks, "bases": self.bases, "activations": self.activations}
        parts |= {"the base's answers": self.answers} if self.answers else {}
        text = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        if self.before:
            text = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in self.phases.items()) + f": {text}"
        line = f"memory: about {self.total / 1e9:.1f} GB ({text})"
        if self.available is not None:
            line += f", {self.available / 1e9:.1f} GB are free"
        return [line] if self.fits else [line, f"this will hardly fit: {self.suggestion}"]


def estimate_memory(plan: Plan) -> Estimate:
    """What `plan` will need, and a suggestion where that is more than is free on the device that it will use."""
    estimate = _estimate(plan, plan.config)
    if not estimate.fits:
        changes = _changes(plan)
        estimate.suggestion, estimate.parameters = _suggestion(plan, changes), tuple({option for option, _ in changes})
    return estimate


def _suggestion(plan: Plan, changes: list[tuple[str, Any]]) -> str:
    """Each option that by itself would make the run fit, with the mildest such value; else as many as it takes."""
    alone: dict[str, Any] = {}
    for option, value in changes:
        if option not in alone and _fits(plan, {option: value}):
            alone[option] = value
    if alone:
        return f"use {'one of ' if len(alone) > 1 else ''}{', '.join(_words(alone))}."
    together: dict[str, Any] = {}
    for option, value in changes:
        together[option] = value
        if _fits(plan, together):
            return f"use {' '.join(_words(together))}."
    tried = f"even {' '.join(_words(together))} is too much, " if together else ""
    return f"{tried}use a machine with more memory or a smaller base."


def _changes(plan: Plan) -> list[tuple[str, Any]]:
    """Options and values that need less memory, those first that cost least."""
    config = plan.config
    most = max((min(shape) for shape in plan.shapes.values()), default=0)
    most = most if config.rank_value == "full" else min(most, config.rank_value)
    smaller = (config.resolution or 0) * 3 // 4 // 64 * 64
    changes = [
        *([("validation_steps", 0)] if default_device().type != "cpu" else []),
        ("gradient_checkpointing", True),
        ("mixed_precision", "bf16"),
        ("train_batch_size", 1),
        # on small bases there is little to quantise
        *([("quantize", "int8"), ("quantize", "nf4")] if plan.base.family.values_per_layer is not None else []),
        *(("rank", str(rank)) for rank in RANKS if rank < most),
        *([("resolution", smaller)] if smaller else []),
    ]
    given = {"quantize": ("nf4",), "mixed_precision": ("fp16",)}  # than which the others need no less
    return [
        (option, value)
        for option, value in changes
        if getattr(config, option) != value and getattr(config, option) not in given.get(option, ())
    ]


def _fits(plan: Plan, changes: dict[str, Any]) -> bool:
    choosers: dict[str, Any] = {"budget": None, "energy": None}  # of the values, beside a rank
    beside = choosers if "rank" in changes else {}
    return _estimate(plan, dataclasses.replace(plan.config, **changes, **beside)).fits


def _words(options: dict[str, Any]) -> list[str]:
    return [name if value is True else f"{name} {value}" for name, value in options.items()]


def _estimate(plan: Plan, config: TrainConfig) -> Estimate:
    size = MIXED_PRECISION[config.mixed_precision].itemsize
    aside = config.validation_steps == 0 and default_device().type != "cpu"  # on the CPU, as `run.step_aside` has it
    before = _before(plan, config)
    networks = 0
    for component, module in {"vae": plan.base.pipeline.vae, **plan.base.family.networks}.items():
        if before and component not in plan.trained and not (component == "vae" and config.validation_steps):
            continue
        parameters = _weights(module)
        if component in plan.trained:
            networks += round(parameters * size - _spared(plan, config, component) * size)
        elif not aside:
            networks += parameters * 4
    bases = 0
    for shape in plan.shapes.values():
        bases += basis_numbers(*_sizes(shape, config), config.quantize or "float") * size
    return Estimate(
        networks, bases, _activations(plan, config), _answers(plan, config), plan.free_memory, before=before
    )


def _before(plan: Plan, config: TrainConfig) -> dict[str, int]:
    """What a base that is opened one network at a time needs before the steps; nothing of others, whose networks stay."""
    family = plan.base.family
    if family.adaptable_text_encoders:
        return {}
    encoders, vae = family.text_encoders.values(), family.pipeline.vae
    size = 4 if config.mixed_precision == "no" else 2  # as `answers.ask_prompts` opens them
    phases = {
        "prompts": size * sum(parameter.numel() for encoder in encoders for parameter in encoder.parameters()),
        "photos": 4 * sum(parameter.numel() for parameter in vae.parameters()) + _most_living(family, config),
    }
    if config.quantize is not None and default_device().type == "cpu":  # where it is whole until it is quantised
        phases["quantising"] = MIXED_PRECISION[config.mixed_precision].itemsize * _weights(family.denoiser)
    return phases


def _most_living(family: Family, config: TrainConfig) -> int:
    """Bytes of the tensors that are there at once, at most, while the autoencoder encodes a square picture."""
    pipeline, resolution = copy.copy(family.pipeline), int(config.resolution or family.resolution)
    with FakeTensorMode():
        pipeline.vae = type(pipeline.vae).from_config(pipeline.vae.config)
        pictures = torch.empty(1, 3, resolution, resolution)
        with Living() as living:
            type(family)(pipeline).encode_images(pictures)
    return living.most


def _answers(plan: Plan, config: TrainConfig) -> int:
    """Bytes of what `KeptBase` keeps, which is on the CPU."""
    if not config.keep_base or default_device().type != "cpu":
        return 0
    with FakeTensorMode():
        latents = plan.base.family.stand_in(1, int(config.resolution or plan.base.resolution))[0]
    return EXAMPLES * latents.numel() * MIXED_PRECISION[config.mixed_precision].itemsize


def _weights(module: nn.Module) -> int:
    """How many weights a network has, of which some may be packed."""
    packed = {
        id(layer.weight): math.prod(matrix_shape(layer)) for layer in module.modules() if isinstance(layer, nn.Linear)
    }
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in module.parameters())


def _spared(plan: Plan, config: TrainConfig, component: str) -> float:
    """How many weights of a network, in the precision of the run, quantising makes up for."""
    family = plan.base.family
    if config.quantize is None or component != family.denoiser_name:
        return 0.0
    layers = (family.denoiser.get_submodule(name) for name in block_layers(family.denoiser, family))
    size = MIXED_PRECISION[config.mixed_precision].itemsize
    return sum(math.prod(matrix_shape(layer)) for layer in layers) * (1 - BYTES[config.quantize] / size)


def _sizes(shape: tuple[int, int], config: TrainConfig) -> tuple[int, int, int]:
    """Rows and columns of a weight, and how many of its directions the run keeps, or at most.

    A budget is shared out at full rank: that is when memory is needed most.
    """
    out, into = shape
    return out, into, min(out, into) if config.rank_value == "full" else min(out, into, config.rank_value)


_counted: dict[str, int] = {}  # what `_activations` found, by all that it depends on: counting takes a second


def _activations(plan: Plan, config: TrainConfig) -> int:
    """Bytes kept for the backward pass of one batch of square pictures; the text encoders' share is small beside."""
    family, resolution = plan.base.family, int(config.resolution or plan.base.resolution)
    options = [getattr(config, name) for name in COUNTED_OPTIONS]
    with FakeTensorMode():
        inputs = repr(family.stand_in(1, resolution))
    key = repr((type(family.denoiser), family.denoiser.config, inputs, plan.shapes, options))
    if key not in _counted:
        _counted[key] = _count_activations(plan, config, resolution)
    return _counted[key]


def _count_activations(plan: Plan, config: TrainConfig, resolution: int) -> int:
    family = plan.base.family
    dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16
    with FakeTensorMode(), default_dtype(dtype):
        denoiser = type(family.denoiser).from_config(family.denoiser.config).train()
        layers = {
            name.partition(".")[2]: shape for name, shape in plan.shapes.items() if family.role(name) == "denoiser"
        }
        basis = {}
        for name, shape in layers.items():
            out, into, rank = _sizes(shape, config)
            basis[name] = (torch.empty(out, rank), torch.empty(rank), torch.empty(rank, into))
        shifts = apply_svfit(denoiser, target_modules=list(layers), basis=basis)
        for shift in shifts.values():
            shift.requires_grad_(True)
        slim(denoiser)
        inputs = family.stand_in(config.train_batch_size, resolution)
        with kept_for_backward(denoiser, family.checkpointed, config.gradient_checkpointing) as count:
            family.predict(denoiser, *inputs)
    return count()
