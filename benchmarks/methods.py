"""Ways of adapting a UNet, all as one thing: a function that makes some of its numbers trainable and names them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, TinyLoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from svfit_dreambooth.bases.families import apply_svfit, find_projections
from svfit_dreambooth.method.basis import model_basis
from svfit_dreambooth.method.decomposition import as_matrix
from svfit_dreambooth.method.targets import svfit_layers
from svfit_dreambooth.training.budget import allocate, score_values
from svfit_dreambooth.training.examples import Examples
from svfit_dreambooth.training.optimizer import needs_sensitivity
from svfit_dreambooth.training.plan import Plan
from svfit_dreambooth.training.sensitivity import base_sensitivity
from svfit_dreambooth.training.words import learn_words


class Trained(NamedTuple):
    """What a method trains."""

    values: dict[str, nn.Parameter]
    positions: dict[str, Tensor]  # which singular values of a layer these are, (r,); without those that are no choice


PutIn = Callable[[Plan, Examples], Trained]


@dataclass(frozen=True)
class Method:
    """How to adapt `run.base.pipeline.unet`, and the learning rates at which its own sweep begins."""

    put_in: PutIn
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)  # of TrainConfig, where they differ from the common ones


def nothing(run: Plan, examples: Examples) -> Trained:
    """The base as it is."""
    run.base.pipeline.unet.requires_grad_(False)
    return Trained({}, {})


def full(run: Plan, examples: Examples) -> Trained:
    """Every weight."""
    unet = run.base.pipeline.unet.requires_grad_(True)
    return Trained(dict(unet.named_parameters()), {})


def peft(
    make: Callable[[list[str]], PeftConfig], run: Plan, examples: Examples, targets: Sequence[str] | None = None
) -> Trained:
    """An adapter of PEFT on `targets` as `find_projections` takes them; None: the attention projections."""
    unet = run.base.pipeline.unet
    layers = list(find_projections(unet, targets))
    wrapper = get_peft_model(unet, make(layers))  # type: ignore[arg-type]
    run.base.pipeline.unet.__dict__["peft"] = wrapper  # which TinyLoRA keeps its values in; not as a submodule
    return Trained({name: value for name, value in wrapper.named_parameters() if value.requires_grad}, {})


def lora(rank: int, init: bool | str = True, targets: Sequence[str] | None = None) -> PutIn:
    """alpha = rank as in diffusers' scripts; `init` "pissa" starts from the leading singular directions."""

    def make(layers: list[str]) -> PeftConfig:
        return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=init, target_modules=layers)

    return partial(peft, make, targets=targets)


def tinylora(values: int) -> PutIn:
    """`values` numbers a layer, mapped by fixed random matrices into its leading 8x8 singular block."""
    return partial(peft, lambda layers: TinyLoraConfig(r=8, u=values, target_modules=layers))


def svfit(
    targets: Sequence[str] | None = None,
    share: float = 1.0,
    choose: Literal["top", "bottom", "random", "budget"] = "top",
    relative: bool = False,
) -> PutIn:
    """A `share` of the singular values of every layer; `choose` "budget" takes as many where gradients are largest.

    `relative`: steps proportional to the singular value (of mean 1 in each layer) in place of equal steps.
    """
    return partial(_svfit, targets=targets, share=share, choose=choose, relative=relative)


def _svfit(
    run: Plan, examples: Examples, targets: Sequence[str] | None, share: float, choose: str, relative: bool
) -> Trained:
    unet = run.base.pipeline.unet
    weights = {
        name: as_matrix(layer.weight.detach()) for name, (_, _, layer) in find_projections(unet, targets).items()
    }
    positions: dict[str, Tensor] = {}
    for number, (name, weight) in enumerate(weights.items()):
        size = min(weight.shape)
        count = max(1, round(share * size))
        start = {"top": 0, "bottom": size - count}.get(choose, 0)
        positions[name] = torch.arange(start, start + count)
        if choose == "random":
            generator = torch.Generator().manual_seed(1000 * run.config.seed + number)
            positions[name] = torch.randperm(size, generator=generator)[:count].sort().values
    if choose == "budget":
        sensitivity = None
        if needs_sensitivity(run.config):
            sensitivity = base_sensitivity(run.base, run.targets, run.weights(), device=unet.device)
        scores = score_values(run, examples, unet.device, sensitivity=sensitivity)
        chosen = allocate(scores, sum(len(own) for own in positions.values()))
        positions = {name.removeprefix("unet."): own for name, own in chosen.items()}
        weights = {name: weights[name] for name in positions}
    bases = model_basis(weights, positions)
    values = {name: shift for name, shift in apply_svfit(unet, target_modules=list(bases), basis=bases).items()}
    for shift in values.values():
        shift.requires_grad_(True)
    return Trained(_relative(unet, weights, positions) if relative else values, positions)


class _Scaled(nn.Module):
    """shift = scale * value"""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, value: Tensor) -> Tensor:
        return self.scale * value

    def right_inverse(self, shift: Tensor) -> Tensor:
        return shift / self.scale


