"""Adapters on a diffusers pipeline: load, set strengths, unload.

Each component (denoiser, text encoder) carries its loaded adapters with it, so pipelines that share components share
adapters.  All adapters of a base lie along the same directions: what a layer computes with is the sum of their
shifts, each times its strength.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import combinations, count
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from svfit_dreambooth.adapter.file import Adapter, read_adapter
from svfit_dreambooth.adapter.source import check_finite, find_adapter
from svfit_dreambooth.adapter.words import word_key
from svfit_dreambooth.bases.families import family_of, pipeline_components
from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.arithmetic import add_shifts
from svfit_dreambooth.method.basis import model_basis, same_base, weight_hashes
from svfit_dreambooth.method.layer import SVFitLayer, as_matrix
from svfit_dreambooth.method.targets import (
    check_plain,
    matrix_layers,
    merged,
    patch_layers,
    remove_svfit,
    set_shifts,
    svfit_layers,
)
from svfit_dreambooth.method.word import (
    WORD_END,
    Pieces,
    base_rows,
    install_words,
    overlap,
    remove_word_embedding,
    word_embedding,
    word_pieces,
)
from svfit_dreambooth.painting.offloading import layers_exchanged, offloading_lifted, weights_at_hand

logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """One adapter on one component: its shifts by canonical name, without the component, its strength, its words."""

    shifts: dict[str, Tensor]
    scale: float
    words: dict[Pieces, Tensor] = field(default_factory=dict)  # token ids of a learned word -> (tokens, dim)
    number: int = field(default_factory=count(1).__next__)  # in which order adapters came


def load_adapter(
    pipeline: DiffusionPipeline,
    adapter: str | Path | Adapter,
    scale: float = 1.0,
    name: str | None = None,
    *,
    allow_other_base: bool = False,
    basis_cache_dir: str | Path | None = None,
    known_hashes: dict[str, str] | None = None,
) -> str:
    """Loads an adapter onto `pipeline` beside those already there; `pipeline(prompt)` then uses it.

    `adapter`: a file, or a repository on the Hugging Face Hub as "owner/name[@revision]", see `source.find_adapter`.
    `scale`: its strength, 1 as trained; one at 0 rests.  `name`: how `set_adapters` and `unload_adapter` call it, by default the
    file's name without suffix; it is returned.  Offloaded pipelines stay offloaded.  `known_hashes`: who loads many
    adapters onto a base that nothing changes in between gives an empty dictionary and the same again each time, and
    its weights are read only once.
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
        words = _learned_words(family, name, adapter)
        in_force = [other for other, strength in loaded_adapters(pipeline).items() if strength and scale]
        check_meanings(pipeline, in_force, {name: words})
        hashes = _hashes(weights, adapter, known_hashes)
        _check_base(pipeline, adapter, name, weights, hashes, allow_other_base)
        for component in shifts:
            model = components[component]
            if (svfit_layers(model) or word_embedding(model)) and not adapters_on(model):
                raise SVFitError(f"the {component} is being trained: finish with remove_svfit before loading adapters.")
        try:
            for component, own in shifts.items():
                _widen(component, components[component], own, weights, hashes, basis_cache_dir)
            for component, own in shifts.items():
                adapters_on(components[component])[name] = Loaded(own, float(scale), words.get(component, {}))
                if component in words:
                    install_words(components[component], family.tokenizers[component])
                refresh(components[component])
                _plain(components[component]).save_pretrained = _saving_forbidden  # type: ignore[assignment]
        except BaseException:  # out of memory, Ctrl-C: as it was before
            for component in shifts:
                _take_off(components[component], name)
            raise
    return name


def check_adapter(
    pipeline: DiffusionPipeline,
    adapter: Adapter,
    name: str,
    *,
    allow_other_base: bool = False,
    known_hashes: dict[str, str] | None = None,
) -> None:
    """Raises SVFitError where `load_adapter` would refuse `adapter`, called `name`, for its base; loads nothing."""
    with offloading_lifted(pipeline):
        weights = adapted_weights(pipeline, adapter, name)
        _learned_words(family_of(pipeline), name, adapter)
        _check_base(pipeline, adapter, name, weights, _hashes(weights, adapter, known_hashes), allow_other_base)


