"""What a run trains: SVFit layers and a learned word, put into its base."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from svfit_dreambooth.adapter import Adapter, read_adapter
from svfit_dreambooth.adapter_words import LearnedWord, word_key
from svfit_dreambooth.attention import apply_svfit, set_shifts
from svfit_dreambooth.base_model import pipeline_components
from svfit_dreambooth.basis import model_basis, same_base
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.learned_word import base_rows, learn_word, word_pieces
from svfit_dreambooth.preparation import Run


def patch_run(run: Run, positions: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, nn.Parameter]]:
    """Puts SVFit layers in; returns the shifts by component and name.  `positions`: see `choose_positions`."""
    config = run.config
    weights = run.weights
    initial = None if config.init_adapter is None else read_adapter(config.init_adapter)
    if initial is not None:
        for word in initial.learned_words:
            if word.word != config.learned_word:
                raise SVFitError(
                    f"--init_adapter {config.init_adapter} learned a word: add --learned_word {word.word}."
                )
        _check_initial(initial, weights | word_rows(run), config.init_adapter)
    bases = model_basis(
        weights,
        config.rank_value if positions is None else positions,
        energy=config.energy,
        cache_dir=None if config.basis_cache_dir is None else Path(config.basis_cache_dir),
    )
    shifts: dict[str, dict[str, nn.Parameter]] = {}
    for component in run.targets:
        module = getattr(run.base.pipeline, component)
        own_bases = {name: bases[f"{component}.{name}"] for name in run.targets[component]}
        shifts[component] = apply_svfit(module, target_modules=run.targets[component], basis=own_bases)
        if initial is not None:
            set_shifts(module, initial.component_shifts(component))
    pipeline = run.base.pipeline
    for frozen in (pipeline.vae, *pipeline_components(pipeline).values()):
        frozen.requires_grad_(False)
    for group in shifts.values():
        for shift in group.values():
            shift.requires_grad_(True)
    return shifts


def learn_words(run: Run) -> dict[str, nn.Parameter]:
    """Makes the run's word learnable, if it has one: tensor key of the adapter file -> delta (tokens, dim)."""
    config, pipeline = run.config, run.base.pipeline
    if config.learned_word is None:
        return {}
    delta = learn_word(pipeline.text_encoder, pipeline.tokenizer, config.learned_word)
    for known in [] if config.init_adapter is None else read_adapter(config.init_adapter).learned_words:
        delta.data.copy_(known.deltas["text_encoder"])
    return {word_key("text_encoder", 0): delta}


def learned_words(run: Run, words: Mapping[str, Tensor]) -> list[LearnedWord]:
    """What `learn_words` has made, as adapter files hold it."""
    word, tokenizer = run.config.learned_word, run.base.pipeline.tokenizer
    if word is None:
        return []
    tokens = tokenizer.convert_ids_to_tokens(list(word_pieces(tokenizer, word)))
    return [LearnedWord(word, {"text_encoder": tokens}, {"text_encoder": words[word_key("text_encoder", 0)]})]


def word_rows(run: Run) -> dict[str, Tensor]:
    """The base's embeddings of the run's word, which belong to the base's fingerprint."""
    word, pipeline = run.config.learned_word, run.base.pipeline
    if word is None:
        return {}
    pieces = word_pieces(pipeline.tokenizer, word)
    return {word_key("text_encoder", 0): base_rows(pipeline.text_encoder, pieces)}


def _check_initial(initial: Adapter, weights: dict[str, Tensor], path: str | None) -> None:
    learned = {word_key(component, i) for i, word in enumerate(initial.learned_words) for component in word.deltas}
    missing = sorted(set(initial.shifts) - set(weights))
    if missing:
        raise SVFitError(
            f"--init_adapter {path} adapts {missing[0]}, which this run does not train: "
            "use the same --target_modules and --train_text_encoder as its run."
        )
    own = {name: weight for name, weight in weights.items() if name in initial.shifts or name in learned}
    if same_base(initial.base_fingerprint, own) == "different":
        raise SVFitError(f"--init_adapter {path} was trained on another base model, {initial.base_model}.")
