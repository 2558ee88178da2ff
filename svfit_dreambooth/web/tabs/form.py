"""What the form of a run calls its fields, and the options that they stand for."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from svfit_dreambooth.errors import SVFitError

# the form's advanced fields, in its order: option -> what a person reads
LABELS = {
    "max_train_steps": "Steps",
    "learning_rate": "Learning rate",
    "rank": "Rank",
    "resolution": "Resolution",
    "train_batch_size": "Batch",
    "validation_steps": "Pictures on the way",
    "num_inference_steps": "Their steps",
    "seed": "Seed",
    "validation_prompts": "Prompts of those pictures",
    "mixed_precision": "Mixed precision",
    "train_text_encoder": "Teach the text encoder too",
    "random_flip": "Mirror photos at random",
    "gradient_checkpointing": "Less memory, slower",
    "with_prior_preservation": "Keep others of its kind apart",
    "keep_base": "Leave the rest as it is",
    "clip_skip": "Clip skip",
    "pretrained_vae_model_name_or_path": "Another autoencoder (VAE)",
    "quantize": "Base in fewer bits",
}
ADVANCED = tuple(LABELS)
NUMBERS = (*ADVANCED[:2], *ADVANCED[3:8], "clip_skip")
VAE = "pretrained_vae_model_name_or_path"
BITS = {"as it is": None, "int8": "int8", "fp8": "fp8", "nf4": "nf4"}  # of the base's denoiser, as the form offers them
SWITCHES = ("train_text_encoder", "random_flip", "gradient_checkpointing", "with_prior_preservation")
PAINTING = {  # the same of the form that paints
    "num_inference_steps": "Sampling steps",
    "guidance_scale": "Guidance",
    "guidance_rescale": "Guidance rescale",
    "scheduler": "Sampler",
    "clip_skip": "Clip skip",
    "pretrained_vae_model_name_or_path": "Another autoencoder (VAE)",
    "quantize": "Base in fewer bits",
    "trained_on": "Trained on",
}
ELSEWHERE = {
    "pretrained_model_name_or_path": "Base model",
    "adapter_name": "Name",
    "instance_prompt": "the prompt of the photos",
    "preset": "Preset",
    "instance_data_dir": "the photos",
}
ORDINARY = ("rank", "seed", "resolution", "preset")  # words that a sentence may use in their own sense


def bits_of(offered: str | None) -> str | None:
    """What a choice of BITS stands for.  Raises SVFitError for any other word."""
    if offered is not None and offered not in BITS:
        raise SVFitError(f"“{LABELS['quantize']}” is {offered!r}: choose one of those offered.")
    return None if offered is None else BITS[offered]


def in_form_words(
    sentence: str, parameters: tuple[str, ...] = (), labels: Mapping[str, str] = LABELS | ELSEWHERE
) -> str:
    """A sentence of the library or of the training command, with options called as the form calls them.

    `parameters`: ordinary words in it that stand for options.  `labels`: of which form.
    """
    for name, label in labels.items():
        plain = name not in ORDINARY or name in parameters or sentence.startswith(f"{name} ")
        sentence = re.sub(rf"--{name}\b" + (rf"|\b{name}\b" if plain else ""), f"“{label}”", sentence)
    return sentence


@contextmanager
def worded() -> Iterator[None]:
    """Within it, mistakes are told in the words of the form."""
    try:
        yield
    except SVFitError as error:
        raise SVFitError(in_form_words(str(error), error.parameters)) from error


def check_base(options: dict[str, Any]) -> None:
    """Raises SVFitError where the base has no use for what is asked of it, as far as it is on this disk."""
    asked = {
        name: options[name] for name in ("revision", "clip_skip", VAE, "quantize") if options.get(name) is not None
    }
    if asked.keys() - {"revision"}:
        from svfit_dreambooth.bases.outline import check_wishes

        check_wishes(options["pretrained_model_name_or_path"], **asked)


def as_written(value: Any, name: str) -> Any:
    """An option as its field of the form has it."""
    if name == "quantize":
        return value or next(iter(BITS))
    if name == "mixed_precision":
        return value or "no"
    if isinstance(value, bool) or name in SWITCHES:
        return bool(value)
    return "\n".join(value) if isinstance(value, list) else "" if value is None else f"{value}"
