"""The networks of a diffusers folder, opened one by one, so that none comes with weights made up at random."""

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn
from transformers import PreTrainedModel

from svfit_dreambooth.bases.family import Family, tokenizer_name
from svfit_dreambooth.bases.quantizing import check_unquantized
from svfit_dreambooth.errors import SVFitError

LIBRARIES = ("diffusers", "transformers")
SHOWN = 3  # names of weights in a message
UNITS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of an autoencoder's config


def open_networks(name: str, folder: Path, family: type[Family], variant: str | None) -> dict[str, Any]:
    """Denoiser, text encoders and autoencoder of the base `name` in `folder`, by name, float32 on the CPU.

    None for a text encoder that the family can do without and the base lacks, and for its tokenizer.
    Raises SVFitError where a file lacks weights of its network or holds others than those.
    """
    index = checked_index(name, folder, family)
    return {
        part: open_network(name, folder, part, class_of(name, part, index), variant)
        for part in network_names(index, family)
    } | absent_parts(index, family)


def outline_networks(name: str, folder: Path, family: type[Family]) -> dict[str, Any]:
    """As `open_networks`, on the meta device: networks with shapes and without numbers."""
    index = checked_index(name, folder, family)
    return {
        part: outline_network(str(folder), part, class_of(name, part, index), local_files_only=True)
        for part in network_names(index, family)
    } | absent_parts(index, family)


def checked_index(name: str, folder: Path, family: type[Family]) -> dict[str, Any]:
    """The model_index.json of the base `name` in `folder`, whose networks `check_part` finds nothing wrong with.

    Raises SVFitError for a text encoder without its tokenizer.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for part in network_names(index, family):
        check_part(name, folder, part, index)
        tokenizer = tokenizer_name(part)
        if part in family.text_encoder_names and not (folder / tokenizer).is_dir():
            raise SVFitError(f"{name} lacks its {tokenizer}, there is no such folder in it: give a whole model folder.")
    return index


def check_part(name: str, folder: Path, part: str, index: Mapping[str, Any]) -> None:
    """Raises SVFitError where the base `name` in `folder` lacks a network, or holds it quantised already."""
    class_of(name, part, index)
    try:
        config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise SVFitError(
            f"{name} lacks its {part}, there is no {part}/config.json in it: give a whole model folder."
        ) from None
    except ValueError as error:
        raise SVFitError(f"the config.json of the {part} of {name} cannot be read ({error}): fetch it again.") from None
    if isinstance(config, dict):
        check_unquantized(name, part, config)


def check_configs(name: str, index: Mapping[str, Any], family: type[Family], **location: Any) -> None:
    """Raises SVFitError for a base of the hub that lacks a network, or holds one quantised already.

    Fetches no more than configs, before anybody downloads gigabytes.  `index`: its model_index.json; `location`: as for
    `hf_hub_download`.  Configs that are not to be had now are passed over: whoever opens the base says so.
    """
    folder = Path(hf_hub_download(name, "model_index.json", **location)).parent
    for part in network_names(index, family):
        try:
            hf_hub_download(name, f"{part}/config.json", **location)
        except LocalEntryNotFoundError:
            continue
        except EntryNotFoundError:
            pass
        check_part(name, folder, part, index)


def network_names(index: Mapping[str, Any], family: type[Family]) -> list[str]:
    """Denoiser, text encoders and autoencoder of a base with the model_index.json `index`."""
    absent = absent_parts(index, family)
    return [part for part in (family.denoiser_name, *family.text_encoder_names, "vae") if part not in absent]


def absent_parts(index: Mapping[str, Any], family: type[Family]) -> dict[str, None]:
    """The text encoders that the family can do without and the base lacks, and their tokenizers."""
    absent = [part for part in family.optional_text_encoders if index.get(part) in (None, [None, None])]
    return dict.fromkeys([*absent, *map(tokenizer_name, absent)])


def open_network(
    name: str, folder: Path, part: str, kind: Any, variant: str | None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The network `part` of the base `name`, of the class `kind`, in `dtype` on the CPU.

    Raises SVFitError where its files lack weights of it or hold others than those: libraries would fill the one with
    random numbers and drop the other.
    """
    module, found = kind.from_pretrained(
        folder / part,
        variant=variant,
        use_safetensors=True,
        dtype=dtype,
        local_files_only=True,
        output_loading_info=True,
    )
    check_keys(name, part, found["missing_keys"], found["unexpected_keys"])
    return module.eval()


def outline_network(source: str, part: str, cls: Any, **location: Any) -> Any:
    """One part of a pipeline: networks empty, tokenizers and schedulers whole."""
    if issubclass(cls, ModelMixin):
        config = cls.load_config(source, subfolder=part, **location)
        check_unquantized(source, part, config)
        with torch.device("meta"):
            return cls.from_config(config)
    if issubclass(cls, PreTrainedModel):
        config = cls.config_class.from_pretrained(source, subfolder=part, **location)
        with torch.device("meta"):
            return cls(config)
    return cls.from_pretrained(source, subfolder=part, **location)


def class_of(name: str, part: str, index: Mapping[str, Any]) -> Any:
    """The class that `index`, the model_index.json of the base `name`, gives a part of it.

    Raises SVFitError for a part that it does not have, and for one of another library: a folder names no code to run.
    """
    library, kind = index.get(part) or (None, None)
    if library not in LIBRARIES:
        raise SVFitError(f"{name} has no {part} in its model_index.json: give a whole model folder.")
    return getattr(importlib.import_module(library), str(kind))


def check_keys(name: str, part: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises SVFitError where the files of a network lack weights of it, or hold others."""
    for found, what in ((sorted(missing), "lacks"), (sorted(unexpected), "holds, beside its own,")):
        if found:
            some = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} others" if len(found) > SHOWN else "")
            raise SVFitError(f"the {part} of {name} {what} {some}: its files do not belong together, fetch it again.")


def check_weights(name: str, family: Family) -> None:
    """Raises SVFitError for weights of the base `name` that are not there, or are no numbers."""
    for part, module in {**family.components, "vae": family.pipeline.vae}.items():
        check_numbers(name, part, module)


def check_numbers(name: str, part: str, module: nn.Module) -> None:
    """The same of one network."""
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
