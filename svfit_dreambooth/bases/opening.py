"""Opens base models."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from svfit_dreambooth.bases.autoencoders import open_autoencoder
from svfit_dreambooth.bases.families import family_named
from svfit_dreambooth.bases.hub import reason_of
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.names import DEFAULT_BASE, EMBEDDED_WEIGHTS, as_asked, base_name, is_hub_id
from svfit_dreambooth.bases.networks import (
    check_configs,
    check_latent_unit,
    check_weights,
    open_networks,
    outline_networks,
)
from svfit_dreambooth.bases.quantizing import Quantization, check_library
from svfit_dreambooth.bases.single_file import read_single_file
from svfit_dreambooth.bases.stable_diffusion import StableDiffusion
from svfit_dreambooth.bases.stored import StoredBase
from svfit_dreambooth.bases.tokenizers import check_tokenizers
from svfit_dreambooth.errors import SVFitError

logger = logging.getLogger(__name__)


def check_base_model(name: str, base_config: str | None = None) -> None:
    """Raises SVFitError if `name` cannot be a base model; quick, opens no weights and asks no network."""
    name = as_asked(name)
    if name == DEFAULT_BASE:
        if not (EMBEDDED_WEIGHTS / "model_index.json").is_file():
            raise SVFitError(f"the embedded base model is missing: there is no {EMBEDDED_WEIGHTS}.")
        return
    path = Path(name)
    if path.is_dir():
        kind = _folder_kind(name)
        if kind is None:
            raise SVFitError(
                f"{name} is not a diffusers model folder, it has no readable model_index.json: "
                f'give such a folder, a hub id, a .safetensors checkpoint, or "{DEFAULT_BASE}".'
            )
        family_named(kind, name)
    elif path.is_file():
        if path.suffix != ".safetensors" and path.suffix.lower() == ".safetensors":
            raise SVFitError(
                f"{name} ends in {path.suffix}, which libraries do not know: rename it to {path.stem}.safetensors."
            )
        if path.suffix != ".safetensors":
            raise SVFitError(f"{name} is not a .safetensors checkpoint: convert it, pickled files are never opened.")
        if base_config is not None and _folder_kind(as_asked(base_config)) is None:
            raise SVFitError(f"base_config {base_config} is not a folder with a readable model_index.json.")
    elif not is_hub_id(name):
        raise SVFitError(
            f"{name} is no base model: there is no such folder or file, and a hub id reads owner/name; "
            f'give one of these, or "{DEFAULT_BASE}".'
        )


def open_base_model(
    name: str = DEFAULT_BASE,
    *,
    revision: str | None = None,
    variant: str | None = None,
    base_config: str | None = None,
    pretrained_vae_model_name_or_path: str | None = None,
    content_filter: bool = True,
    local_files_only: bool = False,
    one_at_a_time: bool = False,
    quantize: Quantization | None = None,
) -> BaseModel:
    """The base model `name`: the embedded one's word, a diffusers folder, a hub id, or a single-file .safetensors checkpoint.

    Weights are float32 on the CPU, whatever their file holds, so that bases are taken from the stored precision;
    cast and move the pipeline afterwards.  `pretrained_vae_model_name_or_path`: see `exchange_autoencoder`.  `content_filter`: load the safety checker where the base has one.
    `local_files_only`: never download.  `one_at_a_time`: networks of a family whose text encoders are not adapted come
    as outlines, which `BaseModel.open` fills.  `quantize`: hold the denoiser's weights in fewer bits, see
    `quantizing`.  Raises SVFitError for anything that is not such a model.
    """
    name = as_asked(name)
    base_config = base_config and as_asked(base_config)
    check_base_model(name, base_config)
    path = EMBEDDED_WEIGHTS if name == DEFAULT_BASE else Path(name)
    location: dict[str, Any] = {"local_files_only": local_files_only or path.exists()}
    if not path.exists():
        location["revision"] = revision
    stored = None
    if quantize is not None:
        check_library(quantize)
    try:
        check_quantizable(name, quantize)
        if path.is_file():
            family, prediction_type = read_single_file(path)
            kind = family.pipeline_class.__name__
            if base_config is not None and _folder_kind(base_config) != kind:
                raise SVFitError(
                    f"{name} is a checkpoint for {kind}, but base_config {base_config} describes a "
                    f"{_folder_kind(base_config)}: give the configs of its own family."
                )
            location["local_files_only"] = local_files_only or base_config is not None
            pipeline = family.pipeline_class.from_single_file(
                str(path), config=base_config, dtype=torch.float32, **location, **family.load_options(content_filter)
            )
            if prediction_type is not None:
                pipeline.register_modules(
                    scheduler=pipeline.scheduler.from_config(pipeline.scheduler.config, **prediction_type)
                )
        else:
            index = DiffusionPipeline.load_config(path if path.exists() else name, **location)
            kind = index["_class_name"]
            family = family_named(kind, name)
            if not path.exists():
                check_configs(name, index, family, **location)
            if not content_filter and not location["local_files_only"]:
                _fetch_whole(name, variant=variant, **location)
            options = {"variant": variant, "use_safetensors": True, **family.load_options(content_filter)}
            folder = path if path.exists() else Path(family.pipeline_class.download(name, **location, **options))
            files = StoredBase(name, folder, family, variant, quantize)
            if one_at_a_time and not family.adaptable_text_encoders:
                stored = files
                networks = outline_networks(name, folder, family)
                stored.check(family.denoiser_name, networks[family.denoiser_name])
            else:
                networks = open_networks(name, folder, family, variant)
            pipeline = family.pipeline_class.from_pretrained(
                folder,
                local_files_only=True,
                dtype=torch.float32,
                **options,
                **networks,
            )
            pipeline.register_to_config(_name_or_path=str(path) if path.exists() else name)
    except (SVFitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        hint = ""
        if path.is_file() and base_config is None:
            hint = "; its configs were looked for on the hub, base_config names a folder with them"
        raise SVFitError(f"the base model {name} cannot be opened: {reason_of(error, name)}{hint}.") from error
    pipeline.set_progress_bar_config(disable=True)
    display = name if name == DEFAULT_BASE or not path.exists() else base_name(path)
    if revision is not None and not path.exists():
        display += f"@{revision}"
    model = BaseModel(display, pipeline, stored, quantize=quantize)
    if stored is None:
        check_weights(name, model.family)
        check_latent_unit(name, model.family)
    check_tokenizers(name, model.family)
    model.family.check(name)
    if quantize is not None and stored is None:
        _ = model.digest  # of the weights as they are stored
        files.quantize_denoiser(model.family.denoiser)
    exchange_autoencoder(model, pretrained_vae_model_name_or_path, local_files_only)
    if (suits := model.few_steps) is not None:
        logger.warning(
            "%s was distilled to paint in a few steps (%s): num_inference_steps %d and guidance_scale %g are taken unless "
            "you give others.",
            model.name,
            suits.sign,
            suits.num_inference_steps,
            suits.guidance_scale,
        )
    return model


def check_quantizable(name: str, quantize: str | None) -> None:
    """Raises SVFitError where the denoiser of the base `name` cannot be held in fewer bits."""
    if quantize is not None and Path(name).is_file():
        raise SVFitError(
            f"quantize {quantize} needs a diffusers folder or a hub id, from which single weights can be read again, "
            f"and {base_name(Path(name))} is one file: save it as a folder first.",
            "quantize",
        )


def check_exchangeable(model: BaseModel, autoencoder: str) -> None:
    """Raises SVFitError where `model` is of a family that keeps its own autoencoder."""
    if not isinstance(model.family, StableDiffusion):
        raise SVFitError(
            f"pretrained_vae_model_name_or_path {autoencoder} is for Stable Diffusion 1.x, 2.x and XL: leave it out.",
            "pretrained_vae_model_name_or_path",
        )


def exchange_autoencoder(model: BaseModel, name: str | None, local_files_only: bool = False) -> None:
    """Gives `model` the autoencoder `name`, see `open_autoencoder`; None: it keeps its own.

    Raises SVFitError for bases of other families than Stable Diffusion 1.x, 2.x and XL.
    """
    if name is None:
        return
    check_exchangeable(model, name)
    model.pipeline.register_modules(vae=open_autoencoder(name, model.pipeline, local_files_only))
    model.vae_name = base_name(Path(name)) if Path(name).exists() else name
    model.family.check(name)  # of the units of latents
    check_latent_unit(name, model.family)


def _fetch_whole(name: str, **location: Any) -> None:
    """Downloads what `from_pretrained` would leave out with the content filter: painting wants it, maybe offline."""
    try:
        DiffusionPipeline.download(name, use_safetensors=True, **location)
    except OSError as error:  # without a network what lies here may do
        logger.info("the base model %s was not fetched whole (%s).", name, error)


def _folder_kind(folder: str) -> str | None:
    """The class of the diffusers pipeline in `folder`; None if there is none."""
    try:
        return str(json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
