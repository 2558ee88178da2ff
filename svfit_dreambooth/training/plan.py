"""Everything that can be known before anything slow starts: options made definite, input checked, base opened."""

import dataclasses
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.devices import MIXED_PRECISION, available_memory, default_device
from svfit_dreambooth.bases.names import DEFAULT_BASE, DEFAULT_SUBJECT, SUBJECTS_FOLDER, as_asked, subject_kind
from svfit_dreambooth.bases.opening import BaseModel, check_base_model, open_base_model
from svfit_dreambooth.bases.outline import outline_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import check_portable
from svfit_dreambooth.method.word import word_pieces
from svfit_dreambooth.photos.captions import folder_words
from svfit_dreambooth.photos.crops import Size, training_size
from svfit_dreambooth.photos.reading import Photo, find_photos, photo_report
from svfit_dreambooth.training.base_pictures import base_picture_report
from svfit_dreambooth.training.class_pictures import (
    check_class_pictures,
    class_picture_report,
    usable_class_pictures,
)
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.initial import check_initial, read_initial
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.training.presets import with_preset, with_values
from svfit_dreambooth.training.words import check_word

logger = logging.getLogger(__name__)

PATIENCE = 2  # looks that must agree before a run is cut short


@dataclass(frozen=True)
class Plan:
    """All of a run that follows from options, photos and base: it is made before anything slow, and never changes.

    The networks of `base` do change while the run trains them; which they are does not.
    """

    config: TrainConfig
    photos: list[Photo]
    base: BaseModel
    adapter_name: str
    targets: dict[str, list[str]]  # component -> canonical layer names
    shapes: dict[str, tuple[int, int]]  # "<component>.<layer>" -> rows and columns of its weight as a matrix
    initial: Adapter | None = None  # where it starts, read now: its file may be one that the run replaces
    free_memory: int | None = None  # `available_memory` before the base was opened; None: unknown

    def weights(self) -> Mapping[str, Tensor]:
        """The base's weights that the run adapts, as matrices (out, in), by the names of `shapes`.

        They share memory with the base, as long as that is not cast; those of a base that is opened one network at a
        time are read from its files, each time they are asked for.
        """
        config = self.config
        return self.base.weights(self.base.family.adapted_layers(config.target_modules, config.train_text_encoder))

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
        lines += [f"{component}: {self._layers(component)}" for component in self.targets]
        if self.config.learned_word is not None:
            pieces = word_pieces(next(iter(self.base.family.tokenizers.values())), self.config.learned_word)
            lines.append(f"learned word: {self.config.learned_word!r}, {len(pieces)} tokens")
        if self.config.with_prior_preservation:
            folder = Path(str(self.config.class_data_dir))
            lines.append(class_picture_report(usable_class_pictures(folder), self.config.num_class_images, folder))
        if self.config.keep_base:
            dtype, cache = MIXED_PRECISION[self.config.mixed_precision], self.config.basis_cache_dir
            lines.append(
                base_picture_report(
                    self.base, self.config.class_prompt, int(self.config.resolution or side), dtype, cache
                )
            )
        lines.append(f"adapter: {self.adapter_path}")
        return lines

    def _layers(self, component: str) -> str:
        """How many layers of a component are adapted, and by how many values."""
        config, names = self.config, self.targets[component]
        count = f"{len(names)} layers"
        if config.budget is not None:
            total = sum(min(shape) for shape in self.shapes.values())
            return f"{count}, a budget of {min(config.budget, total):,} of {total:,} values in all"
        if config.energy is not None:
            return f"{count}, ranks by energy {config.energy}"
        largest = [min(self.shapes[f"{component}.{name}"]) for name in names]
        if config.rank_value == "full":
            return f"{count}, {sum(largest):,} singular values"
        rank = config.rank_value
        capped = sum(rank > size for size in largest)
        note = f", {capped} of them smaller than rank {rank}" if capped else ""
        return f"{count}, {sum(min(rank, size) for size in largest):,} singular values{note}"


