"""The toybox tokenizer: CLIP's byte-level byte-pair encoding with a vocabulary of a few hundred entries.

Every byte is an entry, so any word can be spelled; words that captions often use are one entry each.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

MAX_LENGTH = 48  # tokens a prompt may have, start and end included
WORD_END = "</w>"  # CLIP marks the last piece of a word
START, END = "<|startoftext|>", "<|endoftext|>"


def frequent_words(captions: Iterable[str], least: float = 2e-4) -> list[str]:
    """The lowercase words that make up at least the share `least` of all words; rarer ones are left to be spelled."""
    counts = Counter(word for caption in captions for word in caption.lower().replace(",", " ").split())
    threshold = max(1.0, least * counts.total())
    return sorted(word for word, count in counts.items() if count >= threshold and word.isalpha())


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al., 2016): join the most frequent pair until every word is one piece."""
    spellings = {word: [*word[:-1], word[-1] + WORD_END] for word in words}
    merges = []
    while pairs := Counter(pair for pieces in spellings.values() for pair in pairwise(pieces)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # ties go by the alphabet: the result is reproducible
        merges.append(best)
        spellings = {word: _join(pieces, best) for word, pieces in spellings.items()}
    return merges


def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def build_tokenizer(words: Iterable[str], max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """A `CLIPTokenizer` in which each of `words` (ASCII, lowercase) is one token and any other text is spelled."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(words)
    entries = [START, END, *letters, *(letter + WORD_END for letter in letters), *(a + b for a, b in merges)]
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)  # type: ignore[arg-type]


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save in both layouts: `tokenizer.json`, and the `vocab.json` and `merges.txt` that older libraries read."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