def _hashes(weights: Mapping[str, Tensor], adapter: Adapter, known: dict[str, str] | None) -> dict[str, str]:
    """`weight_hashes` of the weights that `adapter` changes; those of layers are taken from `known`, and put there."""
    known = {} if known is None else known
    hashes = {key: known[key] for key in weights if key in known}
    hashes |= weight_hashes({key: weight for key, weight in weights.items() if key not in known})
    known |= {key: hash for key, hash in hashes.items() if key not in adapter.word_deltas()}
    return hashes


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


def unload_adapter(pipeline: DiffusionPipeline, name: str | None = None) -> None:
    """Takes off the adapter `name`, or all of them; without any, the pipeline is the base again, to the bit."""
    if name is not None:
        check_loaded(pipeline, name)
    with layers_exchanged(pipeline):
        for model in pipeline_components(pipeline).values():
            if adapters_on(model):  # without adapters, layers of SVFit are those of a training
                _take_off(model, *([name] if name is not None else list(adapters_on(model))))


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
        vars(_plain(model)).pop("save_pretrained", None)  # the class has its own


def _plain(model: nn.Module) -> nn.Module:
    """`model` without what torch.compile puts around it."""
    return getattr(model, "_orig_mod", model)


def _saving_forbidden(*args: object, **kwargs: object) -> None:
    raise SVFitError(
        "this model carries SVFit adapters, which save_pretrained would lose: unload them first, or write a model with "
        "them merged in by the command export, format merged."
    )


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


