"""Recipes: values that belong together, for each family of base models.

A preset fills the options that were left open (None in TrainConfig); whatever is given otherwise stands.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from svfit_dreambooth.bases.names import TOYBOX
from svfit_dreambooth.training.config import TrainConfig

# balanced: the default.  fast: a first look.  faithful: more likeness, at the price of more change elsewhere.
# style: for the manner of many pictures rather than the looks of one thing, which wants small steps on all of them.
# How far a step goes follows from the base, see optimizer.py; lengths for Stable Diffusion are choices.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    TOYBOX: {
        # all layers: the convolutions draw most of what tells toys apart, and the file is still small
        "fast": {"max_train_steps": 150, "train_batch_size": 4, "target_modules": ["all"]},
        "balanced": {"max_train_steps": 300, "train_batch_size": 4, "target_modules": ["all"]},
        "faithful": {"max_train_steps": 600, "train_batch_size": 4, "target_modules": ["all"]},
        "style": {"max_train_steps": 600, "train_batch_size": 8},
    },
    # carried over from toybox, with the batch that fits common cards: no weights of Stable Diffusion were at hand
    "stable-diffusion": {
        "fast": {"max_train_steps": 200, "train_batch_size": 1},
        "balanced": {"max_train_steps": 600, "train_batch_size": 1},
        "faithful": {"max_train_steps": 1200, "train_batch_size": 1},
        "style": {"max_train_steps": 1500, "train_batch_size": 2},
    },
}
DEFAULT = "balanced"
TEXT_ENCODER_LR = 2e-3  # beside a number for the denoiser, which takes far more


def preset_names() -> list[str]:
    """The presets by name."""
    return list(PRESETS[TOYBOX])


def with_preset(config: TrainConfig, architecture: str) -> TrainConfig:
    """`config` with its open options filled by its preset for bases of `architecture` (`BaseModel.architecture`)."""
    recipe = PRESETS.get(architecture, PRESETS["stable-diffusion"])[config.preset]
    return _filled(_filled(config, recipe), steps_of(config))


def steps_of(config: TrainConfig) -> dict[str, Any]:
    """What the steps of `config` are where nothing is said: a number that is given means plain, equal steps."""
    if config.learning_rate in (None, "auto"):
        return {"learning_rate": "auto", "text_encoder_lr": "auto", "step_scaling": "sensitivity"}
    return {"text_encoder_lr": TEXT_ENCODER_LR, "step_scaling": "none"}


def _filled(config: TrainConfig, recipe: Mapping[str, Any]) -> TrainConfig:
    return replace(config, **{name: value for name, value in recipe.items() if getattr(config, name) is None})


def with_values(
    config: TrainConfig, values_per_layer: int | None, shapes: Mapping[str, tuple[int, int]]
) -> TrainConfig:
    """`config` with its rank definite: full, or where nothing else is asked for, a budget of `values_per_layer`.

    `values_per_layer`: `Family.values_per_layer`.  `shapes`: of the adapted weights, as matrices.
    """
    if config.rank is not None:
        return config
    budget = None if values_per_layer is None else values_per_layer * len(shapes)
    asked = config.energy is not None or config.budget is not None or config.init_adapter is not None
    if budget is None or asked or budget >= sum(min(shape) for shape in shapes.values()):
        return replace(config, rank="full")
    return replace(config, rank="full", budget=budget)
