"""Everything before the first training step: options made definite, input checked, photos and prompts encoded."""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.optimization import SchedulerType
from torch import Tensor

from svfit_dreambooth.attention import find_projections
from svfit_dreambooth.base_model import (
    TOYBOX_FOLDER,
    BaseModel,
    check_base_model,
    encode_images,
    encode_prompts,
    open_base_model,
)
from svfit_dreambooth.config import TOYBOX, TrainConfig, config_to_yaml
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.photos import Photo, examples, find_photos, open_photo, photo_report
from svfit_dreambooth.svfit import as_matrix, resolve_rank

TOYBOX_SUBJECTS = TOYBOX_FOLDER.parent / "subjects"
TOYBOX_SUBJECT = "dog_patch"


@dataclass
class Run:
    """A run whose input has been checked: definite options, photos, base, and the layers to adapt."""

    config: TrainConfig
    photos: list[Photo]
    base: BaseModel
    adapter_name: str
    targets: dict[str, list[str]]  # component -> canonical layer names
    weights: dict[str, Tensor]  # "<component>.<layer>" -> the base's weight as a matrix (out, in)

    @property
    def adapter_path(self) -> Path:
        return Path(self.config.output_dir) / f"{self.adapter_name}.safetensors"

    def report(self) -> list[str]:
        """What would be trained on what, in plain lines."""
        lines = photo_report(self.photos, self.config.resolution or 0)
        lines.append(f"base: {self.base.name}, trained at {self.config.resolution} pixels")
        for component, names in self.targets.items():
            sizes = [min(self.weights[f"{component}.{name}"].shape) for name in names]
            if self.config.budget is not None:
                total = sum(min(weight.shape) for weight in self.weights.values())
                share = min(self.config.budget, total)
                lines.append(f"{component}: {len(names)} layers, a budget of {share:,} of {total:,} values in all")
                continue
            if self.config.energy is not None:
                lines.append(f"{component}: {len(names)} layers, ranks by energy {self.config.energy}")
                continue
            ranks = [resolve_rank(torch.empty(size), self.config.rank_value) for size in sizes]
            capped = sum(isinstance(self.config.rank_value, int) and self.config.rank_value > size for size in sizes)
            note = f", {capped} of them smaller than rank {self.config.rank}" if capped else ""
            lines.append(f"{component}: {len(names)} layers, {sum(ranks):,} singular values{note}")
        lines.append(f"adapter: {self.adapter_path}")
        return lines


@dataclass
class Examples:
    """The photos as the UNet sees them, on the CPU in float32."""

    mean: list[Tensor]  # per photo: (variants, channels, h, w), mean of the latents of every crop and flip
    spread: list[Tensor]  # the same shape: their standard deviation
    input_ids: Tensor  # (photos, tokens)
    prompt_embeds: Tensor  # (photos, tokens, dim)


def prepare(config: TrainConfig) -> Run:
    """Checks everything that `config` names and opens the base model; writes OUT/config.yaml with definite options.

    Cheap checks come first.  Raises SVFitError for a folder without photos, an unknown schedule, a base model that
    is none, a resolution that does not fit the base, targets that match nothing, an output that cannot be written.
    """
    config = dataclasses.replace(config)
    if config.lr_scheduler not in [kind.value for kind in SchedulerType]:
        known = ", ".join(kind.value for kind in SchedulerType)
        raise SVFitError(f"--lr_scheduler is {config.lr_scheduler!r}, but must be one of: {known}.")
    check_base_model(config.pretrained_model_name_or_path, config.base_config)
    _choose_subject(config)
    photos = find_photos(str(config.instance_data_dir))
    if config.instance_prompt is None and any(photo.caption is None for photo in photos):
        raise SVFitError('--instance_prompt is missing: say what the photos show, such as "a photo of sks dog".')
    if config.init_adapter is not None and not Path(config.init_adapter).is_file():
        raise SVFitError(f"--init_adapter {config.init_adapter} does not exist.")
    adapter_name = config.adapter_name or _file_name(Path(str(config.instance_data_dir)).resolve().name)
    if adapter_name != _file_name(adapter_name):
        raise SVFitError(f"--adapter_name {adapter_name!r} is no file name: use letters, digits, '-', '_' and '.'.")
    config.adapter_name = adapter_name
    if not config.dry_run:
        _check_writable(config.output_dir)
    config.warn_of_lora_values()

    base = open_base_model(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        base_config=config.base_config,
        content_filter=False,
    )
    factor = base.pipeline.vae_scale_factor
    config.resolution = config.resolution or base.resolution
    if config.resolution % factor:
        raise SVFitError(
            f"--resolution {config.resolution} is not a multiple of {factor}, the factor by which this base's "
            f"autoencoder shrinks pictures: use {max(1, round(config.resolution / factor)) * factor}."
        )
    config.guidance_scale = base.guidance_scale if config.guidance_scale is None else config.guidance_scale
    found = {"unet": find_projections(base.pipeline.unet, config.target_modules)}
    if config.train_text_encoder:
        found["text_encoder"] = find_projections(base.pipeline.text_encoder)
    targets = {component: list(layers) for component, layers in found.items()}
    weights = {
        f"{component}.{name}": as_matrix(layer.weight.detach())
        for component, layers in found.items()
        for name, (_, _, layer) in layers.items()
    }
    run = Run(config, photos, base, adapter_name, targets, weights)
    if not config.dry_run:
        write_atomically(Path(config.output_dir) / "config.yaml", config_to_yaml(config))
    return run


@torch.no_grad()
def encode_examples(run: Run, device: torch.device) -> Examples:
    """Encodes every crop of every photo, and every caption, once."""
    config, pipeline = run.config, run.base.pipeline
    pipeline.vae.to(device).eval()
    pipeline.text_encoder.to(device).eval()
    means, spreads = [], []
    for photo in run.photos:
        pixel_values = examples(
            open_photo(photo.path),
            config.resolution or 0,
            config.center_crop,
            config.random_flip,
            config.crops_per_photo,
            config.seed,
            photo.path.name,
        )  # (variants, 3, h, w)
        mean, spread = zip(*(encode_images(pipeline, variant[None]) for variant in pixel_values), strict=True)
        means.append(torch.cat(mean).cpu())
        spreads.append(torch.cat(spread).cpu())
    captions = [photo.caption or str(config.instance_prompt) for photo in run.photos]
    tokenizer = pipeline.tokenizer
    input_ids = tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    return Examples(means, spreads, input_ids, encode_prompts(pipeline, captions).float().cpu())


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by a file with `text`, or leaves it as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _choose_subject(config: TrainConfig) -> None:
    """Without photos, a bundled subject of toybox stands in, with its prompt."""
    if config.instance_data_dir is not None:
        return
    if config.pretrained_model_name_or_path != TOYBOX:
        raise SVFitError("--instance_data_dir is missing: name the folder that holds the photos of your subject.")
    config.instance_data_dir = str(TOYBOX_SUBJECTS / TOYBOX_SUBJECT)
    if config.instance_prompt is None:
        config.instance_prompt = f"a photo of sks {TOYBOX_SUBJECT.partition('_')[0]}"


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "adapter"


def _check_writable(folder: str) -> None:
    probe = Path(folder) / ".svfit-write-test"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SVFitError(
            f"--output_dir {folder} cannot be written ({error.strerror}): choose another folder."
        ) from error
