"""Which adapters the networks of a pipeline carry, and with which strength."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from svfit_dreambooth.bases.families import family_of, pipeline_components
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.arithmetic import add_shifts
from svfit_dreambooth.method.targets import set_shifts
from svfit_dreambooth.method.word import Pieces, word_embedding

logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """One adapter on one component: its shifts by canonical name, without the component, its strength, its words."""

    shifts: dict[str, Tensor]
    scale: float
    words: dict[Pieces, Tensor] = field(default_factory=dict)  # token ids of a learned word -> (tokens, dim)
    clip_skip: int = 0  # with which it was trained
    directions: str | None = None  # the base along whose directions it lies; None: this one's own
    number: int = field(default_factory=count(1).__next__)  # in which order adapters came


def adapters_on(model: nn.Module) -> dict[str, Loaded]:
    """The adapters of one network, by name: the dictionary itself."""
    model = uncompiled(model)
    if not hasattr(model, "svfit_adapters"):
        model.svfit_adapters = {}  # type: ignore[assignment]
    return model.svfit_adapters  # type: ignore[return-value]


def loaded_adapters(pipeline: DiffusionPipeline) -> dict[str, float]:
    """Names and strengths of the adapters on `pipeline`, in the order in which they were loaded."""
    registries = [adapters_on(model) for model in pipeline_components(pipeline).values()]
    found = [(loaded.number, name, loaded.scale) for registry in registries for name, loaded in registry.items()]
    return {name: scale for _, name, scale in sorted(found)}


def check_loaded(pipeline: DiffusionPipeline, *names: str) -> None:
    """Raises SVFitError for a name that no adapter on `pipeline` has."""
    present = loaded_adapters(pipeline)
    for name in names:
        if name not in present:
            raise SVFitError(f"no adapter named {name!r} is loaded, only: {', '.join(present) or 'none'}.")


def refresh(model: nn.Module) -> None:
    """Sets what `model` computes with to the sum of its adapters."""
    registry = [loaded for loaded in adapters_on(model).values() if loaded.scale]
    set_shifts(model, add_shifts([(loaded.shifts, loaded.scale) for loaded in registry]))
    embedding = word_embedding(model)
    if embedding is not None:
        embedding.put({pieces: loaded.scale * d for loaded in registry for pieces, d in loaded.words.items()})


def clip_skips(pipeline: DiffusionPipeline) -> dict[str, int]:
    """With which `clip_skip` each adapter on `pipeline` was trained, by name, in the order of `loaded_adapters`."""
    registries = [adapters_on(model) for model in pipeline_components(pipeline).values()]
    found = {name: loaded.clip_skip for registry in registries for name, loaded in registry.items()}
    return {name: found[name] for name in loaded_adapters(pipeline)}


def other_base(pipeline: DiffusionPipeline) -> str | None:
    """The base along whose directions the adapters on `pipeline` lie, where that is another one."""
    registries = [adapters_on(model) for model in pipeline_components(pipeline).values()]
    return next((one.directions for registry in registries for one in registry.values() if one.directions), None)


def read_as_trained(pipeline: DiffusionPipeline) -> None:
    """Has prompts read as the adapters in force were trained, see `Family.read_earlier`; where these differ, as the first.

    With all at rest it stays as it is; without any, the base's own way comes back.
    """
    trained, strengths = clip_skips(pipeline), loaded_adapters(pipeline)
    if not trained:
        family_of(pipeline).read_earlier(0)
        return
    in_force = [name for name, strength in strengths.items() if strength]
    if not in_force:
        return
    first, *others = in_force
    for other in others:
        if trained[other] != trained[first]:
            logger.warning(
                "%s was trained with clip_skip %d and %s with %d: prompts are read as for %s.",
                first, trained[first], other, trained[other], first,
            )  # fmt: skip
    family_of(pipeline).read_earlier(trained[first])


def warn_of_clip_skip(pipeline: DiffusionPipeline, names: Iterable[str]) -> None:
    """Names in a warning those of the adapters `names` that were trained with another `clip_skip` than is read with."""
    trained, read = clip_skips(pipeline), family_of(pipeline).clip_skip
    for name in names:
        if trained[name] != read:
            logger.warning("%s was trained with clip_skip %d, and is painted with %d.", name, trained[name], read)


@contextmanager
def reading(pipeline: DiffusionPipeline, clip_skip: int | None) -> Iterator[None]:
    """Within it prompts are read with `clip_skip`, whatever adapters were trained with; None: as it stands."""
    family = family_of(pipeline)
    before = family.clip_skip
    if clip_skip is not None:
        family.read_earlier(clip_skip)
        warn_of_clip_skip(pipeline, [name for name, strength in loaded_adapters(pipeline).items() if strength])
    try:
        yield
    finally:
        family.read_earlier(before)


def uncompiled(model: nn.Module) -> nn.Module:
    """`model` without what torch.compile puts around it."""
    return getattr(model, "_orig_mod", model)
