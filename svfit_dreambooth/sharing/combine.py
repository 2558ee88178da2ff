"""Arithmetic of adapters: all adapters of a base lie along the same directions, so their sum is a sum of vectors."""

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.adapter.source import check_finite
from svfit_dreambooth.adapter.words import LearnedWord, word_key
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.arithmetic import add_shifts
from svfit_dreambooth.method.basis import fingerprint, same_base, samples_agree
from svfit_dreambooth.painting.matching import adapted_weights

logger = logging.getLogger(__name__)

Method = Literal["add", "average", "interpolate"]


def combined_weights(weights: Sequence[float], method: Method = "add", position: float | None = None) -> list[float]:
    """The factor of each adapter's shifts, given the strengths that the user wrote.

    "add": the strengths themselves; with one adapter, this scales it.  "average": strengths over their sum.
    "interpolate": between exactly two, (1 - position) of the first and position of the second, each at its strength.
    Raises SVFitError for what cannot be computed.
    """
    if not weights:
        raise SVFitError("there is nothing to combine: name one or more adapters.")
    for number in (*weights, position or 0.0):
        check_finite("a strength or position of what is combined", number)
    if method == "average":
        total = sum(weights)
        if total == 0:
            raise SVFitError("the strengths add up to 0, so there is no average: change one of them.")
        return [weight / total for weight in weights]
    if method == "interpolate":
        if len(weights) != 2 or position is None:
            raise SVFitError(f"interpolating needs two adapters and a position, not {len(weights)} adapters.")
        return [(1 - position) * weights[0], position * weights[1]]
    return list(weights)


def combine_adapters(
    adapters: Sequence[tuple[Adapter, float]],
    method: Method = "add",
    position: float | None = None,
    *,
    open_base: Callable[[], BaseModel] | None = None,
) -> Adapter:
    """One adapter that acts as the given ones, (adapter, strength) each, together; see `combined_weights`.

    Layers and values that only some have count as zero in the others.  The header of the result says what it was
    made of, under `combined_from`.  Adapters that change different layers of one component, or learned different words,
    can only be told to be of one base by its weights: `open_base` is then called.
    Raises SVFitError for adapters of different bases, where `open_base` is needed and None, and for a sum of adapters
    that learned the same word, which can mean only one of their subjects.
    """
    factors = combined_weights([strength for _, strength in adapters], method, position)
    first = adapters[0][0]
    recorded = _shared_fingerprint([adapter for adapter, _ in adapters])
    if recorded is None and open_base is None:
        raise SVFitError(
            f"{_title(first)} and the others adapt different layers or words, so only the weights of the base can tell "
            "whether it is theirs: name it with pretrained_model_name_or_path."
        )
    shifts = add_shifts([(adapter.shifts, factor) for (adapter, _), factor in zip(adapters, factors, strict=True)])
    parts = [_part(adapter, factor) for (adapter, _), factor in zip(adapters, factors, strict=True)]
    prompts = _unique(adapter.instance_prompt for adapter, _ in adapters)
    classes = _unique(adapter.class_prompt for adapter, _ in adapters)
    metadata = {
        "combined_from": json.dumps(parts, ensure_ascii=False),
        "modelspec.merged_from": ", ".join(_unique(part["title"] for part in parts)),
    }
    licences = _unique(adapter.metadata.get("modelspec.license") for adapter, _ in adapters)
    if licences:
        metadata["modelspec.license"] = "; ".join(licences)
    skipped = {_title(adapter): adapter.clip_skip for adapter, _ in adapters}
    if len(set(skipped.values())) > 1:
        named = ", ".join(f"{title} with {count}" for title, count in skipped.items())
        logger.warning("trained with different clip_skip (%s): the result remembers the first one's.", named)
    result = Adapter(
        training={"clip_skip": first.clip_skip} if first.clip_skip else {},
        shifts=shifts,
        learned_words=_combined_words([adapter for adapter, _ in adapters], factors, method),
        base_model=first.base_model,
        base_fingerprint=recorded or {},
        instance_prompt="; ".join(prompts) or None,
        class_prompt="; ".join(classes) or None,
        architecture=first.architecture,
        metadata=metadata,
    )
    if recorded is None and open_base is not None:
        result.base_fingerprint = _fingerprint_of([adapter for adapter, _ in adapters], result, open_base())
    return result


