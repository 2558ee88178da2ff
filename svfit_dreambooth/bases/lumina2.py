"""Lumina-Image 2.0 (Qin et al., 2025, arXiv 2503.21758): one stream of picture and prompt, read by a Gemma 2."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from diffusers.models.transformers.transformer_lumina2 import Lumina2TransformerBlock
from torch import Tensor, nn

from svfit_dreambooth.bases.family import Conditions, Role, Tokens
from svfit_dreambooth.bases.flow import FlowTransformer, hidden_states, padded_tokens, side_by_side
from svfit_dreambooth.method.targets import LayerNames

LUMINA2 = LayerNames(
    attention=(("to_q", "to_k", "to_v", "to_out.0"),),
    feed_forward=("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),
)
ORIGINAL = {
    original: parts
    for block in ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
    for original, parts in {
        **side_by_side(f"{block}.attention.qkv", block, "attn.to_q", "attn.to_k", "attn.to_v"),
        **side_by_side(f"{block}.attention.out", block, "attn.to_out.0"),
        **{f"{block}.feed_forward.w{n}": (f"{block}.feed_forward.linear_{n}",) for n in (1, 2, 3)},
    }.items()
}
PROMPT_TOKENS = 256


class Lumina2(FlowTransformer):
    """The denoiser is given 1 - s for the time, and answers x - e; the system's words lead all but negative prompts."""

    pipeline_class = Lumina2Pipeline
    denoiser_class = Lumina2Transformer2DModel
    layer_names: ClassVar[Mapping[Role, LayerNames]] = {"denoiser": LUMINA2}
    original_names = ORIGINAL
    checkpointed = (Lumina2TransformerBlock,)
    guidance_scale = 4.0
    timestep_sampling = "shifted"
    tokens_per_latent = 0.25
    bare = no_prompt = "\0"
    guided_together = False

    @property
    def architecture(self) -> str:
        return "lumina-2"

    @property
    def resolution(self) -> int:
        return int(self.pipeline.default_image_size)

    # prompts

    def tokenize(self, prompts: list[str]) -> Tokens:
        pipeline = self.pipeline
        texts = [
            prompt[1:] if prompt.startswith(self.bare) else f"{pipeline.system_prompt} <Prompt Start> {prompt}"
            for prompt in prompts
        ]
        return padded_tokens(pipeline.tokenizer, prompts, texts, PROMPT_TOKENS)

    def encode_tokens(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Conditions:
        states = hidden_states(tokens, encoders, [-2])[:, 0]  # (prompts, tokens, dim)
        return {"prompt_embeds": states, "prompt_attention_mask": tokens["attention_mask"]}

    # the loss

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions, time_ids: Tensor
    ) -> Tensor:
        embeds = conditions["prompt_embeds"].to(noisy_latents.dtype)
        return -denoiser(
            hidden_states=noisy_latents,
            timestep=1 - timesteps,
            encoder_hidden_states=embeds,
            encoder_attention_mask=conditions.get("prompt_attention_mask", FullMask(embeds)),
            return_dict=False,
        )[0]

    def stand_in(self, batch: int, resolution: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
        """With prompts of full length."""
        config, side = self.denoiser.config, resolution // self.pixels_per_latent
        conditions = {"prompt_embeds": torch.empty(batch, PROMPT_TOKENS, config.cap_feat_dim)}
        return torch.empty(batch, config.in_channels, side, side), torch.empty(batch), conditions, torch.empty(batch, 6)


class FullMask:
    """A mask of prompts of full length whose sums are known without looking: tensors that have shapes alone hold none."""

    def __init__(self, embeds: Tensor) -> None:
        self.shape = embeds.shape[:2]
        self.embeds = embeds

    def sum(self, dim: int) -> Any:
        return self

    def tolist(self) -> list[int]:
        prompts, tokens = self.shape
        return [tokens] * prompts

    def bool(self) -> Tensor:
        return self.embeds.new_ones(self.shape, dtype=torch.bool)
