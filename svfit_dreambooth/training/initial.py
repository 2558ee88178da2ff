"""The adapter that a run starts from, `init_adapter`: whether it can go on with the base and options of the run."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from svfit_dreambooth.adapter.file import Adapter, read_adapter
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.names import check_held, spoken
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import same_base
from svfit_dreambooth.method.weights import chosen, joined
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.words import word_rows


def read_initial(config: TrainConfig) -> Adapter | None:
    """The adapter that the run starts from, if any.

    Raises SVFitError for a file that is none, and for one with more singular values in a layer than the run keeps.
    """
    path = config.init_adapter
    if path is None:
        return None
    if not Path(path).exists():
        raise SVFitError(f"init_adapter {path} does not exist.")
    initial = read_adapter(path)
    if config.energy is not None:
        recorded = initial.training.get("energy")  # more energy never keeps fewer; other ranks only the base tells
        if not isinstance(recorded, int | float) or recorded > config.energy:
            raise SVFitError(
                f"energy {config.energy} may keep fewer singular values than init_adapter {path} has, as it was "
                "not made with an energy up to that: leave it out.",
                "energy",
            )
    elif config.rank_value != "full":
        longest = max((len(shift) for shift in initial.shifts.values()), default=0)
        if longest > config.rank_value:
            raise SVFitError(
                f"rank {config.rank} keeps fewer singular values than the {longest} of a layer that init_adapter "
                f"{path} has: leave rank out, or use {longest} or more.",
                "rank",
            )
    return initial


def check_initial(
    initial: Adapter,
    config: TrainConfig,
    base: BaseModel,
    weights: Mapping[str, Tensor],
) -> None:
    """Raises SVFitError unless `initial` is of `base`, and changes only what the run trains.

    `weights`: that the run adapts, "<component>.<layer>" -> (out, in).
    """
    path, word = config.init_adapter, config.learned_word
    for learned in initial.learned_words:
        if learned.word != word:
            raise SVFitError(f"init_adapter {path} learned a word: add learned_word {learned.word}.")
    if (misfit := _misfit(initial, word, base, weights)) is not None:
        check_held(initial.base_model, f"init_adapter {path}")
        raise SVFitError(f"init_adapter {path} {misfit}.")


def _misfit(initial: Adapter, word: str | None, base: BaseModel, weights: Mapping[str, Tensor]) -> str | None:
    """What is wrong with going on from `initial`, without a full stop; None: nothing."""
    lacking = sorted(set(initial.components) - set(base.family.networks))
    if lacking:
        return f"changes {lacking[0]}, which this base lacks: it was trained on {spoken(initial.base_model)}"
    missing = sorted(set(initial.shifts) - set(weights))
    if missing:
        return (
            f"adapts {missing[0]}, which this run does not train: use the same target_modules and train_text_encoder as "
            "its run"
        )
    names = {*initial.shifts, *initial.word_deltas()}
    all_weights = joined(weights, word_rows(base.family, word))
    own = chosen(all_weights, [name for name in all_weights if name in names])
    if same_base(initial.base_fingerprint, own) == "different":
        return f"was trained on another base model, {initial.base_model}"
    return None
