"""The networks of a diffusers folder, opened one by one, so that none comes with weights made up at random."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from svfit_dreambooth.bases.family import Family, tokenizer_name
from svfit_dreambooth.errors import SVFitError

LIBRARIES = ("diffusers", "transformers")
SHOWN = 3  # names of weights in a message
UNITS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of an autoencoder's config


def open_networks(name: str, folder: Path, family: type[Family], variant: str | None) -> dict[str, Any]:
    """Denoiser, text encoders and autoencoder of the base `name` in `folder`, by name, float32 on the CPU.

    None for a text encoder that the family can do without and the base lacks, and for its tokenizer.
    Raises SVFitError where a file lacks weights of its network or holds others than those: libraries would fill the
    one with random numbers and drop the other.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    opened: dict[str, Any] = {}
    for part in (family.denoiser_name, *family.text_encoder_names, "vae"):
        if part in family.optional_text_encoders and index.get(part) in (None, [None, None]):
            opened |= dict.fromkeys((part, tokenizer_name(part)))
            continue
        network: Any = class_of(name, part, index)
        module, found = network.from_pretrained(
            folder / part,
            variant=variant,
            use_safetensors=True,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
        _check_loaded(name, part, found)
        opened[part] = module.eval()
    return opened


def class_of(name: str, part: str, index: Mapping[str, Any]) -> Any:
    """The class that `index`, the model_index.json of the base `name`, gives a part of it.

    Raises SVFitError for a part that it does not have, and for one of another library: a folder names no code to run.
    """
    library, kind = index.get(part) or (None, None)
    if library not in LIBRARIES:
        raise SVFitError(f"{name} has no {part} in its model_index.json: give a whole model folder.")
    return getattr(importlib.import_module(library), str(kind))


def _check_loaded(name: str, part: str, found: dict[str, Any]) -> None:
    for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "holds, beside its own,")):
        keys = sorted(found[kind])
        if keys:
            some = ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} others" if len(keys) > SHOWN else "")
            raise SVFitError(f"the {part} of {name} {what} {some}: its files do not belong together, fetch it again.")


def check_weights(name: str, family: Family) -> None:
    """Raises SVFitError for weights of the base `name` that are not there, or are no numbers."""
    for part, module in {**family.components, "vae": family.pipeline.vae}.items():
        for path, weight in module.named_parameters():
            if weight.is_meta:
                raise SVFitError(f"the {part} of {name} lacks {path}: give a whole model.")
            if not torch.isfinite(weight.detach().sum(dtype=torch.float64)):
                raise SVFitError(f"the {part} of {name} holds NaN or infinity in {path}: fetch it again.")


def check_latent_unit(name: str, family: Family) -> None:
    """Raises SVFitError where the autoencoder of the base `name` gives its latents no unit that can be reckoned with."""
    config = family.pipeline.vae.config
    try:
        offset, factor = (torch.as_tensor(value, dtype=torch.float64) for value in family.latent_unit())
        sound = bool(offset.isfinite().all() and factor.isfinite().all() and (factor != 0).all())
    except (AttributeError, TypeError, ValueError, RuntimeError):
        sound = False
    if not sound:
        given = {key: value for key, value in config.items() if key in UNITS and value is not None}
        raise SVFitError(f"the autoencoder of {name} has no unit of latents in its config ({given}): fetch it again.")
