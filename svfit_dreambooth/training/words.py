"""The learned word of a run: in every text encoder of its base, and in its adapter."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.adapter.words import LearnedWord, word_key
from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.word import (
    base_rows,
    find_word,
    learn_word,
    remove_word_embedding,
    word_ends,
    word_pieces,
)


def check_word(family: Family, word: str, captions: Sequence[str]) -> None:
    """Raises SVFitError if `word` is none, or if one of `captions` does not hold it."""
    for tokenizer in family.tokenizers.values():
        pieces, ends = word_pieces(tokenizer, word), word_ends(tokenizer, len(tokenizer))
        for caption in captions:
            ids = tokenizer(caption, truncation=True, max_length=tokenizer.model_max_length).input_ids
            if not find_word(torch.tensor(ids), pieces, ends).any():
                raise SVFitError(f"learned_word {word!r} does not occur in the prompt {caption!r}: use it there.")


def learn_words(family: Family, word: str | None, initial: Adapter | None = None) -> dict[str, nn.Parameter]:
    """Makes `word` learnable in all text encoders: name of the tensor in the adapter file -> delta (k, dim).

    Deltas start at zero, or where those of `initial` stand.  Without a word there is nothing to learn.
    """
    if word is None:
        return {}
    deltas = {
        word_key(component, 0): learn_word(encoder, family.tokenizers[component], word)
        for component, encoder in family.text_encoders.items()
    }
    for name, known in ({} if initial is None else initial.word_deltas()).items():
        deltas[name].data.copy_(known)
    return deltas


def learned_words(family: Family, word: str | None, deltas: Mapping[str, Tensor]) -> list[LearnedWord]:
    """What `learn_words` has made, as an adapter holds it."""
    if word is None:
        return []
    tokens, values = {}, {}
    for component, tokenizer in family.tokenizers.items():
        tokens[component] = tokenizer.convert_ids_to_tokens(list(word_pieces(tokenizer, word)))
        values[component] = deltas[word_key(component, 0)].detach()
    return [LearnedWord(word, tokens, values)]


def word_rows(family: Family, *words: str | None) -> dict[str, Tensor]:
    """The base's own embeddings of `words`, (k, dim) each, by the names under which they enter its fingerprint."""
    return {
        word_key(component, number): base_rows(encoder, word_pieces(family.tokenizers[component], word))
        for number, word in enumerate(words)
        if word is not None
        for component, encoder in family.text_encoders.items()
    }


def remove_words(family: Family) -> None:
    """Puts plain token embeddings back: the base again, to the bit."""
    for encoder in family.text_encoders.values():
        remove_word_embedding(encoder.eval())
