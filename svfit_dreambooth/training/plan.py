"""Everything that can be known before anything slow starts: options made definite, input checked, base opened."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.devices import MIXED_PRECISION, available_memory
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.names import as_asked
from svfit_dreambooth.bases.opening import check_base_model, open_base_model
from svfit_dreambooth.bases.outline import outline_base_model
from svfit_dreambooth.method.decomposition import matrix_shape
from svfit_dreambooth.method.word import word_pieces
from svfit_dreambooth.photos.crops import Size, training_size
from svfit_dreambooth.photos.reading import Photo, photo_report
from svfit_dreambooth.training.base_pictures import base_picture_report
from svfit_dreambooth.training.class_pictures import (
    check_class_pictures,
    class_picture_report,
    usable_class_pictures,
)
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.definite import (
    check_objective,
    with_base,
    with_class,
    with_clip_skip,
    with_output,
    with_photos,
    with_subject,
)
from svfit_dreambooth.training.initial import check_initial, read_initial
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.training.presets import with_values
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

        They share memory with the base, as long as that is not cast; those of a base that is quantised or opened one
        network at a time are read from its files, each time they are asked for.
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
    config, photos = with_photos(with_subject(config))
    config = with_class(config)
    initial = read_initial(config)
    config = with_output(with_clip_skip(config, initial))
    config.warn_of_lora_values()
    free = available_memory()
    if base is None:
        base = outline_run_base(config) if weightless else open_run_base(config, local_files_only=local_files_only)
    if not weightless:
        _ = base.digest  # while its weights are as they are stored
    check_objective(config, base)
    config = with_base(config, base)
    if config.learned_word is not None:
        captions = [text for photo in photos for text in photo.captions or (str(config.instance_prompt),)]
        check_word(base.family, config.learned_word, list(dict.fromkeys(captions)))
    found = base.family.adapted_layers(config.target_modules, config.train_text_encoder)
    targets = {component: list(layers) for component, layers in found.items()}
    shapes = {
        f"{component}.{name}": matrix_shape(layer)
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
        quantize=config.quantize,
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
