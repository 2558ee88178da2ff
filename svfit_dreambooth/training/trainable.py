"""What a run trains: values that lie in the networks of its base, of whatever kind, by one protocol."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from svfit_dreambooth.bases.devices import MIXED_PRECISION
from svfit_dreambooth.method.basis import fingerprint, model_triplets
from svfit_dreambooth.method.targets import apply_svfit, get_shifts, remove_svfit, set_shifts
from svfit_dreambooth.method.weights import chosen, joined
from svfit_dreambooth.training.budget import spread
from svfit_dreambooth.training.optimizer import Steps
from svfit_dreambooth.training.plan import Plan
from svfit_dreambooth.training.slim import spare_memory, spend_memory
from svfit_dreambooth.training.words import learn_words, learned_words, remove_words, word_rows


class Part(Protocol):
    """One kind of trained values.  They keep at least float32, whatever their network is cast to."""

    values: dict[str, nn.Parameter]  # by their names in checkpoints, zero where they are the base
    roles: dict[str, str]  # role of each, by which it is given its rate

    def learnt(self) -> dict[str, Any]:
        """The values as fields of an `Adapter`."""

    def remove(self) -> None:
        """Takes them out of the networks, which are the base's again."""


class Trained(Protocol):
    """All that one run trains: of a `Trainable`, or of several runs in one (see shared.py)."""

    base_fingerprint: dict[str, Any]
    values: dict[str, nn.Parameter]  # by their names in checkpoints
    roles: dict[str, str]
    positions: Mapping[str, Tensor] | None
    steps: Steps  # how far the values move, once that is known

    @property
    def count(self) -> int:
        """Singular values that are trained."""

    def learnt(self) -> dict[str, Any]:
        """The values as fields of an `Adapter`."""


class Shifts:
    """The singular values of the layers that the plan names; of each all, its leading ones, or those at positions."""

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        hashes: Mapping[str, str],
        positions: Mapping[str, Tensor] | None,
    ) -> None:
        """`weights`, `hashes`: of the layers, as they are stored; `positions`: see `choose_positions`."""
        config, family = plan.config, plan.base.family
        self.family, self.positions = family, positions
        bases = model_triplets(
            weights if positions is None else chosen(weights, positions),
            config.rank_value if positions is None else positions,
            energy=config.energy,
            cache_dir=config.basis_cache_dir,
            hashes=hashes,
        )
        self.values: dict[str, nn.Parameter] = {}
        self.components = [component for component in plan.targets if any(_of(component, name) for name in bases)]
        for component in self.components:
            module = family.components[component]
            own = {name.partition(".")[2]: basis for name, basis in bases.items() if _of(component, name)}
            shifts = apply_svfit(module, target_modules=list(own), basis=own)
            if plan.initial is not None:
                set_shifts(module, plan.initial.component_shifts(component))
            self.values |= {f"{component}.{name}": shift for name, shift in shifts.items()}
        self.roles: dict[str, str] = {name: family.role(name) for name in self.values}

    def learnt(self) -> dict[str, Any]:
        shifts = {
            f"{component}.{name}": shift
            for component in self.components
            for name, shift in get_shifts(self.family.components[component]).items()
        }
        return {"shifts": shifts if self.positions is None else spread(shifts, self.positions)}

    def remove(self) -> None:
        for component in self.components:
            remove_svfit(self.family.components[component])


class Word:
    """The embedding of a rare word, in every text encoder."""

    def __init__(self, plan: Plan) -> None:
        self.family, self.word = plan.base.family, plan.config.learned_word
        self.values = learn_words(self.family, self.word, plan.initial)
        self.roles = dict.fromkeys(self.values, "word")

    def learnt(self) -> dict[str, Any]:
        return {"learned_words": learned_words(self.family, self.word, self.values)}

    def remove(self) -> None:
        remove_words(self.family)


class Trainable:
    """All that a run trains, in networks that are ready for it."""

    steps: Steps

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        hashes: Mapping[str, str],
        positions: Mapping[str, Tensor] | None,
        accelerator: Accelerator,
    ) -> None:
        """Puts it into the networks of the base, which come to the device, in the precision of the run.

        `weights`, `hashes`, `positions`: see `Shifts`.
        """
        self.plan, self.accelerator, self.positions = plan, accelerator, positions
        family, word = plan.base.family, plan.config.learned_word
        for frozen in (plan.base.pipeline.vae, *family.networks.values()):
            frozen.requires_grad_(False)
        adapted = weights if positions is None else chosen(weights, positions)
        self.base_fingerprint = fingerprint(joined(adapted, word_rows(family, word)), hashes)
        with accelerator.main_process_first():  # it decomposes, the others then find the bases
            self.parts: list[Part] = [Shifts(plan, weights, hashes, positions)]
        if word is not None:
            self.parts.append(Word(plan))
        self.values = {name: value for part in self.parts for name, value in part.values.items()}
        self.roles = {name: role for part in self.parts for name, role in part.roles.items()}
        for value in self.values.values():
            value.requires_grad_(True)
        self.networks: dict[str, Any] = dict(family.networks)
        for component in plan.trained:
            module = family.components[component].to(accelerator.device, MIXED_PRECISION[plan.config.mixed_precision])
            spare_memory(module.train(), plan.config.gradient_checkpointing)
            self.networks[component] = accelerator.prepare(module)  # where all processes meet

    @property
    def modules(self) -> list[nn.Module]:
        """The networks that hold something trained, as they are called in training."""
        return [self.networks[component] for component in self.plan.trained]

    @property
    def count(self) -> int:
        """Singular values that are trained."""
        return sum(value.numel() for name, value in self.values.items() if self.roles[name] != "word")

    def learnt(self) -> dict[str, Any]:
        """The values as fields of an `Adapter`."""
        return {name: field for part in self.parts for name, field in part.learnt().items()}

    def remove(self) -> None:
        """Leaves the base as it was, but for device and precision."""
        for component in self.plan.trained:
            module = self.accelerator.unwrap_model(self.networks[component], keep_fp32_wrapper=False)
            vars(module).pop("forward", None)  # which accelerate wrapped for mixed precision
            spend_memory(module)
            module.eval()
        for part in self.parts:
            part.remove()


def copies(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values as they are now, on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in values.items()}


@torch.no_grad()
def put_back(values: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> None:
    """Makes `values` what they were when `copies` took them."""
    for name, value in values.items():
        value.copy_(taken[name])


def _of(component: str, name: str) -> bool:
    return name.partition(".")[0] == component
