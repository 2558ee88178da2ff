"""Whether an adapter is one for the base that a pipeline holds, and whether it gets on with those already there."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.adapter.words import word_key
from svfit_dreambooth.bases.families import family_of
from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.names import check_held, split_revision, spoken
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import distance, same_base, weight_hashes
from svfit_dreambooth.method.decomposition import as_matrix, matrix_shape
from svfit_dreambooth.method.layer import SVFitLayer
from svfit_dreambooth.method.quantized import stored_weight
from svfit_dreambooth.method.targets import check_plain, matrix_layers
from svfit_dreambooth.method.weights import Lazy, chosen
from svfit_dreambooth.method.word import WORD_END, Pieces, base_rows, overlap, word_pieces
from svfit_dreambooth.painting.offloading import offloading_lifted
from svfit_dreambooth.painting.registry import adapters_on

logger = logging.getLogger(__name__)

# How far apart, see `basis.distance`, the weights of a base and of what was distilled from it may lie.  The change along
# the other's directions is off by 30 % at .01, 65 % at .03 and more than it is itself at .1, of all singular values; of
# the 16 leading ones by 5, 12 and 40 % (trained weights of the embedded base, moved at random, random shifts).
RELATED = 0.03
UNRELATED = 1.0  # further apart than that are weights that have nothing to do with each other


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
        meanings_of(family_of(pipeline), name, adapter)
        check_base(pipeline, adapter, name, weights, base_hashes(weights, adapter, known_hashes), allow_other_base)


def adapted_weights(pipeline: DiffusionPipeline, adapter: Adapter, name: str) -> dict[str, Tensor]:
    """The base's weights that `adapter`, called `name` in errors, changes, as its fingerprint is taken over them.

    "<component>.<path>" -> (out, in), and the embeddings (tokens, dim) of its words.  Raises SVFitError for another
    architecture than the adapter's.
    """
    family = family_of(pipeline)
    components = family.components
    weights: dict[str, Tensor] = {}
    if missing := set(adapter.components) - set(components):
        raise SVFitError(
            f"the adapter {name!r} changes {', '.join(sorted(missing))}, which this pipeline lacks: open the base that it "
            f"was trained on, {spoken(adapter.base_model)}."
        )
    for component in adapter.components:
        found = matrix_layers(components[component])
        for path, shift in adapter.component_shifts(component).items():
            layer = found[path][2] if path in found else None
            if layer is None or len(shift) > min(matrix_shape(layer)):
                check_held(adapter.base_model, f"the adapter {name!r}")
                raise SVFitError(
                    f"the adapter {name!r} was trained on {adapter.base_model}, whose {component} is built otherwise "
                    f"than this one ({path}): load it on that base."
                )
            check_plain(f"{component}.{path}", layer)
            weight = layer.base_weight if isinstance(layer, SVFitLayer) else stored_weight(path, layer)
            weights[f"{component}.{path}"] = as_matrix(weight)
    for number, word in enumerate(adapter.learned_words):
        for component in word.deltas:
            pieces = word_pieces(family.tokenizers[component], word.word)
            weights[word_key(component, number)] = base_rows(components[component], pieces)
    return weights


def trained_weights(trained_on: BaseModel, adapter: Adapter, name: str) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The weights that `adapter` was trained on, as `adapted_weights` of that base, and their hashes.

    Raises SVFitError where `trained_on` is another base.
    """
    stored = trained_on.stored
    if stored is None:
        weights: Mapping[str, Tensor] = adapted_weights(trained_on.pipeline, adapter, name)
    else:
        component = trained_on.family.denoiser_name
        held = stored.weights(component)
        paths = {key: key.removeprefix(f"{component}.") + ".weight" for key in adapter.shifts}
        if missing := [key for key, path in paths.items() if path not in held]:
            raise SVFitError(f"trained_on {trained_on.name} has no {missing[0]}, which the adapter {name!r} changes.")
        weights = Lazy({key: lambda path=path: as_matrix(held[path]) for key, path in paths.items()})  # type: ignore[misc]
    hashes = weight_hashes(weights)
    if same_base(adapter.base_fingerprint, weights, hashes) == "different":
        raise SVFitError(
            f"the adapter {name!r} was trained on {adapter.base_model}, and trained_on {trained_on.name} is another base."
        )
    return weights, hashes