def _relative(unet: nn.Module, weights: dict[str, Tensor], positions: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    values = {}
    for name, layer in svfit_layers(unet).items():
        S = torch.linalg.svdvals(weights[name])[positions[name]]
        parametrize.register_parametrization(layer, "shift", _Scaled(S / S.mean()))
        values[name] = layer.parametrizations.shift.original
    return values


def with_text_encoder(put_in: PutIn) -> PutIn:
    """The attention projections of the text encoder as well, by SVFit at full rank."""

    def both(run: Plan, examples: Examples) -> Trained:
        encoder = run.base.pipeline.text_encoder
        layers = find_projections(encoder)
        bases = model_basis({name: as_matrix(layer.weight.detach()) for name, (_, _, layer) in layers.items()})
        shifts = apply_svfit(encoder, target_modules=list(bases), basis=bases)
        for shift in shifts.values():
            shift.requires_grad_(True)
        values, positions = put_in(run, examples)
        return Trained(values | {f"text_encoder.{name}": shift for name, shift in shifts.items()}, positions)

    return both


def with_learned_word(put_in: PutIn) -> PutIn:
    """The embedding of the subject's rare word as well."""

    def both(run: Plan, examples: Examples) -> Trained:
        words = learn_words(run.base.family, run.config.learned_word)
        values, positions = put_in(run, examples)
        return Trained(values | {f"text_encoder.{name}": delta for name, delta in words.items()}, positions)

    return both


WIDER, ALL = ("attention", "feed-forward"), ("all",)
USUAL = (2e-2, 5e-2, 1e-1)  # around the best of most kinds of SVFit
SENSITIVE = {"step_scaling": "sensitivity"}
KEPT = {"keep_base": True}
EVERY_LAYER = {"target_modules": ["all"]}
# 1, 2, 5, 10 ...: a sweep that ends at one of its ends goes on
METHODS = {
    "none": Method(nothing, ()),
    "svfit": Method(svfit(), USUAL),
    "svfit-kept": Method(svfit(), USUAL, KEPT),
    "svfit-sensitive": Method(svfit(), USUAL, SENSITIVE),
    "svfit-sensitive-kept": Method(svfit(), USUAL, SENSITIVE | KEPT),
    "svdiff": Method(svfit(ALL), USUAL),
    "svdiff-sensitive": Method(svfit(ALL), USUAL, EVERY_LAYER | SENSITIVE),
    "svdiff-sensitive-kept": Method(svfit(ALL), USUAL, EVERY_LAYER | SENSITIVE | KEPT),
    "svdiff-eighth-budget": Method(svfit(ALL, 1 / 8, "budget"), USUAL, EVERY_LAYER),
    "svdiff-eighth-budget-sensitive": Method(svfit(ALL, 1 / 8, "budget"), USUAL, EVERY_LAYER | SENSITIVE),
    "lora-4": Method(lora(4), (1e-3, 2e-3, 5e-3, 1e-2)),
    "lora-8": Method(lora(8), (1e-3, 2e-3, 5e-3, 1e-2)),
    "lora-8-kept": Method(lora(8), (1e-3, 2e-3, 5e-3, 1e-2), KEPT),
    "lora-4-all": Method(lora(4, targets=ALL), (2e-4, 5e-4, 1e-3, 2e-3)),
    "full": Method(full, (5e-5, 1e-4, 2e-4, 5e-4)),
}
ABLATIONS = {
    "svfit-1/32": Method(svfit(share=1 / 32), USUAL),
    "svfit-eighth-bottom": Method(svfit(share=1 / 8, choose="bottom"), USUAL),
    "svfit-eighth-random": Method(svfit(share=1 / 8, choose="random"), USUAL),
    "svfit-eighth-budget": Method(svfit(share=1 / 8, choose="budget"), USUAL),
    "svfit-half-budget": Method(svfit(share=1 / 2, choose="budget"), USUAL),
    "svfit-half": Method(svfit(share=1 / 2), USUAL),
    "svfit-eighth": Method(svfit(share=1 / 8), (5e-2, 1e-1, 2e-1)),
    "svfit-wider": Method(svfit(WIDER), USUAL),
    "svdiff-half-budget": Method(svfit(ALL, share=1 / 2, choose="budget"), USUAL, EVERY_LAYER),
    "lora-1": Method(lora(1), (2e-3, 5e-3, 1e-2, 2e-2)),
    "lora-1-all": Method(lora(1, targets=ALL), (5e-4, 1e-3, 2e-3, 5e-3)),
    "pissa-8": Method(lora(8, "pissa"), (1e-4, 2e-4, 5e-4, 1e-3)),
    "tinylora": Method(tinylora(64), (1e-2, 2e-2, 5e-2, 1e-1)),
    "svfit-relative": Method(svfit(relative=True), USUAL),
    "svfit-text": Method(with_text_encoder(svfit()), USUAL, {"train_text_encoder": True}),
    "svfit-word": Method(with_learned_word(svfit()), USUAL, {"learned_word": "sks"}),
    "svdiff-word": Method(with_learned_word(svfit(ALL)), USUAL, {"learned_word": "sks"}),
    "svfit-epsilon": Method(svfit(), (2e-2, 5e-2, 1e-1, 2e-1), {"adam_epsilon": 1e-4}),  # small gradients, small steps
    "svdiff-prior": Method(svfit(ALL), USUAL, {"with_prior_preservation": True}),
    "svfit-prior": Method(svfit(), USUAL, {"with_prior_preservation": True}),
}
