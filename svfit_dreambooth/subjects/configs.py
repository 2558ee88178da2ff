"""Folders of photos as subjects: what each is called, by which words it is trained, and where its run lies.

A folder of subjects holds a folder for each.  What a subject's photos show is said, in this order, by

    subject.yaml in its folder     instance_prompt, and whatever else of OWN_WORDS it wants for itself
    the folder's name              "10_sks dog", as kohya's scripts want it
    instance_prompt of the run     in which {} stands for the folder's name
    the photos' own captions       if all have one
    the folder's name              "sks dog" is "a photo of sks dog", "dog" is "a photo of sks dog"
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.photos.captions import folder_words
from svfit_dreambooth.photos.reading import find_photos
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.definite import file_name

logger = logging.getLogger(__name__)

WORDS_FILE = "subject.yaml"
OWN_WORDS = {
    "instance_prompt": str,
    "class_prompt": str,
    "learned_word": str,
    "validation_prompts": list,
}
RARE_WORD = "sks"  # for subjects that are called by what they are alone


@dataclass(frozen=True)
class Refused:
    """A subject that cannot be trained."""

    name: str
    folder: Path
    message: str  # why, in one sentence


def subject_folders(folder: str | Path) -> list[Path]:
    """The folders in `folder`, a subject each, by name; hidden ones and files are none.

    Raises SVFitError for a folder that is none, and for one that holds no other.
    """
    folder = Path(folder).expanduser()
    try:
        found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))
    except OSError as error:
        raise SVFitError(
            f"subjects {folder} cannot be read ({error.strerror}): give a folder of folders.", "subjects"
        ) from None
    if not found:
        raise SVFitError(f"subjects {folder} holds no folders: put the photos of each subject into one.", "subjects")
    return found


def subject_configs(folders: Sequence[str | Path], common: TrainConfig) -> tuple[list[TrainConfig], list[Refused]]:
    """A config for each subject of `folders`, in <output_dir>/<its name>, and the subjects that cannot have one.

    `common`: what all share.  Subjects of which another has the name already are refused, without regard to capitals;
    two that are called by the same words are named in a logged warning: their adapters cannot be told apart in one
    picture.  Raises SVFitError where `common` itself names a single subject.
    """
    for name in ("adapter_name", "hub_model_id", "init_adapter"):
        if getattr(common, name) is not None:
            raise SVFitError(f"{name} is for one subject, and there are {len(folders)}: leave it out.", name)
    configs: list[TrainConfig] = []
    refused: list[Refused] = []
    taken: dict[str, Path] = {}
    for folder in map(Path, folders):
        name = file_name(folder.resolve().name)
        try:
            if name.casefold() in taken:
                raise SVFitError(f"{folder} is called like {taken[name.casefold()]}: rename one of them.")
            configs.append(_config(folder, name, common))
            taken[name.casefold()] = folder
        except SVFitError as error:
            refused.append(Refused(name, folder, str(error)))
    _warn_of_same_words(configs)
    return configs, refused


def _config(folder: Path, name: str, common: TrainConfig) -> TrainConfig:
    own: dict[str, Any] = read_words(folder)
    if "instance_prompt" not in own:
        own["instance_prompt"] = _prompt(folder, common.instance_prompt)
    if common.class_data_dir is not None:
        own["class_data_dir"] = common.class_data_dir  # of one class: painted once for all
    return dataclasses.replace(
        common,
        **own,
        instance_data_dir=str(folder),
        adapter_name=name,
        output_dir=str(Path(common.output_dir) / name),
    )


def _prompt(folder: Path, asked: str | None) -> str | None:
    words = folder_words(folder)
    if words is not None and asked is None:
        return words[1]
    shown = words[1] if words is not None else folder.resolve().name.replace("_", " ").strip()
    if asked is not None:
        return asked.replace("{}", shown)
    if all(photo.captions for photo in find_photos(folder)):
        return None
    return f"a photo of {shown}" if " " in shown else f"a photo of {RARE_WORD} {shown}"


def read_words(folder: Path) -> dict[str, Any]:
    """What subject.yaml in `folder` says; nothing without one.  Raises SVFitError for one that cannot be read."""
    import yaml

    path = folder / WORDS_FILE
    if not path.is_file():
        return {}
    try:
        found = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise SVFitError(
            f"{path} cannot be read ({' '.join(str(error).split())}): give lines such as `instance_prompt: ...`."
        ) from None
    if not isinstance(found, dict):
        raise SVFitError(f"{path} must hold lines such as `instance_prompt: a photo of sks dog`.")
    for name, value in found.items():
        if name not in OWN_WORDS:
            raise SVFitError(f"{path} has {name!r}, but a subject has {', '.join(OWN_WORDS)} of its own.")
        if not isinstance(value, OWN_WORDS[name]) or not value or not all(isinstance(each, str) for each in value):
            kind = "a text" if OWN_WORDS[name] is str else "a list of texts"
            raise SVFitError(f"{path} has {value!r} as {name}, which is {kind}.")
    return found


def _warn_of_same_words(configs: Sequence[TrainConfig]) -> None:
    called: dict[str, list[str]] = {}
    for config in configs:
        if config.instance_prompt is not None:
            called.setdefault(config.instance_prompt.casefold(), []).append(str(config.adapter_name))
    for words, names in called.items():
        if len(names) > 1:
            logger.warning(
                "%s are all called %r: give each a word of its own to use them in one picture.", ", ".join(names), words
            )