def check_directions(
    components: Mapping[str, nn.Module], shifted: Iterable[str], name: str, directions: str | None
) -> None:
    """Raises SVFitError where an adapter that is loaded lies along directions of another base than `directions`."""
    for component in shifted:
        for other, loaded in adapters_on(components[component]).items():
            if loaded.directions != directions:
                raise SVFitError(
                    f"the adapters {other!r} and {name!r} lie along the directions of different bases, "
                    f"{loaded.directions or 'this one'} and {directions or 'this one'}: unload {other!r} first, or load "
                    "both with trained_on."
                )


def _is_distilled(family: Family, base_model: str) -> bool:
    """Whether the base of `family` was distilled from the one called `base_model`, a hub id or a folder of its name."""
    sibling = family.undistilled
    repository, _ = split_revision(base_model)
    return sibling is not None and sibling.rpartition("/")[2].lower() == repository.rpartition("/")[2].lower()


def base_hashes(weights: Mapping[str, Tensor], adapter: Adapter, known: dict[str, str] | None) -> dict[str, str]:
    """`weight_hashes` of the weights that `adapter` changes; those of layers are taken from `known`, and put there."""
    known = {} if known is None else known
    hashes = {key: known[key] for key in weights if key in known}
    hashes |= weight_hashes(chosen(weights, [key for key in weights if key not in known]))
    known |= {key: hash for key, hash in hashes.items() if key not in adapter.word_deltas()}
    return hashes


def meanings_of(family: Family, name: str, adapter: Adapter) -> dict[str, dict[Pieces, Tensor]]:
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


def check_base(
    pipeline: DiffusionPipeline,
    adapter: Adapter,
    name: str,
    weights: Mapping[str, Tensor],
    hashes: Mapping[str, str],
    allow_other_base: bool,
) -> None:
    """Raises SVFitError where `weights` are not those that `adapter` was trained on, unless `allow_other_base`.

    A base that was distilled from that one, as far as its family tells and the weights agree, is none of the others: the
    adapter is loaded along its directions, and a warning says what that is.
    """
    likeness = same_base(adapter.base_fingerprint, weights, hashes)
    if likeness == "similar":
        logger.warning(
            "the adapter %r was trained on a more precise or slightly different copy of this base (%s): pictures "
            "will differ a little from those of its author.",
            name,
            adapter.base_model,
        )
    if likeness == "different" and _is_distilled(family_of(pipeline), adapter.base_model):
        apart = distance(adapter.base_fingerprint, weights, hashes)
        relation = (
            f"the adapter {name!r} was trained on {adapter.base_model}, from which this base was distilled; their weights "
            f"are {100 * apart:.0f} % apart"
        )
        if apart <= RELATED:
            logger.warning(
                "%s, and along this base's own directions the adapter does only in part what it learnt: with trained_on, "
                "the base that it was trained on, it does exactly that.",
                relation,
            )
            return
        if apart <= UNRELATED and not allow_other_base:
            raise SVFitError(
                f"{relation}, too far for this base's own directions: give that base with trained_on, whose directions are "
                "exact.",
                "trained_on",
            )
    if likeness == "different" and not allow_other_base:
        check_held(adapter.base_model, f"the adapter {name!r}")
        here = pipeline.config.get("_name_or_path") or "another model"
        raise SVFitError(
            f"the adapter {name!r} was trained on {adapter.base_model}, and this pipeline holds other weights "
            f"({Path(here).name}): load it on that base, export it from there as a LoRA, or, for a fine-tune of the "
            "same family, allow the other base explicitly."
        )