def _combined_words(adapters: Sequence[Adapter], factors: Sequence[float], method: Method) -> list[LearnedWord]:
    words: dict[str, LearnedWord] = {}
    for adapter, factor in zip(adapters, factors, strict=True):
        for word in adapter.learned_words:
            deltas = {component: factor * delta for component, delta in word.deltas.items()}
            if word.word in words:
                known = words[word.word]
                if method == "add" or known.tokens != word.tokens:
                    raise SVFitError(
                        f"{_title(adapter)} and another have both learned the word {word.word!r}, which can mean only "
                        "one of them: average or interpolate versions of one subject, or train with another word."
                    )
                deltas = {component: known.deltas[component] + delta for component, delta in deltas.items()}
            words[word.word] = LearnedWord(word.word, word.tokens, deltas)
    return list(words.values())


def _part(adapter: Adapter, factor: float) -> dict[str, Any]:
    """What the result remembers of one of its parts; of a part that was combined itself, its parts too."""
    part: dict[str, Any] = {
        "title": _title(adapter),
        "factor": round(factor, 6),
        "payload_sha256": adapter.metadata.get("payload_sha256"),
        "instance_prompt": adapter.instance_prompt,
    }
    if "combined_from" in adapter.metadata:
        try:
            part["combined_from"] = json.loads(adapter.metadata["combined_from"])
        except (ValueError, RecursionError):
            part["combined_from"] = None  # a damaged remark is no reason to refuse the numbers
    return part


def _title(adapter: Adapter) -> str:
    return adapter.title or "an adapter without title"


def _unique(texts: Any) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))


def _shared_fingerprint(adapters: Sequence[Adapter]) -> dict[str, Any] | None:
    """The fingerprint of the union, if the files alone tell that their base is one; None: they cannot tell.

    Raises SVFitError where they tell that it is not.
    """
    shared: dict[str, Any] = {}
    owner: dict[str, Adapter] = {}
    for adapter in adapters:
        for component in adapter.components:
            mine = adapter.base_fingerprint.get(component)
            if mine is None:
                raise SVFitError(f"{_title(adapter)} says nothing of its base's {component}: train it again.")
            if component not in shared:
                shared[component], owner[component] = mine, adapter
                continue
            other = owner[component]
            if _changed(other, component) != _changed(adapter, component):
                return None
            known = shared[component]
            if known["sha256"] != mine["sha256"] and not samples_agree(known["sample"], mine["sample"]):
                raise SVFitError(
                    f"{_title(adapter)} was trained on another base ({adapter.base_model}) than {_title(other)} "
                    f"({other.base_model}): their directions differ, so they cannot be combined."
                )
    components = {component for adapter in adapters for component in adapter.components}
    names = {adapter.base_model for adapter in adapters}
    if len(names) > 1 and len(components) == sum(len(adapter.components) for adapter in adapters):
        return None  # no component in common to compare, and names that differ: let the weights decide
    return shared


def _changed(adapter: Adapter, component: str) -> set[str]:
    """What of `component` the adapter's fingerprint is taken over."""
    words = {
        word_key(component, i) + word.word for i, word in enumerate(adapter.learned_words) if component in word.deltas
    }
    return set(adapter.component_shifts(component)) | words


def _fingerprint_of(adapters: Sequence[Adapter], result: Adapter, base: BaseModel) -> dict[str, Any]:
    """Of `base`, over what `result` changes; raises SVFitError unless it is the base of all `adapters`."""
    for adapter in adapters:
        if same_base(adapter.base_fingerprint, adapted_weights(base.pipeline, adapter, _title(adapter))) == "different":
            raise SVFitError(f"{_title(adapter)} was trained on another base model, {adapter.base_model}.")
    return fingerprint(adapted_weights(base.pipeline, result, "the result"))
