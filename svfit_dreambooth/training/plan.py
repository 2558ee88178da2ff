"""Everything that can be known before anything slow starts: options made definite, input checked, base opened."""

import dataclasses
import logging
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.devices import available_memory, default_device
from svfit_dreambooth.bases.names import DEFAULT_BASE, DEFAULT_SUBJECT, SUBJECTS_FOLDER, subject_kind
from svfit_dreambooth.bases.opening import BaseModel, check_base_model, open_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import check_portable
from svfit_dreambooth.method.basis import weight_hashes
from svfit_dreambooth.method.layer import as_matrix, resolve_rank
from svfit_dreambooth.method.word import word_pieces
from svfit_dreambooth.photos.captions import folder_words
from svfit_dreambooth.photos.crops import Size, training_size
from svfit_dreambooth.photos.reading import Photo, find_photos, photo_report
from svfit_dreambooth.training.class_pictures import (
    check_class_pictures,
    class_picture_report,
    usable_class_pictures,
)
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.initial import check_initial, read_initial
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.training.presets import with_preset
from svfit_dreambooth.training.words import check_word

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run whose input has been checked: definite options, photos, base, and the layers to adapt."""

    config: TrainConfig
    photos: list[Photo]
    base: BaseModel
    adapter_name: str
    targets: dict[str, list[str]]  # component -> canonical layer names
    weights: dict[str, Tensor]  # "<component>.<layer>" -> the base's weight as a matrix (out, in)
    initial: Adapter | None = None  # where it starts, read now: its file may be one that the run replaces
    free_memory: int | None = None  # `available_memory` before the base was opened; None: unknown

    @cached_property
    def hashes(self) -> dict[str, str]:
        """`basis.weight_hash` of every weight, read once: resuming, the basis and the adapter file ask for it."""
        return weight_hashes(self.weights)

    def release_weights(self) -> None:
        """Keeps only the shapes of `weights`, as their numbers would stay in memory beside those of cast networks."""
        self.weights = {name: weight.to("meta") for name, weight in self.weights.items()}

    @property
    def trained(self) -> list[str]:
        """The components that hold something to train: those with targets, and text encoders that learn a word."""
        family = self.base.family
        learning = family.text_encoders if self.config.learned_word is not None else ()
        return [name for name in family.components if name in self.targets or name in learning]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.output_dir, self.adapter_name)

    @property
    def adapter_path(self) -> Path:
        return self.folder.adapter

    def training_size(self, photo: Photo) -> Size:
        """Width and height in pixels at which `photo` is trained on."""
        resolution = self.config.resolution or self.base.resolution
        if self.config.aspect_ratio == "square":
            return resolution, resolution
        return training_size(photo.size, resolution, self.base.family.size_multiple)

    def report(self) -> list[str]:
        """What would be trained on what, in plain lines."""
        lines = photo_report(self.photos, self.config.resolution or 0)
        sizes = Counter(self.training_size(photo) for photo in self.photos)
        pixels = ", ".join(f"{width}x{height} ({count})" for (width, height), count in sorted(sizes.items()))
        side = self.base.resolution
        lines.append(f"base: {self.base.name}, for {side}x{side} pixels; the photos are trained on at {pixels}")
        for component, names in self.targets.items():
            if self.config.budget is not None:
                total = sum(min(weight.shape) for weight in self.weights.values())
                share = min(self.config.budget, total)
                lines.append(f"{component}: {len(names)} layers, a budget of {share:,} of {total:,} values in all")
                continue
            largest = [min(self.weights[f"{component}.{name}"].shape) for name in names]
            if self.config.energy is not None:
                lines.append(f"{component}: {len(names)} layers, ranks by energy {self.config.energy}")
                continue
            ranks = [resolve_rank(torch.empty(size), self.config.rank_value) for size in largest]
            capped = sum(isinstance(self.config.rank_value, int) and self.config.rank_value > size for size in largest)
            note = f", {capped} of them smaller than rank {self.config.rank}" if capped else ""
            lines.append(f"{component}: {len(names)} layers, {sum(ranks):,} singular values{note}")
        if self.config.learned_word is not None:
            pieces = word_pieces(next(iter(self.base.family.tokenizers.values())), self.config.learned_word)
            lines.append(f"learned word: {self.config.learned_word!r}, {len(pieces)} tokens")
        if self.config.with_prior_preservation:
            folder = Path(str(self.config.class_data_dir))
            lines.append(class_picture_report(usable_class_pictures(folder), self.config.num_class_images, folder))
        lines.append(f"adapter: {self.adapter_path}")
        return lines


def prepare(config: TrainConfig, *, local_files_only: bool = False) -> Run:
    """Checks everything that `config` names and opens the base model; all options of the run are definite then.

    `local_files_only`: nothing is downloaded.  Cheap checks come first.  Raises SVFitError for a folder without photos,
    an unknown schedule, a base model that is none, a resolution that does not fit the base, targets that match nothing,
    an output that cannot be written.
    """
    check_base_model(config.pretrained_model_name_or_path, config.base_config)
    config = _with_subject(config)
    photos = find_photos(str(config.instance_data_dir))
    if config.instance_prompt is None and (named := folder_words(Path(str(config.instance_data_dir)))):
        config = dataclasses.replace(config, instance_prompt=named[1])
    if config.instance_prompt is None and not all(photo.captions for photo in photos):
        raise SVFitError('instance_prompt is missing: say what the photos show, such as "a photo of sks dog".')
    config = _with_class(config)
    initial = read_initial(config)
    adapter_name = config.adapter_name or _file_name(Path(str(config.instance_data_dir)).resolve().name)
    if adapter_name != _file_name(adapter_name):
        raise SVFitError(f"adapter_name {adapter_name!r} is no file name: use letters, digits, '-', '_' and '.'.")
    check_portable(adapter_name, "adapter_name")
    config = dataclasses.replace(config, adapter_name=adapter_name)
    _check_output(config)
    if not config.dry_run:
        _check_writable(config.output_dir)
    config.warn_of_lora_values()

    free = available_memory()
    base = open_run_base(config, local_files_only=local_files_only)
    family = base.family
    family.noising()  # raises for bases that are trained otherwise
    config = with_preset(config, base.architecture)
    quick = base.name == DEFAULT_BASE or default_device().type != "cpu"
    asked = config.dino_path is not None or config.clip_path is not None  # or they would be given for nothing
    looks = max(1, config.max_train_steps // 4) if asked or quick else 0
    factor = family.pixels_per_latent
    config = dataclasses.replace(
        config,
        validation_steps=looks if config.validation_steps is None else config.validation_steps,
        resolution=config.resolution or base.resolution,
        guidance_scale=base.guidance_scale if config.guidance_scale is None else config.guidance_scale,
    )
    assert config.resolution is not None
    if config.resolution % factor:
        raise SVFitError(
            f"resolution {config.resolution} is not a multiple of {factor}, the factor by which this base's "
            f"autoencoder shrinks pictures: use {max(1, round(config.resolution / factor)) * factor}.",
            "resolution",
        )
    if config.learned_word is not None:
        captions = [text for photo in photos for text in photo.captions or (str(config.instance_prompt),)]
        check_word(family, config.learned_word, list(dict.fromkeys(captions)))
    if config.with_prior_preservation:
        check_class_pictures(Path(str(config.class_data_dir)), str(config.class_prompt), base)
    found = {family.denoiser_name: family.find_projections(family.denoiser_name, config.target_modules)}
    if config.train_text_encoder:
        found |= {component: family.find_projections(component) for component in family.text_encoders}
    targets = {component: list(layers) for component, layers in found.items()}
    weights = {
        f"{component}.{name}": as_matrix(layer.weight.detach())
        for component, layers in found.items()
        for name, (_, _, layer) in layers.items()
    }
    run = Run(config, photos, base, adapter_name, targets, weights, initial, free)
    if initial is not None:
        check_initial(initial, config, base, run.weights, run.hashes)
    return run


def open_run_base(config: TrainConfig, *, local_files_only: bool = False) -> BaseModel:
    """The base of the run, untouched; without a content filter, as training shows no picture."""
    return open_base_model(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        base_config=config.base_config,
        content_filter=False,
        local_files_only=local_files_only,
    )


def _with_subject(config: TrainConfig) -> TrainConfig:
    """Without photos, a bundled subject of the embedded base stands in, with its prompt."""
    if config.instance_data_dir is not None:
        return config
    if config.pretrained_model_name_or_path != DEFAULT_BASE:
        raise SVFitError("instance_data_dir is missing: name the folder that holds the photos of your subject.")
    kind = subject_kind(DEFAULT_SUBJECT)
    class_prompt = f"a photo of a {kind}" if config.with_prior_preservation else None
    return dataclasses.replace(
        config,
        instance_data_dir=str(SUBJECTS_FOLDER / DEFAULT_SUBJECT),
        instance_prompt=config.instance_prompt or f"a photo of sks {kind}",
        class_prompt=config.class_prompt or class_prompt,
    )


def _with_class(config: TrainConfig) -> TrainConfig:
    """What the class is and where its pictures are."""
    if not config.with_prior_preservation:
        if config.class_data_dir is not None:
            logger.warning("class_data_dir is not used without with_prior_preservation.")
        return config
    if config.class_prompt is None:
        raise SVFitError('class_prompt is missing: say what the class pictures show, such as "a photo of a dog".')
    folder = config.class_data_dir or str(RunFolder(config.output_dir).class_pictures)
    if Path(folder).resolve() == Path(str(config.instance_data_dir)).resolve():
        raise SVFitError(f"class_data_dir {folder} is the folder of the photos: name another.")
    return dataclasses.replace(config, class_data_dir=folder)


def _check_output(config: TrainConfig) -> None:
    """Raises SVFitError where the run would write among the photos, or over its own base."""
    folder = Path(config.output_dir).resolve()
    if folder == Path(str(config.instance_data_dir)).resolve():
        raise SVFitError(f"output_dir {config.output_dir} is the folder of the photos: name another.")
    if folder / f"{config.adapter_name}.safetensors" == Path(config.pretrained_model_name_or_path).resolve():
        raise SVFitError(
            f"the adapter would replace its base model, {config.pretrained_model_name_or_path}: "
            "give another adapter_name or output_dir."
        )


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "adapter"


def _check_writable(folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # a name of its own: several processes of a run ask at once
    except OSError as error:
        raise SVFitError(f"output_dir {folder} cannot be written ({error.strerror}): choose another folder.") from error
