"""Whether a base's tokenizers are whole: from one that is not, libraries make other tokens, and say nothing."""

import json
from typing import Any

from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.errors import SVFitError

SPARE = 0.05  # of an encoder's rows that no token has, at most: large language models round their number up


def check_tokenizers(name: str, family: Family) -> None:
    """Raises SVFitError for a tokenizer of the base `name` with other words than its text encoder knows, or none.

    A byte-pair tokenizer reaches every token of several letters by a merge of its own; without it words fall apart.
    """
    for component, tokenizer in family.tokenizers.items():
        words, rows = tokenizer.get_vocab(), _rows(family.text_encoders[component])
        if len(words) < (1 - SPARE) * rows:
            raise SVFitError(
                f"the tokenizer of the {component} of {name} knows {len(words)} tokens of {rows}: its vocabulary is not "
                "whole, fetch it again."
            )
        if max(words.values()) >= rows:
            raise SVFitError(
                f"the tokenizer of the {component} of {name} has tokens beyond the {rows} that the encoder knows: they "
                "do not belong together, fetch it again."
            )
        lost = _tokens_without_merge(tokenizer)
        if lost:
            raise SVFitError(
                f"the tokenizer of the {component} of {name} lacks the merges of {len(lost)} tokens, such as "
                f"{min(lost)!r}: its files are not whole, fetch it again."
            )


def _rows(encoder: Any) -> int:
    return int(encoder.get_input_embeddings().num_embeddings)


def _tokens_without_merge(tokenizer: Any) -> set[str]:
    """The tokens of several letters that no merge makes; none for tokenizers that do not merge."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"] if hasattr(tokenizer, "backend_tokenizer") else {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return set()
    merges = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    made = {first + second for first, second in merges}
    suffix = model.get("end_of_word_suffix") or ""
    several = {token for token in model["vocab"] if len(token.removesuffix(suffix) if suffix else token) > 1}
    return several - made - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