@contextmanager
def merge_adapters(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within it the adapters are merged into the weights, which then cost nothing extra; afterwards as before."""
    with ExitStack() as stack:
        if weights_at_hand(pipeline):
            for model in pipeline_components(pipeline).values():
                stack.enter_context(merged(model))
        yield


def adapters_on(model: nn.Module) -> dict[str, Loaded]:
    """The adapters of one network, by name: the dictionary itself."""
    model = _plain(model)
    if not hasattr(model, "svfit_adapters"):
        model.svfit_adapters = {}  # type: ignore[assignment]
    return model.svfit_adapters  # type: ignore[return-value]


def adapted_weights(pipeline: DiffusionPipeline, adapter: Adapter, name: str) -> dict[str, Tensor]:
    """The base's weights that `adapter`, called `name` in errors, changes, as its fingerprint is taken over them.

    "<component>.<path>" -> (out, in), and the embeddings (tokens, dim) of its words.  Raises SVFitError for another
    architecture than the adapter's.
    """
    family = family_of(pipeline)
    components = family.components
    weights: dict[str, Tensor] = {}
    if missing := set(adapter.components) - set(components):
        raise SVFitError(f"the adapter {name!r} changes {', '.join(sorted(missing))}, which this pipeline lacks.")
    for component in adapter.components:
        found = matrix_layers(components[component])
        for path, shift in adapter.component_shifts(component).items():
            layer = found[path][2] if path in found else None
            if layer is None or len(shift) > min(as_matrix(layer.weight).shape):
                raise SVFitError(
                    f"the adapter {name!r} was trained on {adapter.base_model}, whose {component} is built otherwise "
                    f"than this one ({path}): load it on that base."
                )
            check_plain(f"{component}.{path}", layer)
            weight = layer.base_weight if isinstance(layer, SVFitLayer) else layer.weight.detach()
            weights[f"{component}.{path}"] = as_matrix(weight)
    for number, word in enumerate(adapter.learned_words):
        for component in word.deltas:
            pieces = word_pieces(family.tokenizers[component], word.word)
            weights[word_key(component, number)] = base_rows(components[component], pieces)
    return weights


def _learned_words(family: Family, name: str, adapter: Adapter) -> dict[str, dict[Pieces, Tensor]]:
    """The adapter's words: component -> pieces -> (tokens, dim)."""
    words: dict[str, dict[Pieces, Tensor]] = {}
    for learned in adapter.learned_words:
        for component, delta in learned.deltas.items():
            tokenizer = family.tokenizers[component]
            pieces = word_pieces(tokenizer, learned.word)
            embedding = family.components[component].get_input_embeddings()  # type: ignore[operator]
            spelling = tokenizer.convert_ids_to_tokens(list(pieces))
            if spelling != learned.tokens[component] or delta.shape[1] != embedding.embedding_dim:
                raise SVFitError(
                    f"the adapter {name!r} learned the word {learned.word!r} on {adapter.base_model}, and the "
                    f"{component} of this pipeline reads it otherwise: load it on that base."
                )
            words.setdefault(component, {})[pieces] = delta
    return words


def check_meanings(
    pipeline: DiffusionPipeline,
    names: Sequence[str],
    new: Mapping[str, Mapping[str, Mapping[Pieces, Tensor]]] | None = None,
) -> None:
    """Raises SVFitError where two of the adapters `names`, or of `new` ones, learned the same word.

    `new`: name -> component -> pieces -> (tokens, dim), of adapters that are not loaded yet.
    """
    family = family_of(pipeline)
    for component in family.components.keys() & family.tokenizers.keys():
        loaded, tokenizer = adapters_on(family.components[component]), family.tokenizers[component]
        known = [(name, pieces) for name in names if name in loaded for pieces in loaded[name].words]
        known += [(name, pieces) for name, words in (new or {}).items() for pieces in words.get(component, {})]
        for (first, one), (second, other) in combinations(known, 2):
            if overlap(one, other):
                word = "".join(tokenizer.convert_ids_to_tokens(list(other))).replace(WORD_END, "")
                raise SVFitError(
                    f"the adapters {first!r} and {second!r} both learned the word {word!r}, which can mean only one "
                    f"of them: unload {first!r} or set it to 0, or train one with another word."
                )


def _check_base(
    pipeline: DiffusionPipeline,
    adapter: Adapter,
    name: str,
    weights: Mapping[str, Tensor],
    hashes: Mapping[str, str],
    allow_other_base: bool,
) -> None:
    likeness = same_base(adapter.base_fingerprint, weights, hashes)
    here = pipeline.config.get("_name_or_path") or "another model"
    if likeness == "similar":
        logger.warning(
            "the adapter %r was trained on a more precise or slightly different copy of this base (%s): pictures "
            "will differ a little from those of its author.",
            name,
            adapter.base_model,
        )
    if likeness == "different" and not allow_other_base:
        raise SVFitError(
            f"the adapter {name!r} was trained on {adapter.base_model}, and this pipeline holds other weights "
            f"({Path(here).name}): load it on that base, export it from there as a LoRA, or, for a fine-tune of the "
            "same family, allow the other base explicitly."
        )


def _widen(
    component: str,
    model: nn.Module,
    shifts: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    hashes: Mapping[str, str],
    basis_cache_dir: str | Path | None,
) -> None:
    """Gives every layer named in `shifts` a basis of at least the rank that its shift needs."""
    present = svfit_layers(model)
    narrow = {path: len(s) for path, s in shifts.items() if path not in present or present[path].rank < len(s)}
    if not narrow:
        return
    bases = model_basis(
        {path: weights[f"{component}.{path}"] for path in narrow},
        narrow,
        cache_dir=basis_cache_dir,
        description=f"decomposing the {component}",
        hashes={path: hashes[f"{component}.{path}"] for path in narrow},
    )
    try:
        patch_layers(model, bases)
    finally:  # also those that were patched before something went wrong
        for layer in svfit_layers(model).values():
            layer.shift.requires_grad_(False)


def refresh(model: nn.Module) -> None:
    """Sets what `model` computes with to the sum of its adapters."""
    registry = [loaded for loaded in adapters_on(model).values() if loaded.scale]
    set_shifts(model, add_shifts([(loaded.shifts, loaded.scale) for loaded in registry]))
    embedding = word_embedding(model)
    if embedding is not None:
        embedding.put({pieces: loaded.scale * d for loaded in registry for pieces, d in loaded.words.items()})
