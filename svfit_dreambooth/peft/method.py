"""SVFit as a method of PEFT: `get_peft_model(model, SVFitConfig(rank=...))`, `denoiser.add_adapter(SVFitConfig(...))`.

PEFT (https://github.com/huggingface/peft) keeps its methods in four dictionaries under the members of an enum.
Importing this module adds a member SVFIT and files the classes below under it, which is all that PEFT needs for
training, saving, loading, switching and merging.  A saved adapter therefore loads where this module was imported, by
`register()` or with `SVFitConfig`, and nowhere else.

The numbers are those of `SVFitLinear`: W' = W + U diag(shift) Vh, with only `shift` trained and saved.  U and Vh
are decomposed anew from the base at hand, in the canonical form that adapter files use (`basis.canonical_weight`),
so a saved adapter fits float32 and float16 copies of its base alike.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn

from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.method.targets import canonical_name
from svfit_dreambooth.peft.layer import SVFitPeftLinear

NAME = "svfit"


def _add_peft_type() -> None:
    """PeftType.SVFIT: PEFT and transformers ask a config's type for its `.value`, so a plain string will not do."""
    value = NAME.upper()
    if value in PeftType.__members__:
        return
    member = str.__new__(PeftType, value)
    member._name_, member._value_ = value, value
    type.__setattr__(PeftType, value, member)
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member


_add_peft_type()


@dataclass
class SVFitConfig(PeftConfig):  # type: ignore[misc]
    """What to train: the leading singular values of the targeted layers.

    `target_modules`: as everywhere in PEFT.  None takes the attention projections of a diffusers denoiser or a CLIP-like
    encoder (`to_q`, ... or `q_proj`, ..., `out_proj`), and in any other model "all-linear".
    """

    rank: int | str = field(default="full", metadata={"help": 'Singular values to train in a layer, or "full".'})
    energy: float | None = field(
        default=None, metadata={"help": "Choose each rank by its share of the squared singular values; None: rank."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": 'Name endings, a regular expression, or "all-linear"; None: see above.'}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Name endings or a regular expression of layers to leave alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save whole, such as a new classification head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the blocks to adapt; None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list that `layers_to_transform` counts in."}
    )
    ranks: dict[str, int] | None = field(
        default=None, metadata={"help": "Filled in where `energy` chose the ranks, so that loading finds the same."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME.upper()]
        if self.energy is None and self.rank != "full" and (not isinstance(self.rank, int) or self.rank < 1):
            raise SVFitError(f'rank is {self.rank!r}: give a whole number of 1 or more, or "full".')
        if self.energy is not None and not 0 < self.energy <= 1:
            raise SVFitError(f"energy is {self.energy}: give a share above 0 and at most 1.")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]


class SVFitModel(BaseTuner):  # type: ignore[misc]
    """What PEFT calls to put `SVFitPeftLinear`s into a model."""

    prefix = NAME + "_"
    tuner_layer_cls = SVFitPeftLinear

    def _prepare_adapter_config(self, peft_config: SVFitConfig, model_config: Mapping[str, Any]) -> SVFitConfig:
        name = next(name for name, config in self.peft_config.items() if config is peft_config)
        config = copy.copy(peft_config)  # what is filled in here belongs to this model, not to the caller's object
        self.peft_config[name] = config
        if config.target_modules is None:
            config.target_modules = _default_targets(self.model)  # type: ignore[assignment]
        return config

    def _create_and_replace(
        self,
        svfit_config: SVFitConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        layer: Any = target if isinstance(target, SVFitPeftLinear) else SVFitPeftLinear(target, current_key)
        known = (svfit_config.ranks or {}).get(current_key)
        rank, energy = (known, None) if known is not None else (svfit_config.rank, svfit_config.energy)
        if layer is not target:
            layer.set_adapter(self.active_adapters)
        rank = layer.update_layer(adapter_name, rank, energy, svfit_config.inference_mode)
        if energy is not None:
            svfit_config.ranks = {**(svfit_config.ranks or {}), current_key: rank}
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)


def adapter_from_peft(
    components: Mapping[str, nn.Module], base_model: str, adapter_name: str = "default", **described: Any
) -> Adapter:
    """The PEFT adapter `adapter_name` on parts of a pipeline, ready for `save_adapter`: our own, far smaller file.

    `components`: networks by the names that files give them, such as {"text_encoder": pipeline.text_encoder}.  `base_model`: hub id or
    display name of the base.  `described`: further fields of `Adapter`, such as instance_prompt.
    Raises SVFitError where no layer carries that adapter.
    """
    shifts, weights = {}, {}
    for component, model in components.items():
        for path, layer in model.named_modules():
            if isinstance(layer, SVFitPeftLinear) and adapter_name in layer.svfit_shift:
                name = f"{component}.{canonical_name(model, path)}"
                shifts[name] = layer.svfit_shift[adapter_name].detach().cpu().float()
                weights[name] = layer.base_matrix()
    if not shifts:
        raise SVFitError(f"no layer of {', '.join(components)} has an SVFit adapter named {adapter_name!r}.")
    return Adapter(shifts=shifts, base_model=base_model, base_fingerprint=fingerprint(weights), **described)


def _default_targets(model: nn.Module) -> set[str] | str:
    from svfit_dreambooth.bases.families import known_layer_names  # diffusers imports PEFT, and with it this file

    for projections in known_layer_names().attention:
        parts = {projection.partition(".")[0] for projection in projections}
        if any(all(hasattr(module, part) for part in parts) for module in model.modules()):
            return set(projections)
    return "all-linear"


register_peft_method(name=NAME, config_cls=SVFitConfig, model_cls=SVFitModel)
