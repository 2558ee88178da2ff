"""Learned words as embedding files, by which textual inversion is exchanged (arXiv:2208.01618).

What a word's tokens mean once it is learned, the base's rows plus the delta, is one row a token: (tokens, dim).

    Stable Diffusion 1.x, 2.x   one tensor, whose name is the word to type
    SDXL                        clip_l and clip_g, of the first and the second text encoder

diffusers takes the word from the tensor's name, A1111, Forge and ComfyUI from the file's, so both are the same.  It
cannot be the word that was trained, which is a token of the base already, and which the next adapter may use too.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.adapter.words import LearnedWord
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import file_name, write_atomically
from svfit_dreambooth.method.word import base_rows, word_pieces

KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@dataclass(frozen=True)
class Embedding:
    """The file of one learned word."""

    path: Path
    word: LearnedWord

    @property
    def called(self) -> str:
        """What is typed for it in other programs."""
        return self.path.stem

    def line(self) -> str:
        """What to do with it."""
        tokens = max(map(len, self.word.tokens.values()))
        size = f"{tokens} tokens" if tokens > 1 else "one token"
        return (
            f"{self.path}: the learned word {self.word.word}, {size}, for the folder embeddings: in other programs write "
            f"{self.called} in its place, in ComfyUI embedding:{self.called}"
        )


def embeddings_beside(lora: Path, stem: str, adapter: Adapter) -> list[Embedding]:
    """Where the learned words of `adapter` go beside the file `lora`, and so how they are called: "`stem`-WORD".

    In small letters, since programs differ in whether they tell them apart.
    """
    words = [file_name(word.word, "learned word") for word in adapter.learned_words]
    names = [file_name(f"{stem}-{word}".lower(), "embedding") for word in words]
    if len(set(names)) < len(names):
        raise SVFitError(f"the learned words of the adapter would share a file, {', '.join(names)}: add without_words.")
    return [
        Embedding(lora.with_name(f"{name}.safetensors"), word)
        for name, word in zip(names, adapter.learned_words, strict=True)
    ]


def called_elsewhere(adapter: Adapter, embeddings: list[Embedding]) -> Adapter:
    """`adapter` with the prompt that calls its subject in other programs."""
    prompt = adapter.instance_prompt
    for embedding in embeddings:
        if prompt is not None:
            whole = rf"(?<!\w){re.escape(embedding.word.word)}(?!\w)"
            prompt = re.sub(whole, embedding.called, prompt, flags=re.IGNORECASE)  # file names have no backslash
    return replace(adapter, instance_prompt=prompt)


def embedding_tensors(embedding: Embedding, base: BaseModel, scale: float) -> dict[str, Tensor]:
    """What the file holds, float32: the rows (tokens, dim) of every text encoder of `base`, at the strength `scale`.

    A text encoder that did not learn the word keeps the base's own rows.
    Raises SVFitError for a base whose text encoders read no such files.
    """
    family, word = base.family, embedding.word
    rows = {}
    for component, tokenizer in family.tokenizers.items():
        if component not in KEYS:
            raise SVFitError(
                f"the word {word.word} was learned for {component}, which reads no embedding files: add without_words."
            )
        learnt = base_rows(family.text_encoders[component], word_pieces(tokenizer, word.word)).float().cpu()
        if component in word.deltas:
            learnt = learnt + scale * word.deltas[component]
        rows[component] = learnt.contiguous()
    if len(rows) == 1:
        return {embedding.called: next(iter(rows.values()))}
    return {KEYS[component]: learnt for component, learnt in rows.items()}


def write_embedding(embedding: Embedding, tensors: dict[str, Tensor], lora_metadata: dict[str, str]) -> None:
    """Writes the file; title, base and licence are those of the LoRA whose header is `lora_metadata`."""
    if not all(torch.isfinite(rows).all() for rows in tensors.values()):
        raise SVFitError(f"the embeddings of the word {embedding.word.word} hold NaN or infinity: train it again.")
    taken = ("modelspec.license", "modelspec.author", "modelspec.date", "modelspec.sai_model_spec")
    metadata = {key: lora_metadata[key] for key in taken if key in lora_metadata} | {
        "format": "pt",
        "modelspec.architecture": lora_metadata["modelspec.architecture"].replace("/lora", "/textual-inversion"),
        "modelspec.implementation": "diffusers",
        "modelspec.title": embedding.called,
        "modelspec.trigger_phrase": embedding.called,
    }
    write_atomically(embedding.path, save(tensors, metadata))
