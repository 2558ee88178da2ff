"""A learned word: the embeddings of the subject's word are trained along with the singular values.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion", 2022,
arXiv:2208.01618; together with weights it is known as pivotal tuning (Roich et al., 2021, arXiv:2106.05744).

A tokenizer spells the word with one or more tokens t_1 .. t_k.  What is trained is `delta` (k, dim), added to their
embeddings wherever a prompt holds exactly this word, and nowhere else:

    embedding(t_j)  +  delta_j        j = 1 .. k

So neither tokenizer nor vocabulary grows, the prompt that trained is the prompt that paints, and a word spelled with
pieces of other words leaves those alone.  Like a shift, delta starts at zero, is scaled by a strength, and comes off
without a trace: the embedding matrix stays untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.arithmetic import kept_precise

Pieces = tuple[int, ...]  # token ids of a word
WORD_END = "</w>"  # CLIP marks the last piece of a word


class WordEmbedding(nn.Embedding):
    """The token embedding of a text encoder, with deltas at the places of some words.

    `weight` keeps its name and its values, so a checkpoint of the base loads.  Deltas are float32 and stay so through
    `.half()` and `.to(dtype)`.  One may also be (batch, k, dim), a meaning of its own for every prompt of a batch.
    """

    ends: Tensor

    def __init__(self, embedding: nn.Embedding, ends: Tensor) -> None:
        """Takes over the weight of `embedding` (the same object); `ends` (vocabulary,): see `word_ends`."""
        super().__init__(
            embedding.num_embeddings, embedding.embedding_dim, padding_idx=embedding.padding_idx, device="meta"
        )
        self.weight = embedding.weight
        self.register_buffer("ends", ends.to(embedding.weight.device), persistent=False)
        self.words: dict[Pieces, str] = {}  # pieces -> name of the parameter that holds their delta

    def deltas(self) -> dict[Pieces, nn.Parameter]:
        """Pieces of every word -> (k, dim), or (batch, k, dim)."""
        return {pieces: getattr(self, name) for pieces, name in self.words.items()}

    def put(self, deltas: Mapping[Pieces, Tensor]) -> None:
        """Replaces all words by `deltas`, pieces -> (k, dim) or (batch, k, dim); none of them is to be trained."""
        for name in self.words.values():
            delattr(self, name)
        self.words = {pieces: f"delta_{number}" for number, pieces in enumerate(deltas)}
        for pieces, name in self.words.items():
            value = deltas[pieces].detach().to(self.weight.device, torch.float32)
            self.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:
        """(..., tokens) -> (..., tokens, dim)"""
        embedded = super().forward(input)  # (..., tokens, dim)
        tokens = input.shape[-1]
        added = self.num_embeddings - len(self.ends)  # tokens of textual inversions that were loaded since
        ends = F.pad(self.ends, (0, added), value=True) if added > 0 else self.ends
        for pieces, delta in self.deltas().items():
            if delta.ndim == 3 and len(delta) != len(input):
                raise SVFitError(f"the meanings of a word for {len(delta)} prompts meet {len(input)} prompts.")
            starts = find_word(input, pieces, ends)  # (..., tokens)
            for k in range(len(pieces)):
                here = F.pad(starts, (k, 0))[..., :tokens, None]  # (..., tokens, 1)
                embedded = torch.where(here, (embedded + delta[..., k, None, :]).to(embedded.dtype), embedded)
        return embedded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WordEmbedding:
        with kept_precise(lambda: {name: getattr(self, name) for name in self.words.values()}, lambda: torch.float32):
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.words.values():  # a base checkpoint knows nothing of them
            state_dict.setdefault(prefix + name, getattr(self, name).data)
        super()._load_from_state_dict(state_dict, prefix, *args)


def find_word(input_ids: Tensor, pieces: Sequence[int], ends: Tensor) -> Tensor:
    """Where the word begins: (..., tokens), True at the first of `pieces` in `input_ids` (..., tokens).

    A token that does not end a word, before the pieces, makes them part of another word.  `ends`: see `word_ends`.
    """
    count = input_ids.shape[-1] - len(pieces) + 1
    if count < 1:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    found = F.pad(ends[input_ids], (1, 0), value=True)[..., :count]  # what stands before each place
    for k, piece in enumerate(pieces):
        found = found & (input_ids[..., k : k + count] == piece)
    return F.pad(found, (0, len(pieces) - 1))


def word_ends(tokenizer: Any, size: int) -> Tensor:
    """Which of `size` tokens end a word, (size,): those marked so, and special and added ones."""
    inner = [id for token, id in tokenizer.get_vocab().items() if not token.endswith(WORD_END)]
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ends = torch.ones(max(size, len(tokenizer)), dtype=torch.bool)
    ends[[id for id in inner if id not in added]] = False
    return ends


def word_pieces(tokenizer: Any, word: str) -> Pieces:
    """The token ids of `word`.  Raises SVFitError for what is no single word of this tokenizer."""
    pieces = tuple(tokenizer(word, add_special_tokens=False).input_ids)
    inner = tokenizer.convert_ids_to_tokens(list(pieces))
    if len(word.split()) != 1 or not pieces or any(token.endswith(WORD_END) for token in inner[:-1]):
        raise SVFitError(f'learned_word {word!r} is not one word: name the subject\'s rare word, such as "sks".')
    if not inner[-1].endswith(WORD_END):
        raise SVFitError(f"the tokenizer of this base does not mark where words end, so {word!r} cannot be learned.")
    return pieces


def base_rows(text_encoder: nn.Module, pieces: Pieces) -> Tensor:
    """The base's own embeddings of `pieces`, (k, dim)."""
    weight = text_encoder.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    return weight.detach()[list(pieces)]


