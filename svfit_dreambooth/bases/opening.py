"""Opens the base model, and tells what can be trained in it."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch import Tensor, nn

from svfit_dreambooth.bases.autoencoders import open_autoencoder
from svfit_dreambooth.bases.families import family_named, family_of
from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.bases.names import DEFAULT_BASE, EMBEDDED_WEIGHTS, as_asked, base_name, is_hub_id
from svfit_dreambooth.bases.networks import check_latent_unit, check_weights, open_networks, outline_networks
from svfit_dreambooth.bases.quantizing import Quantization, check_library, empty
from svfit_dreambooth.bases.single_file import read_single_file
from svfit_dreambooth.bases.stable_diffusion import StableDiffusion
from svfit_dreambooth.bases.stored import StoredBase
from svfit_dreambooth.bases.tokenizers import check_tokenizers
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import weight_hash
from svfit_dreambooth.method.decomposition import as_matrix
from svfit_dreambooth.method.quantized import is_quantized, stored_weight
from svfit_dreambooth.method.targets import Projections
from svfit_dreambooth.method.weights import Lazy, joined

logger = logging.getLogger(__name__)

FEW_STEPS = re.compile(r"(?<![a-z])(turbo|lightning|lcm|hyper)(?![a-z])", re.IGNORECASE)
SAMPLE = 64  # values of each weight that the digest looks at, at least


@dataclass
class BaseModel:
    """A base model ready for use: a diffusers pipeline and the name that adapter files give it."""

    name: str  # the embedded one's word, hub id with "@revision", or the name of a folder or file
    pipeline: Any  # a DiffusionPipeline of one of the families
    stored: StoredBase | None = None  # from where its networks are opened one at a time; None: all are open
    vae_name: str | None = None  # what another autoencoder is called that it was given; None: it has its own

    @cached_property
    def family(self) -> Family:
        """All that is known of its kind."""
        return family_of(self.pipeline, self.name)

    @cached_property
    def digest(self) -> str:
        """What tells this base from others, its copy in float16 excepted, as it was when this was first asked for.

        By a sample of every weight: even a light fine-tune moves some.  To be asked for before anything is cast or put in.
        """
        family, pipeline = self.family, self.pipeline
        if self.stored is not None:
            return self.stored.print(*self.stored.parts)
        vae = pipeline.vae
        unit = [vae.config.get(name) for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")]
        digest = hashlib.sha256(repr([family.prediction_type, unit]).encode())
        for component, network in {**family.networks, "vae": vae}.items():
            for name, value in network.state_dict().items():
                sample = value.detach().flatten()[:: max(1, value.numel() // SAMPLE)]
                digest.update(f"{component}.{name} {tuple(value.shape)} {weight_hash(sample[None])}\n".encode())
        return digest.hexdigest()

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures that the base was trained on."""
        return self.family.resolution

    @property
    def few_steps(self) -> bool:
        """Whether a Stable Diffusion says, by its name or its sampler, that it was distilled to paint in a few steps."""
        said = FEW_STEPS.search(self.name) or type(self.pipeline.scheduler).__name__ == "LCMScheduler"
        return bool(said) and isinstance(self.family, StableDiffusion)

    @property
    def guidance_scale(self) -> float:
        """Guidance that suits the base: 1, which is none, where that was distilled too; 8 where the denoiser is told it."""
        if not self.few_steps:
            return self.family.guidance_scale
        return 1.0 if self.family.denoiser.config.time_cond_proj_dim is None else 8.0

    @property
    def architecture(self) -> str:
        """ModelSpec's word for the family."""
        return self.family.architecture

    def weights(self, layers: Mapping[str, Projections]) -> Mapping[str, Tensor]:
        """The weights of `layers` by component, as matrices (out, in), by "<component>.<layer>".

        They share memory with the base, as long as that is not cast; those of a base that is quantised or opened one
        network at a time are read from its files, each time they are asked for.
        """
        if self.stored is None:
            found = {
                f"{component}.{name}": layer for component, own in layers.items() for name, (_, _, layer) in own.items()
            }
            plain = {name: as_matrix(layer.weight.detach()) for name, layer in found.items() if not is_quantized(layer)}
            coarse = {name: partial(stored_weight, name, layer) for name, layer in found.items() if name not in plain}
            return joined(plain, Lazy(coarse)) if coarse else plain
        (component,) = layers
        stored = self.stored.weights(component)
        return Lazy(
            {
                f"{component}.{name}": lambda name=name: as_matrix(stored[f"{name}.weight"])  # type: ignore[misc]
                for name in layers[component]
            }
        )

    def is_open(self, part: str) -> bool:
        """Whether a network holds its weights: before it is opened it is an outline, and a text encoder let go is None."""
        network = getattr(self.pipeline, part)
        return network is not None and not next(network.parameters()).is_meta

    def open(self, *parts: str, dtype: torch.dtype = torch.float32) -> None:
        """Opens those networks, in `dtype` on the CPU, that are not open.  Raises SVFitError where they are not whole."""
        for part in parts:
            if self.stored is not None and not self.is_open(part):
                logger.info("opening the %s of %s.", part, self.name)
                setattr(self.pipeline, part, self.stored.open(part, dtype))
                if part == "vae":
                    check_latent_unit(self.name, self.family)

    def let_go(self, *parts: str) -> None:
        """Frees the memory of those networks, of a base that is opened one at a time."""
        for part in parts:
            if self.stored is not None and self.is_open(part):
                empty(getattr(self.pipeline, part))
            if self.stored is not None and part in self.family.text_encoder_names:
                setattr(self.pipeline, part, None)  # a pipeline asks each part for its device

    @contextmanager
    def opened(
        self, *parts: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Iterator[None]:
        """Within it those networks are open and on `device`; those that were not open before are let go afterwards."""
        closed = [part for part in parts if not self.is_open(part)]
        try:
            self.open(*closed, dtype=dtype)
            for part in parts:
                network = getattr(self.pipeline, part).eval()
                if device is not None:
                    network.to(device)
            yield
        finally:
            self.let_go(*closed)

    def to(self, device: torch.device | str) -> None:
        """Moves all networks that are open to `device`."""
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module) and self.is_open(name):
                part.to(device)


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
        if path.is_file() and quantize is not None:
            raise SVFitError(
                f"quantize {quantize} needs a diffusers folder or a hub id, from which single weights can be read again, "
                f"and {name} is one file: save it as a folder first.",
                "quantize",
            )
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
            kind = DiffusionPipeline.load_config(path if path.exists() else name, **location)["_class_name"]
            family = family_named(kind, name)
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
        reason = _of_the_hub(error, name)
        if reason is None:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = ""
        if path.is_file() and base_config is None:
            hint = "; its configs were looked for on the hub, base_config names a folder with them"
        raise SVFitError(f"the base model {name} cannot be opened: {reason}{hint}") from error
    pipeline.set_progress_bar_config(disable=True)
    display = name if name == DEFAULT_BASE or not path.exists() else base_name(path)
    if revision is not None and not path.exists():
        display += f"@{revision}"
    model = BaseModel(display, pipeline, stored)
    if stored is None:
        check_weights(name, model.family)
        check_latent_unit(name, model.family)
    check_tokenizers(name, model.family)
    model.family.check(name)
    if quantize is not None and stored is None:
        _ = model.digest  # of the weights as they are stored
        files.quantize_denoiser(model.family.denoiser)
    exchange_autoencoder(model, pretrained_vae_model_name_or_path, local_files_only)
    if model.few_steps:
        logger.warning(
            "%s calls itself distilled for few steps: num_inference_steps 1 to 8 suits it, and guidance_scale %g is taken "
            "unless you give another; to train, take the base that it was made from.",
            model.name,
            model.guidance_scale,
        )
    return model


def exchange_autoencoder(model: BaseModel, name: str | None, local_files_only: bool = False) -> None:
    """Gives `model` the autoencoder `name`, see `open_autoencoder`; None: it keeps its own.

    Raises SVFitError for bases of other families than Stable Diffusion 1.x, 2.x and XL.
    """
    if name is None:
        return
    if not isinstance(model.family, StableDiffusion):
        raise SVFitError(
            f"pretrained_vae_model_name_or_path {name} is for Stable Diffusion 1.x, 2.x and XL: leave it out.",
            "pretrained_vae_model_name_or_path",
        )
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


def _of_the_hub(error: BaseException | None, name: str) -> str | None:
    """What the hub has against `name`, and what to do, where that is behind `error`: libraries call both alike."""
    while error is not None:
        if isinstance(error, GatedRepoError):
            return f"it is gated, so accept its terms on https://huggingface.co/{name} and log in with `hf auth login`"
        if isinstance(error, RepositoryNotFoundError):
            return "the hub has none of that name, or it is private and `hf auth login` comes first"
        error = error.__cause__ or error.__context__
    return None


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
