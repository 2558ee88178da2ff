"""Learned words in an adapter file: what is written and what is refused.  Used by adapter.py only."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svfit_dreambooth.adapter.checks import DTYPES
from svfit_dreambooth.errors import SVFitError

HEADER_KEY = "learned_words"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
MAX_SIDE = 2**14  # tokens of a word, numbers of an embedding


@dataclass
class LearnedWord:
    """A word whose embeddings were trained along, see learned_word.py."""

    word: str
    tokens: dict[str, list[str]]  # text encoder's component -> what its tokenizer makes of the word
    deltas: dict[str, torch.Tensor]  # component -> (tokens, dim), float32, added to their embeddings


def word_key(component: str, number: int) -> str:
    """The tensor of the header's word `number`, and its name in the base's fingerprint."""
    return f"{component}.{HEADER_KEY}.{number}"


def word_tensors(words: list[LearnedWord], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Key -> (tokens, dim).  Raises SVFitError for values that are not finite, also once rounded."""
    tensors = {}
    for number, word in enumerate(words):
        for component, delta in word.deltas.items():
            stored = delta.detach().to("cpu", dtype, copy=True).contiguous()
            if delta.ndim != 2 or len(delta) != len(word.tokens[component]):
                raise SVFitError(
                    f"The embeddings of '{word.word}' have shape {tuple(delta.shape)}, but {component} spells it with "
                    f"{len(word.tokens[component])} tokens."
                )
            if not torch.isfinite(stored).all():
                raise SVFitError(
                    f"The embeddings of '{word.word}' hold NaN or infinity: train with a lower learning rate."
                )
            tensors[word_key(component, number)] = stored
    return tensors


def word_metadata(words: list[LearnedWord]) -> dict[str, str]:
    """The header's entry, none without words."""
    if not words:
        return {}
    return {HEADER_KEY: json.dumps([{"word": word.word, "tokens": word.tokens} for word in words])}


def read_words(path: Path, keys: list[str], metadata: dict[str, str], file: Any) -> list[LearnedWord]:
    """The learned words of an opened file (`file`: safe_open), checked.  Raises SVFitError for anything else."""
    if HEADER_KEY not in metadata:
        return []
    words = []
    for number, entry in enumerate(_entries(path, metadata[HEADER_KEY])):
        deltas = {}
        for component, tokens in entry["tokens"].items():
            if component not in TEXT_ENCODERS:
                raise SVFitError(
                    f"'{path}' says that {component[:80]!r} learned a word, which only {' and '.join(TEXT_ENCODERS)} "
                    "read: save the adapter again."
                )
            key = word_key(component, number)
            if key not in keys:
                raise SVFitError(
                    f"'{path}' lacks '{key}', the embeddings of the word '{entry['word']}': copy it again."
                )
            shape, dtype = list(file.get_slice(key).get_shape()), file.get_slice(key).get_dtype()
            if len(shape) != 2 or shape[0] != len(tokens) or not 0 < shape[1] <= MAX_SIDE or dtype not in DTYPES:
                raise SVFitError(
                    f"'{key}' in '{path}' is {dtype} of shape {shape}, not {len(tokens)} embeddings in "
                    f"{', '.join(DTYPES)}: save it again."
                )
            deltas[component] = file.get_tensor(key).to(torch.float32, copy=True)
            if not torch.isfinite(deltas[component]).all():
                raise SVFitError(f"'{path}' holds NaN or infinity in '{key}': train the adapter again.")
        words.append(LearnedWord(entry["word"], entry["tokens"], deltas))
    return words


def _entries(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(text)
        good = isinstance(entries, list) and all(_is_entry(entry) for entry in entries)
    except (ValueError, RecursionError):
        good = False
    if not good:
        raise SVFitError(f"'{HEADER_KEY}' in the header of '{path}' isn't a list of words: save the adapter again.")
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("word"), str):
        return False
    tokens = entry.get("tokens")
    return (
        isinstance(tokens, dict)
        and bool(tokens)
        and all(isinstance(pieces, list) and 0 < len(pieces) <= MAX_SIDE for pieces in tokens.values())
        and all(isinstance(piece, str) for pieces in tokens.values() for piece in pieces)
    )