def word_embedding(text_encoder: nn.Module) -> WordEmbedding | None:
    """The `WordEmbedding` of `text_encoder`, if it has one."""
    find: Any = getattr(text_encoder, "get_input_embeddings", None)
    embedding = None if find is None else find()
    return embedding if isinstance(embedding, WordEmbedding) else None


def install_words(text_encoder: nn.Module, tokenizer: Any) -> WordEmbedding:
    """Puts a `WordEmbedding` without words in place of the token embedding, unless there is one."""
    present = word_embedding(text_encoder)
    if present is not None:
        return present
    embedding = text_encoder.get_input_embeddings()  # type: ignore[operator]
    installed = WordEmbedding(embedding, word_ends(tokenizer, embedding.num_embeddings)).train(embedding.training)
    text_encoder.set_input_embeddings(installed)  # type: ignore[operator]
    return installed


def learn_word(text_encoder: nn.Module, tokenizer: Any, word: str) -> nn.Parameter:
    """Makes `word` learnable: returns its delta (k, dim), zero and to be trained."""
    embedding = install_words(text_encoder, tokenizer)
    pieces = word_pieces(tokenizer, word)
    embedding.put({**embedding.deltas(), pieces: torch.zeros(len(pieces), embedding.embedding_dim)})
    delta = embedding.deltas()[pieces]
    delta.requires_grad_(True)
    return delta


def remove_word_embedding(text_encoder: nn.Module) -> None:
    """Puts the plain token embedding back, with the same weight."""
    present = word_embedding(text_encoder)
    if present is None:
        return
    plain = nn.Embedding(
        present.num_embeddings, present.embedding_dim, padding_idx=present.padding_idx, device="meta"
    ).train(present.training)
    plain.weight = present.weight
    text_encoder.set_input_embeddings(plain)  # type: ignore[operator]


def overlap(first: Pieces, second: Pieces) -> bool:
    """Whether one word is, or holds, the other."""
    short, long = sorted((first, second), key=len)
    return any(long[i : i + len(short)] == short for i in range(len(long) - len(short) + 1))
