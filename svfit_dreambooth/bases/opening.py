"""Opens the base model, and tells what can be trained in it."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.config import TOYBOX
from svfit_dreambooth.training.options import base_name

logger = logging.getLogger(__name__)

TOYBOX_FOLDER = Path(__file__).resolve().parents[2] / "toybox" / "weights"
TOYBOX_SUBJECTS = TOYBOX_FOLDER.parent / "subjects"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
GUIDANCE_SCALE = {TOYBOX: 4.0}  # where the value that suits is not Stable Diffusion's customary one
CUSTOMARY_GUIDANCE_SCALE = 7.5
FAMILIES = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
SDXL_KEY = "conditioner.embedders.1."  # single-file checkpoints: the second text encoder, which only SDXL has
REFINER_KEY = "conditioner.embedders.0.model."

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline


@dataclass
class BaseModel:
    """A base model ready for use: a diffusers pipeline and the name that adapter files give it."""

    name: str  # "toybox", hub id with "@revision", or the name of a folder or file
    pipeline: Pipeline

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet also takes a pooled embedding and time ids, and prompts go through two text encoders."""
        return isinstance(self.pipeline, StableDiffusionXLPipeline)

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures that the base was trained on."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def size_multiple(self) -> int:
        """What both sides of a picture, in pixels, should be multiples of, for the UNet to halve them evenly."""
        return self.pipeline.vae_scale_factor * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)

    @property
    def guidance_scale(self) -> float:
        """Guidance that suits the base."""
        return GUIDANCE_SCALE.get(self.name, CUSTOMARY_GUIDANCE_SCALE)

    @property
    def architecture(self) -> str:
        """ModelSpec's word for the family."""
        if self.name == TOYBOX:
            return TOYBOX
        if self.is_sdxl:
            return "stable-diffusion-xl-v1-base"
        width = self.pipeline.unet.config.cross_attention_dim
        return {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2"}.get(width, "stable-diffusion")


def pipeline_components(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The modules of `pipeline` that adapters may change, by name."""
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def check_base_model(name: str, base_config: str | None = None) -> None:
    """Raises SVFitError if `name` cannot be a base model; quick, opens no weights and asks no network."""
    if name == TOYBOX:
        if not (TOYBOX_FOLDER / "model_index.json").is_file():
            raise SVFitError(f"the embedded base model is missing: there is no {TOYBOX_FOLDER.name} folder in toybox/.")
        return
    path = Path(name)
    if path.is_dir():
        kind = _folder_kind(name)
        if kind is None:
            raise SVFitError(
                f"{name} is not a diffusers model folder, it has no readable model_index.json: "
                f'give such a folder, a hub id, a .safetensors checkpoint, or "{TOYBOX}".'
            )
        _family(name, kind)
    elif path.is_file():
        if path.suffix != ".safetensors":
            raise SVFitError(f"{name} is not a .safetensors checkpoint: convert it, pickled files are never opened.")
        if base_config is not None and _folder_kind(base_config) is None:
            raise SVFitError(f"base_config {base_config} is not a folder with a readable model_index.json.")
    elif not HUB_ID.fullmatch(name) or name.startswith("."):
        raise SVFitError(
            f"{name} is no base model: there is no such folder or file, and a hub id reads owner/name; "
            f'give one of these, or "{TOYBOX}".'
        )


def open_base_model(
    name: str = TOYBOX,
    *,
    revision: str | None = None,
    variant: str | None = None,
    base_config: str | None = None,
    content_filter: bool = True,
    local_files_only: bool = False,
) -> BaseModel:
    """The base model `name`: "toybox", a diffusers folder, a hub id, or a single-file .safetensors checkpoint.

    Weights are float32 on the CPU, whatever their file holds, so that bases are taken from the stored precision;
    cast and move the pipeline afterwards.  `content_filter`: load the safety checker where the base has one.
    `local_files_only`: never download.  Raises SVFitError for anything that is not such a model.
    """
    check_base_model(name, base_config)
    path = TOYBOX_FOLDER if name == TOYBOX else Path(name)
    location: dict[str, Any] = {"local_files_only": local_files_only or path.exists()}
    if not path.exists():
        location["revision"] = revision
    try:
        if path.is_file():
            family, prediction_type = _read_single_file(path)
            if base_config is not None and _folder_kind(base_config) != family.__name__:
                raise SVFitError(
                    f"{name} is a checkpoint for {family.__name__}, but base_config {base_config} describes a "
                    f"{_folder_kind(base_config)}: give the configs of its own family."
                )
            location["local_files_only"] = local_files_only or base_config is not None
            pipeline = family.from_single_file(
                str(path), config=base_config, **location, **_load_options(family, content_filter)
            )
            if prediction_type is not None:
                pipeline.register_modules(
                    scheduler=pipeline.scheduler.from_config(pipeline.scheduler.config, **prediction_type)
                )
        else:
            source = path if path.exists() else name
            kind = DiffusionPipeline.load_config(source, **location)["_class_name"]
            family = _family(name, kind)
            if not content_filter and not location["local_files_only"]:
                _fetch_whole(name, variant=variant, **location)
            pipeline = family.from_pretrained(
                source, variant=variant, use_safetensors=True, **location, **_load_options(family, content_filter)
            )
    except SVFitError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = ""
        if path.is_file() and base_config is None:
            hint = "; its configs were looked for on the hub, base_config names a folder with them"
        raise SVFitError(f"the base model {name} cannot be opened: {reason}{hint}") from error
    if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise SVFitError(
            f"{name} takes {pipeline.unet.config.in_channels} channels, as inpainting models do: give the plain model."
        )
    pipeline.set_progress_bar_config(disable=True)
    display = name if name == TOYBOX or not path.exists() else base_name(path)
    if revision is not None and not path.exists():
        display += f"@{revision}"
    return BaseModel(display, pipeline)


def _fetch_whole(name: str, **location: Any) -> None:
    """Downloads what `from_pretrained` would leave out with the content filter: painting wants it, maybe offline."""
    try:
        DiffusionPipeline.download(name, use_safetensors=True, **location)
    except OSError as error:  # without a network what lies here may do
        logger.info("the base model %s was not fetched whole (%s).", name, error)


def is_cached(name: str, revision: str | None = None) -> bool:
    """Whether the hub's `name` is on this disk, be it in part: without its content filter, or another variant."""
    try:
        return isinstance(try_to_load_from_cache(name, "model_index.json", revision=revision), str)
    except ValueError:  # no hub id after all
        return False


def _folder_kind(folder: str) -> str | None:
    """The class of the diffusers pipeline in `folder`; None if there is none."""
    try:
        return str(json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _family(name: str, kind: str) -> type[Pipeline]:
    if kind not in FAMILIES:
        raise SVFitError(f"{name} is a {kind}, and only {' and '.join(FAMILIES)} models can be adapted.")
    return FAMILIES[kind]


def _load_options(family: type[Pipeline], content_filter: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": torch.float32}
    if not content_filter and family is StableDiffusionPipeline:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    if not content_filter and family is StableDiffusionXLPipeline:
        options |= {"add_watermarker": False}
    return options


def _read_single_file(path: Path) -> tuple[type[Pipeline], dict[str, Any] | None]:
    """The family of a checkpoint, and what its scheduler must be told where the file says what the model predicts.

    Checkpoints that predict v say so by an entry "v_pred" (with "ztsnr" for zero terminal SNR) or in their ModelSpec
    metadata; of the others the configs decide.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys, metadata = set(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise SVFitError(f"{path} is no whole safetensors file ({error}): download it again.") from None
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise SVFitError(
            f"{path} is no Stable Diffusion checkpoint, it holds no model.diffusion_model: give a whole one."
        )
    if any(key.startswith(REFINER_KEY) for key in keys):
        raise SVFitError(f"{path} is the SDXL refiner, which cannot be adapted: give the base model.")
    family = StableDiffusionXLPipeline if any(key.startswith(SDXL_KEY) for key in keys) else StableDiffusionPipeline
    named = {"v": "v_prediction", "epsilon": "epsilon"}.get(metadata.get("modelspec.prediction_type", ""))
    if "v_pred" in keys:
        named = "v_prediction"
    if named is None:
        return family, None
    return family, {"prediction_type": named} | ({"rescale_betas_zero_snr": True} if "ztsnr" in keys else {})


def cast_pipeline(pipeline: Pipeline, dtype: torch.dtype) -> None:
    """Casts every part of `pipeline` to `dtype`; SDXL's own autoencoder overflows in float16 and stays as it is."""
    for name, module in pipeline.components.items():
        precise = (
            name == "vae"
            and dtype == torch.float16
            and isinstance(pipeline, StableDiffusionXLPipeline)
            and pipeline.vae.config.force_upcast
        )
        if isinstance(module, nn.Module) and not precise:
            module.to(dtype)


def text_encoders(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The text encoders of `pipeline`, one or two, by name."""
    return {name: module for name, module in pipeline_components(pipeline).items() if name != "unet"}


def noise_scheduler(pipeline: Pipeline) -> DDPMScheduler:
    """The noise schedule that the base was trained with.

    Raises SVFitError for schedulers of models that are trained otherwise (EDM, flow matching), and for bases that
    predict neither the noise nor v.
    """
    kind = type(pipeline.scheduler).__name__
    if kind.startswith(("EDM", "FlowMatch")):
        raise SVFitError(f"the base is sampled with {kind}, and models of that kind cannot be trained here.")
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    predicted = scheduler.config.prediction_type
    if predicted not in ("epsilon", "v_prediction"):
        raise SVFitError(f"the base predicts {predicted!r}, and only epsilon and v_prediction can be trained.")
    return scheduler
