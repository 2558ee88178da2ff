"""Adapters on a diffusers pipeline: load, set strengths, unload.

Each component (denoiser, text encoder) carries its loaded adapters with it, so pipelines that share components share
adapters.  All adapters of a base lie along the same directions: what a layer computes with is the sum of their
shifts, each times its strength.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from svfit_dreambooth.adapter.file import Adapter, read_adapter
from svfit_dreambooth.adapter.source import check_finite, find_adapter
from svfit_dreambooth.bases.families import family_of, pipeline_components
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import model_triplets
from svfit_dreambooth.method.quantized import is_quantized
from svfit_dreambooth.method.targets import merged, patch_layers, remove_svfit, svfit_layers
from svfit_dreambooth.method.weights import Lazy
from svfit_dreambooth.method.word import install_words, remove_word_embedding, word_embedding
from svfit_dreambooth.painting.matching import (
    adapted_weights,
    base_hashes,
    check_base,
    check_directions,
    check_meanings,
    meanings_of,
    trained_weights,
)
from svfit_dreambooth.painting.offloading import layers_exchanged, offloading_lifted, weights_at_hand
from svfit_dreambooth.painting.registry import (
    Loaded,
    adapters_on,
    check_loaded,
    loaded_adapters,
    read_as_trained,
    refresh,
    uncompiled,
)


def load_adapter(
    pipeline: DiffusionPipeline,
    adapter: str | Path | Adapter,
    scale: float = 1.0,
    name: str | None = None,
    *,
    allow_other_base: bool = False,
    trained_on: BaseModel | None = None,
    basis_cache_dir: str | Path | None = None,
    known_hashes: dict[str, str] | None = None,
) -> str:
    """Loads an adapter onto `pipeline` beside those already there; `pipeline(prompt)` then uses it.

    `adapter`: a file, or a repository on the Hugging Face Hub as "owner/name[@revision]", see `source.find_adapter`.
    Prompts are then read with the `clip_skip` that it was trained with.
    `scale`: its strength, 1 as trained; one at 0 rests.  `name`: how `set_adapters` and `unload_adapter` call it, by default the
    file's name without suffix; it is returned.  Offloaded pipelines stay offloaded.  `known_hashes`: who loads many
    adapters onto a base that nothing changes in between gives an empty dictionary and the same again each time, and
    its weights are read only once.
    `trained_on`: the base that the adapter was trained on, where `pipeline` holds another one of the same shapes, such
    as what was distilled from it: the adapter then adds exactly what it adds there.
    Raises SVFitError for a bad file, a name in use, a word that another adapter in force learned, and a pipeline that holds another base than the adapter was
    trained on, unless `allow_other_base` (for fine-tunes of the same family).
    """
    if not isinstance(adapter, Adapter):
        path = find_adapter(adapter)
        name = name or path.stem
        adapter = read_adapter(path)
    name = name or adapter.title or "adapter"
    check_finite(f"the strength of {name}", scale)
    family = family_of(pipeline)
    components = family.components
    if name in loaded_adapters(pipeline):
        raise SVFitError(f"an adapter named {name!r} is loaded already: unload it first, or give another name.")
    shifts = {component: adapter.component_shifts(component) for component in adapter.components}
    with layers_exchanged(pipeline):
        weights = adapted_weights(pipeline, adapter, name)
        words = meanings_of(family, name, adapter)
        in_force = [other for other, strength in loaded_adapters(pipeline).items() if strength and scale]
        check_meanings(pipeline, in_force, {name: words})
        if trained_on is None:
            hashes = base_hashes(weights, adapter, known_hashes)
            check_base(pipeline, adapter, name, weights, hashes, allow_other_base)
            source: Mapping[str, Tensor] = weights
        else:
            source, hashes = trained_weights(trained_on, adapter, name)
        directions = None if trained_on is None else trained_on.name
        check_directions(components, shifts, name, directions)
        for component in shifts:
            model = components[component]
            if (svfit_layers(model) or word_embedding(model)) and not adapters_on(model):
                raise SVFitError(f"the {component} is being trained: finish with remove_svfit before loading adapters.")
        try:
            for component, own in shifts.items():
                _widen(component, components[component], own, source, hashes, basis_cache_dir, directions)
            for component, own in shifts.items():
                adapters_on(components[component])[name] = Loaded(
                    own, float(scale), words.get(component, {}), adapter.clip_skip, directions
                )
                if component in words:
                    install_words(components[component], family.tokenizers[component])
                refresh(components[component])
                uncompiled(components[component]).save_pretrained = _saving_forbidden  # type: ignore[assignment]
            read_as_trained(pipeline)
        except BaseException:  # out of memory, Ctrl-C: as it was before
            for component in shifts:
                _take_off(components[component], name)
            raise
    return name


def set_adapters(pipeline: DiffusionPipeline, strengths: Mapping[str, float]) -> None:
    """Sets the strengths of loaded adapters by name; those not named rest at 0.  Nothing is reloaded.

    Raises SVFitError for a name that is not loaded, and for two in force that learned the same word.
    """
    check_loaded(pipeline, *strengths)
    check_meanings(pipeline, [name for name, strength in strengths.items() if strength])
    for name, strength in strengths.items():
        check_finite(f"the strength of {name}", strength)
    with offloading_lifted(pipeline):
        for model in pipeline_components(pipeline).values():
            for name, loaded in adapters_on(model).items():
                loaded.scale = float(strengths.get(name, 0.0))
            refresh(model)
    read_as_trained(pipeline)


def unload_adapter(pipeline: DiffusionPipeline, name: str | None = None) -> None:
    """Takes off the adapter `name`, or all of them; without any, the pipeline is the base again, to the bit."""
    if name is not None:
        check_loaded(pipeline, name)
    with layers_exchanged(pipeline):
        for model in pipeline_components(pipeline).values():
            if adapters_on(model):  # without adapters, layers of SVFit are those of a training
                _take_off(model, *([name] if name is not None else list(adapters_on(model))))
    read_as_trained(pipeline)


def _take_off(model: nn.Module, *names: str) -> None:
    """Takes those of the adapters `names` that `model` has off it; without any left, it is the base again."""
    registry = adapters_on(model)
    for name in names:
        registry.pop(name, None)
    if registry:
        refresh(model)
    else:
        remove_svfit(model)
        remove_word_embedding(model)
        vars(uncompiled(model)).pop("save_pretrained", None)  # the class has its own


def _saving_forbidden(*args: object, **kwargs: object) -> None:
    raise SVFitError(
        "this model carries SVFit adapters, which save_pretrained would lose: unload them first, or write a model with "
        "them merged in by the command export, format merged."
    )


@contextmanager
def merge_adapters(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within it the adapters are merged into the weights, which then cost nothing extra; afterwards as before.

    Those of a network whose weights are offloaded layer by layer, or quantised, stay beside them.
    """
    with ExitStack() as stack:
        if weights_at_hand(pipeline):
            for model in pipeline_components(pipeline).values():
                if not any(map(is_quantized, svfit_layers(model).values())):
                    stack.enter_context(merged(model))
        yield


def _widen(
    component: str,
    model: nn.Module,
    shifts: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    hashes: Mapping[str, str],
    basis_cache_dir: str | Path | None,
    directions: str | None,
) -> None:
    """Gives every layer named in `shifts` a basis of at least the rank that its shift needs.

    That of another base, named by `directions`, keeps both sides: one alone would change what this base's weight makes of it.
    """
    present = svfit_layers(model)
    narrow = {path: len(s) for path, s in shifts.items() if path not in present or present[path].rank < len(s)}
    if not narrow:
        return
    bases: Mapping[str, Sequence[Tensor]] = model_triplets(
        Lazy({path: lambda path=path: weights[f"{component}.{path}"] for path in narrow}),  # type: ignore[misc]
        narrow,
        cache_dir=basis_cache_dir,
        description=f"decomposing the {component}",
        hashes={path: hashes[f"{component}.{path}"] for path in narrow},
    )
    if directions is not None:
        bases = {path: (U, Vh) for path, (U, _, Vh) in bases.items()}
    try:
        patch_layers(model, bases)
    finally:  # also those that were patched before something went wrong
        for layer in svfit_layers(model).values():
            layer.shift.requires_grad_(False)