def prepare(
    config: TrainConfig, *, local_files_only: bool = False, weightless: bool = False, base: BaseModel | None = None
) -> Plan:
    """Checks everything that `config` names and opens the base model; all options of the run are definite then.

    `base`: the base that `config` names where it is open already, untouched and as it is stored.  `local_files_only`: nothing is downloaded.  `weightless`: nor are weights opened, for a plan that is only looked
    at: whether class pictures and `init_adapter` are of this base is not checked then.
    Cheap checks come first.  Raises SVFitError for a folder without photos, a base model that is none, a resolution
    that does not fit the base, targets that match nothing, an output that cannot be written.
    """
    config = dataclasses.replace(config, pretrained_model_name_or_path=as_asked(config.pretrained_model_name_or_path))
    check_base_model(config.pretrained_model_name_or_path, config.base_config)
    config, photos = _with_photos(_with_subject(config))
    config = _with_class(config)
    initial = read_initial(config)
    config = _with_output(_with_clip_skip(config, initial))
    config.warn_of_lora_values()
    free = available_memory()
    if base is None:
        base = outline_run_base(config) if weightless else open_run_base(config, local_files_only=local_files_only)
    if not weightless:
        _ = base.digest  # while its weights are as they are stored
    _check_objective(config, base)
    config = _with_base(config, base)
    if config.learned_word is not None:
        captions = [text for photo in photos for text in photo.captions or (str(config.instance_prompt),)]
        check_word(base.family, config.learned_word, list(dict.fromkeys(captions)))
    found = base.family.adapted_layers(config.target_modules, config.train_text_encoder)
    targets = {component: list(layers) for component, layers in found.items()}
    shapes = {
        f"{component}.{name}": (layer.weight.shape[0], layer.weight[0].numel())
        for component, layers in found.items()
        for name, (_, _, layer) in layers.items()
    }
    config = with_values(config, base.family.values_per_layer, shapes)
    plan = Plan(config, photos, base, str(config.adapter_name), targets, shapes, initial, free)
    if not weightless:
        _ = base.digest  # while its weights are as they are stored
        if config.with_prior_preservation:
            check_class_pictures(Path(str(config.class_data_dir)), str(config.class_prompt), base)
        if initial is not None:
            check_initial(initial, config, base, plan.weights())
    return plan


def open_run_base(config: TrainConfig, *, local_files_only: bool = False) -> BaseModel:
    """The base of the run, untouched; without a content filter, as training shows no picture.

    Of large bases an outline, whose networks are opened one at a time.
    """
    base = open_base_model(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        base_config=config.base_config,
        pretrained_vae_model_name_or_path=config.pretrained_vae_model_name_or_path,
        content_filter=False,
        local_files_only=local_files_only,
        one_at_a_time=True,
    )
    base.family.read_earlier(config.clip_skip or 0)
    return base


def outline_run_base(config: TrainConfig) -> BaseModel:
    """The base of the run without its weights, from what is on this disk."""
    base = outline_base_model(
        config.pretrained_model_name_or_path, revision=config.revision, base_config=config.base_config
    )
    base.family.read_earlier(config.clip_skip or 0)
    return base


def _check_objective(config: TrainConfig, base: BaseModel) -> None:
    """Raises SVFitError where the base is trained otherwise than asked for; warns of one that is better not trained."""
    family = base.family
    noising = family.noising(config.timestep_sampling)
    if config.snr_gamma is not None and noising.prediction_type == "flow":
        raise SVFitError(
            f"snr_gamma {config.snr_gamma} is for bases that predict epsilon or v, and {base.name} was trained by flow "
            "matching: leave it out, timestep_sampling says which timesteps come more often.",
            "snr_gamma",
        )
    if not family.adaptable_text_encoders and (config.train_text_encoder or config.learned_word is not None):
        given = "train_text_encoder" if config.train_text_encoder else f"learned_word {config.learned_word!r}"
        raise SVFitError(f"{given} does not work on {base.name}, whose text encoder is not adapted: leave it out.")
    if family.undistilled is not None:
        logger.warning(
            "%s was distilled to paint in a few steps, and training it undoes some of that: train on %s.",
            base.name,
            family.undistilled,
        )


