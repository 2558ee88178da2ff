"""Prompts to what a pipeline is called with: long ones whole, and words that weigh more or less, both by compel."""

import re
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.offloading import offloading_lifted

OTHER_SPELLING = r"\(([^()]+):(\d*\.?\d+)\)"  # "(word:1.3)", as most programs write what compel calls "(word)1.3"
MOST_WEIGHT = 10.0  # above about 2 pictures fall apart


def check_text(name: str, text: str | None) -> None:
    """Raises SVFitError for half characters, which come from a terminal or a file in another encoding than UTF-8."""
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:
        raise SVFitError(f"{name} {text!r} holds bytes that are no UTF-8 text: write it anew.") from None


def prompt_arguments(
    pipeline: DiffusionPipeline, prompt: str, negative_prompt: str | None = None, prompt_weights: bool = False
) -> dict[str, Any]:
    """What to call `pipeline` with for `prompt`: the texts themselves, or their embeddings where those say more.

    Text encoders of CLIP read 77 tokens at once, the embedded base's 48, and would drop the rest.  A longer prompt is read in
    parts that end with a sentence or phrase, which stand side by side in the embeddings.  `prompt_weights`: compel's syntax counts,
    "a ball++", "a (red ball)1.3", and so does "a (red ball:1.3)"; without it such signs are text.
    Raises SVFitError for weights that cannot be read, and for a base with other text encoders that is asked for them;
    of a prompt that is too long for those, diffusers names in a warning what is cut.
    """
    known = _encoders(pipeline)
    texts = [text for text in (prompt, negative_prompt) if text]
    long = any(len(tokenizer(text).input_ids) > tokenizer.model_max_length for tokenizer, _ in known for text in texts)
    if prompt_weights and not known:
        raise SVFitError("prompt_weights is for bases that read prompts with CLIP alone: leave it out.")
    if not long and not prompt_weights:
        return {"prompt": prompt, "negative_prompt": negative_prompt}
    with offloading_lifted(pipeline):
        return _embeddings(pipeline, known, prompt, negative_prompt, prompt_weights)


def _encoders(pipeline: DiffusionPipeline) -> list[tuple[Any, Any]]:
    """(tokenizer, text encoder) of `pipeline`; empty unless all are of CLIP."""
    pairs = [
        (getattr(pipeline, f"tokenizer{n}", None), getattr(pipeline, f"text_encoder{n}", None)) for n in ("", "_2")
    ]
    found = [(tokenizer, encoder) for tokenizer, encoder in pairs if encoder is not None]
    clip = all(isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection) for _, encoder in found)
    return found if clip and getattr(pipeline, "text_encoder_3", None) is None else []


@torch.no_grad()
def _embeddings(
    pipeline: DiffusionPipeline,
    encoders: list[tuple[Any, Any]],
    prompt: str,
    negative_prompt: str | None,
    weights: bool,
) -> dict[str, Any]:
    from compel import Compel, ReturnedEmbeddingsType  # a second of imports, only for those who need it

    kind = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
    if len(encoders) > 1:  # SDXL reads its encoders before their last layer
        kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    device = str(pipeline._execution_device)
    texts = [_fragments(text, weights) for text in (prompt, negative_prompt or "")]
    sides: list[Tensor] = []
    pooled: Tensor | None = None
    for tokenizer, encoder in encoders:
        reader = Compel(
            tokenizer=tokenizer,
            text_encoder=encoder,
            truncate_long_prompts=False,
            returned_embeddings_type=kind,
            device=device,
        )
        read = [reader.build_conditioning_tensor_for_prompt_object(text)[0][0] for text in texts]  # (1, tokens, dim)
        read = reader.pad_conditioning_tensors_to_same_length(read)
        sides.append(torch.cat(read).to(encoder.dtype))  # (2, tokens, dim)
        if len(encoders) > 1:  # the second one's, of the text alone
            plain = [" ".join(fragment.text for fragment in text.children) for text in texts]
            pooled = reader.conditioning_provider.get_pooled_embeddings(plain, device=device)  # (2, dim)
    embeds, negative = torch.cat(sides, dim=-1).chunk(2)
    arguments: dict[str, Any] = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    if pooled is not None:
        own, other = pooled.to(embeds.dtype).chunk(2)
        if negative_prompt is None and pipeline.config.force_zeros_for_empty_prompt:  # as the pipeline itself does it
            arguments["negative_prompt_embeds"], other = torch.zeros_like(negative), torch.zeros_like(other)
        arguments |= {"pooled_prompt_embeds": own, "negative_pooled_prompt_embeds": other}
    return arguments


def _fragments(text: str, weights: bool) -> Any:
    """Compel's list of (text, weight), read from `text` where `weights` are asked for."""
    from compel.prompt_parser import FlattenedPrompt, Fragment, PromptParser

    if not weights:
        fragment = Fragment("")
        fragment.text = text  # as it is: its constructor would take escapes out
        return FlattenedPrompt([fragment])
    try:
        (prompt,) = PromptParser().parse_conjunction(re.sub(OTHER_SPELLING, r"(\1)\2", text)).prompts
        fragments = list(prompt.children)
    except Exception as error:  # noqa: BLE001 - a parser of others: whatever it says, the text is to blame
        reason = " ".join(str(error).split())
        raise SVFitError(f"the weights in the prompt {text!r} cannot be read ({reason}): correct it.") from None
    if not all(type(fragment) is Fragment and 0 <= fragment.weight <= MOST_WEIGHT for fragment in fragments):
        raise SVFitError(
            f'the prompt {text!r} asks for more than weights from 0 to {MOST_WEIGHT:g}: write "(word)1.3" or "word++".'
        )
    return FlattenedPrompt(fragments)
