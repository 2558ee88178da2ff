"""A base model without its weights: all that its configs and its tokenizer tell."""

import inspect
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from svfit_dreambooth.bases.families import family_named
from svfit_dreambooth.bases.hub import is_cached, reason_of
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.names import DEFAULT_BASE, EMBEDDED_WEIGHTS, as_asked, base_name
from svfit_dreambooth.bases.networks import class_of, outline_network
from svfit_dreambooth.bases.opening import check_base_model, check_exchangeable, check_quantizable
from svfit_dreambooth.bases.quantizing import check_library
from svfit_dreambooth.errors import SVFitError


def outline_base_model(
    name: str = DEFAULT_BASE, *, revision: str | None = None, base_config: str | None = None
) -> BaseModel:
    """The base model `name` with networks on the meta device, which have shapes and no numbers; as `open_base_model`.

    Opens no weights and asks no network.  Raises SVFitError for a base whose configs are not on this disk.
    """
    name = as_asked(name)
    check_base_model(name, base_config)
    path = EMBEDDED_WEIGHTS if name == DEFAULT_BASE else Path(name)
    if path.is_file() and base_config is None:
        raise SVFitError(f"{name} holds no configs: name a folder that has them with base_config.")
    source = str(base_config) if path.is_file() else str(path) if path.exists() else name
    location: dict[str, Any] = {"local_files_only": True}
    if not path.exists():
        location["revision"] = revision
    try:
        index = DiffusionPipeline.load_config(source, **location)
        family = family_named(index["_class_name"], name)
        without = family.load_options(content_filter=False)
        parts = {
            part: outline_network(source, part, class_of(name, part, index), **location)
            for part, kind in index.items()
            if _is_part(kind) and kind[0] is not None and part not in without and part != "feature_extractor"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SVFitError):
            raise
        raise SVFitError(f"the configs of {name} cannot be read from this disk: {reason_of(error, name)}.") from error
    absent = {part: None for part, kind in index.items() if _is_part(kind) and part not in parts}
    taken = inspect.signature(family.pipeline_class.__init__).parameters
    options = {name: value for name, value in index.items() if name in taken and not _is_part(value)}
    model = BaseModel(
        base_name(path) if path.exists() and name != DEFAULT_BASE else name + (f"@{revision}" if revision else ""),
        family.pipeline_class(**parts, **(options | absent | without)),
    )
    model.family.check(name)
    return model


def _is_part(entry: Any) -> bool:
    """Whether an entry of a model_index.json names the library and the class of a part, rather than an option."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str | None) for name in entry)


def check_wishes(
    name: str,
    *,
    revision: str | None = None,
    clip_skip: int | None = None,
    pretrained_vae_model_name_or_path: str | None = None,
    quantize: Any = None,
) -> None:
    """Raises SVFitError, before anything is opened, where the base `name` cannot be used in such a way.

    A base whose configs are not on this disk cannot be asked.
    """
    if quantize is not None:
        check_library(quantize)
        check_quantizable(name, quantize)
    here = name == DEFAULT_BASE or Path(name).is_dir() or is_cached(name, revision)
    if not here or not (clip_skip or pretrained_vae_model_name_or_path):
        return
    model = outline_base_model(name, revision=revision)
    model.family.read_earlier(clip_skip or 0)
    if pretrained_vae_model_name_or_path is not None:
        check_exchangeable(model, pretrained_vae_model_name_or_path)