def _with_photos(config: TrainConfig) -> tuple[TrainConfig, list[Photo]]:
    """The photos, with words for all of them."""
    folder = Path(str(config.instance_data_dir))
    photos = find_photos(folder)
    if config.instance_prompt is None and (named := folder_words(folder)):
        config = dataclasses.replace(config, instance_prompt=named[1])
    if config.instance_prompt is None and not all(photo.captions for photo in photos):
        raise SVFitError('instance_prompt is missing: say what the photos show, such as "a photo of sks dog".')
    return config, photos


def _with_base(config: TrainConfig, base: BaseModel) -> TrainConfig:
    """What was left open, as the base has it."""
    config = with_preset(config, base.architecture)
    quick = base.name == DEFAULT_BASE or default_device().type != "cpu"
    asked = config.dino_path is not None or config.clip_path is not None  # or they would be given for nothing
    looks: int | Literal["auto"] | None = config.validation_steps
    if looks is None:
        looks = "auto" if asked or quick else 0
    resolution, factor = config.resolution or base.resolution, base.family.required_multiple
    if resolution % factor:
        raise SVFitError(
            f"resolution {resolution} is not a multiple of {factor}, the side in pixels of what this base sees as one "
            f"point: use {max(1, round(resolution / factor)) * factor}.",
            "resolution",
        )
    return dataclasses.replace(
        config,
        validation_steps=looks,
        patience=(PATIENCE if looks == "auto" else 0) if config.patience is None else config.patience,
        resolution=resolution,
        guidance_scale=base.guidance_scale if config.guidance_scale is None else config.guidance_scale,
    )


def _with_clip_skip(config: TrainConfig, initial: Adapter | None) -> TrainConfig:
    """How prompts are read: as the adapter that the run starts from was trained, unless it is told otherwise."""
    given, trained = config.clip_skip, 0 if initial is None else initial.clip_skip
    if initial is not None and given not in (None, trained):
        logger.warning("init_adapter %s was trained with clip_skip %d, not %d.", config.init_adapter, trained, given)
    return dataclasses.replace(config, clip_skip=trained if given is None else given)


def _with_subject(config: TrainConfig) -> TrainConfig:
    """Without photos, a bundled subject of the embedded base stands in, with its prompt."""
    if config.instance_data_dir is not None:
        return config
    if config.pretrained_model_name_or_path != DEFAULT_BASE:
        raise SVFitError("instance_data_dir is missing: name the folder that holds the photos of your subject.")
    kind = subject_kind(DEFAULT_SUBJECT)
    class_prompt = f"a photo of a {kind}" if config.with_prior_preservation or config.keep_base else None
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


def _with_output(config: TrainConfig) -> TrainConfig:
    """The adapter's name, and a folder that may be written into.

    Raises SVFitError where the run would write among the photos, or over its own base.
    """
    name = config.adapter_name or file_name(Path(str(config.instance_data_dir)).resolve().name)
    if name != file_name(name):
        raise SVFitError(f"adapter_name {name!r} is no file name: use letters, digits, '-', '_' and '.'.")
    check_portable(name, "adapter_name")
    folder = RunFolder(Path(config.output_dir).resolve(), name)
    if folder.path == Path(str(config.instance_data_dir)).resolve():
        raise SVFitError(f"output_dir {config.output_dir} is the folder of the photos: name another.")
    if folder.adapter == Path(config.pretrained_model_name_or_path).resolve():
        raise SVFitError(
            f"the adapter would replace its base model, {config.pretrained_model_name_or_path}: "
            "give another adapter_name or output_dir."
        )
    if not config.dry_run:
        _check_writable(config.output_dir)
    return dataclasses.replace(config, adapter_name=name)


def file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "adapter"


def _check_writable(folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # a name of its own: several processes of a run ask at once
    except OSError as error:
        raise SVFitError(f"output_dir {folder} cannot be written ({error.strerror}): choose another folder.") from error
