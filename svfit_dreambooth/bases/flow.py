"""What transformer bases have in common, most of which were trained by flow matching.

Their text encoders hold billions of weights and are not adapted; their denoiser is the pipeline's `transformer`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from svfit_dreambooth.bases.family import Conditions, Family, Tokens, warn_of_cut
from svfit_dreambooth.bases.noising import Flow
from svfit_dreambooth.errors import SVFitError

# of pipelines that else paint in a size of their own and cut the picture, and that take "" for no negative prompt
EXACT_SIZE = {"use_resolution_binning": False, "negative_prompt": None}


class TransformerFamily(Family):
    """A family whose pipeline has a `transformer`, and text encoders that are asked once."""

    denoiser_name = "transformer"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    adaptable_text_encoders = False
    values_per_layer = 400  # a step of FLUX.2-klein then costs what it costs with a LoRA of rank 32
    denoiser_class: ClassVar[type[nn.Module]]
    guidance_argument: ClassVar[str] = "guidance_scale"  # of the pipeline
    few_steps: ClassVar[int] = 4  # denoising steps that suit a base that was distilled
    painting_options: ClassVar[Mapping[str, Any]] = {}  # what the pipeline is called with beside
    unguided: ClassVar[float] = 1.0  # up to this guidance the negative prompt has no say
    no_negative_prompt: ClassVar[str | None] = None  # the family's name, and why it takes no negative prompt
    bare: ClassVar[str] = ""  # marks a prompt that is read without the words that lead others, as negative ones may be

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if self.undistilled is not None:  # guidance was distilled too
            self.guidance_scale = self.unguided

    @classmethod
    def fits(cls, pipeline: DiffusionPipeline) -> bool:
        network = getattr(pipeline, "transformer", None)
        return isinstance(getattr(network, "_orig_mod", network), cls.denoiser_class)

    @classmethod
    def load_options(cls, content_filter: bool) -> dict[str, Any]:
        return {}

    def check(self, name: str) -> None:
        """Every variety that opens can be adapted."""

    @property
    def is_turbo(self) -> bool:
        """Whether the base calls itself one that was distilled: configs of some families do not say."""
        return "turbo" in str(self.pipeline.config.get("_name_or_path")).rstrip("/").rpartition("/")[2].lower()

    # prompts

    def conditions(self, prompts: list[str]) -> Conditions:
        """From `answers` where those have the prompt, else by the text encoders, a prompt at a time.

        Raises SVFitError for a prompt that has no answer where the text encoders were let go.
        """
        rows = []
        for prompt in prompts:
            if prompt not in self.answers and not self.text_encoders:
                raise SVFitError(
                    f"the text encoder was let go, and the prompt {prompt!r} is none of those that it has read: open "
                    "the base anew."
                )
            rows.append(self.answers[prompt] if prompt in self.answers else super().conditions([prompt]))
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def painting_arguments(self, words: dict[str, Any], guidance_scale: float) -> dict[str, Any]:
        """The answers themselves, in the denoiser's type.  Raises SVFitError for a negative prompt that has no say."""
        negative = words.get("negative_prompt")
        if negative and self.no_negative_prompt is not None:
            raise SVFitError(
                f"negative_prompt {negative!r} does not work with {self.no_negative_prompt}: leave it out.",
                "negative_prompt",
            )
        texts = {"": words["prompt"]}
        if self.guided(guidance_scale):
            texts["negative_"] = self.bare + negative if negative else self.no_prompt
        arguments: dict[str, Any] = {self.guidance_argument: guidance_scale, **self.painting_options}
        for kind, text in texts.items():
            told = self.as_arguments(self.conditions([text]))
            arguments |= {f"{kind}{name}": value for name, value in told.items()}
        return arguments

    def guided(self, guidance_scale: float) -> bool:
        """Whether the pipeline paints with a negative prompt, the empty one where none is given."""
        return guidance_scale > self.unguided

    def as_arguments(self, conditions: Conditions) -> dict[str, Any]:
        """Conditions of one prompt as the pipeline is called with them."""
        device, dtype = self.pipeline._execution_device, self.denoiser.dtype
        return {
            name: rows.to(device, dtype if rows.is_floating_point() else rows.dtype)
            for name, rows in conditions.items()
        }

    # pictures

    @property
    def size_multiple(self) -> int:
        return self.required_multiple

    @property
    def required_multiple(self) -> int:
        """The denoiser sees 2 x 2 points of the autoencoder's as one."""
        return 2 * int(self.pipeline.vae_scale_factor)

    def unpacked(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The pipeline's latents between its steps as `predict` takes them, for a picture of that size in pixels."""
        return latents


class FlowTransformer(TransformerFamily):
    """One that was trained by flow matching, and has a sampler for that."""

    timestep_sampling: ClassVar[str] = "uniform"  # as the base's own LoRA script draws them, see `noising.Flow`
    tokens_per_latent: ClassVar[float] = 1  # a quarter where the denoiser itself sees 2 x 2 latents as one

    def noising(self, sampling: str | None = None) -> Flow:
        return Flow(sampling or self.timestep_sampling, self.shift)

    def shift(self, shape: torch.Size) -> float:
        """How far the sampler moves its steps towards the noise for latents (..., h, w), see `Flow.draw_timestep`."""
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift", 1.0))
        mu = self.shift_mu(round(shape[-2] * shape[-1] * self.tokens_per_latent))
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def shift_mu(self, tokens: int) -> float:
        """The sampler's mu for so many image tokens, on the straight line that its configuration gives."""
        config = self.pipeline.scheduler.config
        first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(low + (high - low) * (tokens - first) / (last - first))


def side_by_side(original: str, here: str, *names: str) -> dict[str, tuple[str, ...]]:
    """An entry of `Family.original_names`: the layers `names` of the block `here` are one in the block of `original`."""
    return {original: tuple(f"{here}.{name}" for name in names)}


def chat_tokens(tokenizer: Any, prompts: Sequence[str], length: int, thinking: bool) -> Tokens:
    """Prompts as the chat messages that such encoders read: ids and mask (prompts, `length`), padded at the end."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for prompt in prompts
    ]
    return padded_tokens(tokenizer, prompts, texts, length)


def padded_tokens(tokenizer: Any, prompts: Sequence[str], texts: Sequence[str], length: int) -> Tokens:
    """Ids and mask of `texts`, which stand for `prompts`, (prompts, length) each; what is cut off is told."""
    warn_of_cut(tokenizer, prompts, texts, length)
    found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return {"text_encoder": found.input_ids, "attention_mask": found.attention_mask}


def hidden_states(tokens: Tokens, encoders: Mapping[str, nn.Module], layers: Sequence[int]) -> Tensor:
    """Those hidden states of the text encoder, (prompts, layers, tokens, dim); a prompt at a time, to save memory."""
    rows = []
    for ids, mask in zip(tokens["text_encoder"], tokens["attention_mask"], strict=True):
        output = encoders["text_encoder"](
            input_ids=ids[None], attention_mask=mask[None], output_hidden_states=True, use_cache=False
        )
        rows.append(torch.cat([output.hidden_states[layer] for layer in layers]))  # (layers, tokens, dim)
    return torch.stack(rows)
