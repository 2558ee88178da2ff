"""Which adapters the networks of a pipeline carry, and with which strength."""

from dataclasses import dataclass, field
from itertools import count

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from svfit_dreambooth.bases.families import pipeline_components
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.arithmetic import add_shifts
from svfit_dreambooth.method.targets import set_shifts
from svfit_dreambooth.method.word import Pieces, word_embedding


@dataclass
class Loaded:
    """One adapter on one component: its shifts by canonical name, without the component, its strength, its words."""

    shifts: dict[str, Tensor]
    scale: float
    words: dict[Pieces, Tensor] = field(default_factory=dict)  # token ids of a learned word -> (tokens, dim)
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


def uncompiled(model: nn.Module) -> nn.Module:
    """`model` without what torch.compile puts around it."""
    return getattr(model, "_orig_mod", model)
