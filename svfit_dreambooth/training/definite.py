"""Options made definite: what was left open follows from the photos, the output folder and the base."""

import dataclasses
import logging
import re
import tempfile
from pathlib import Path
from typing import Literal

from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.devices import default_device
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.names import DEFAULT_BASE, DEFAULT_SUBJECT, SUBJECTS_FOLDER, subject_kind
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import check_portable
from svfit_dreambooth.photos.captions import folder_words
from svfit_dreambooth.photos.reading import Photo, find_photos
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.training.presets import with_preset

logger = logging.getLogger(__name__)

PATIENCE = 2  # looks that must agree before a run is cut short


def check_objective(config: TrainConfig, base: BaseModel) -> None:
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
    if base.few_steps is not None:
        logger.warning(
            "%s was distilled to paint in a few steps, and training it undoes some of that: train on %s.",
            base.name,
            family.undistilled or "the base that it was made from",
        )


def with_photos(config: TrainConfig) -> tuple[TrainConfig, list[Photo]]:
    """The photos, with words for all of them."""
    folder = Path(str(config.instance_data_dir))
    photos = find_photos(folder)
    if config.instance_prompt is None and (named := folder_words(folder)):
        config = dataclasses.replace(config, instance_prompt=named[1])
    if config.instance_prompt is None and not all(photo.captions for photo in photos):
        raise SVFitError('instance_prompt is missing: say what the photos show, such as "a photo of sks dog".')
    return config, photos


def with_base(config: TrainConfig, base: BaseModel) -> TrainConfig:
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
        num_inference_steps=config.num_inference_steps or base.num_inference_steps,
        guidance_scale=base.guidance_scale if config.guidance_scale is None else config.guidance_scale,
    )


def with_clip_skip(config: TrainConfig, initial: Adapter | None) -> TrainConfig:
    """How prompts are read: as the adapter that the run starts from was trained, unless it is told otherwise."""
    given, trained = config.clip_skip, 0 if initial is None else initial.clip_skip
    if initial is not None and given not in (None, trained):
        logger.warning("init_adapter %s was trained with clip_skip %d, not %d.", config.init_adapter, trained, given)
    return dataclasses.replace(config, clip_skip=trained if given is None else given)


def with_subject(config: TrainConfig) -> TrainConfig:
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


def with_class(config: TrainConfig) -> TrainConfig:
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


def with_output(config: TrainConfig) -> TrainConfig:
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
