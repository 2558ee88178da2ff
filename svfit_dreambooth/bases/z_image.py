"""Z-Image (Tongyi-MAI, 2025, arXiv 2511.22699): one stream of picture and prompt, read by a Qwen3."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from PIL import Image
from torch import Tensor, nn

from svfit_dreambooth.bases.family import Conditions, Role, Tokens
from svfit_dreambooth.bases.flow import FlowTransformer, chat_tokens, hidden_states, side_by_side
from svfit_dreambooth.method.targets import LayerNames

Z_IMAGE = LayerNames(
    attention=(("to_q", "to_k", "to_v", "to_out.0"),),
    feed_forward=("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)
ORIGINAL = {
    original: parts
    for block in ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
    for original, parts in {
        **side_by_side(f"{block}.attention.qkv", block, "attention.to_q", "attention.to_k", "attention.to_v"),
        **side_by_side(f"{block}.attention.out", block, "attention.to_out.0"),
        **{f"{block}.{name}": (f"{block}.{name}",) for name in Z_IMAGE.feed_forward},
    }.items()
}
PROMPT_TOKENS = 512


class ZImage(FlowTransformer):
    """The denoiser is given 1 - s for the time, and answers x - e; prompts are read at their own length."""

    pipeline_class = ZImagePipeline
    denoiser_class = ZImageTransformer2DModel
    layer_names: ClassVar[Mapping[Role, LayerNames]] = {"denoiser": Z_IMAGE}
    original_names = ORIGINAL
    checkpointed = (ZImageTransformerBlock,)
    guidance_scale = 5.0
    few_steps = 9  # as its authors paint
    tokens_per_latent = 0.25
    unguided = 0.0
    timestep_sampling = "shifted"

    @property
    def architecture(self) -> str:
        return "Z-Image"

    @property
    def resolution(self) -> int:
        return int(self.pipeline.vae.config.sample_size)

    @property
    def undistilled(self) -> str | None:
        return "Tongyi-MAI/Z-Image" if self.is_turbo else None

    # prompts

    def tokenize(self, prompts: list[str]) -> Tokens:
        return chat_tokens(self.pipeline.tokenizer, prompts, PROMPT_TOKENS, thinking=True)

    def encode_tokens(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Conditions:
        states = hidden_states(tokens, encoders, [-2])[:, 0]  # (prompts, tokens, dim)
        return {"prompt_embeds": states, "attention_mask": tokens["attention_mask"]}

    def as_arguments(self, conditions: Conditions) -> dict[str, Any]:
        """Without the padding, a list of prompts."""
        mask = conditions["attention_mask"][0].bool()
        own = super().as_arguments({"prompt_embeds": conditions["prompt_embeds"][0, mask]})
        return {"prompt_embeds": [own["prompt_embeds"]]}

    # pictures

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        return super().decode_latents(latents.float(), height, width)

    # the loss

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions, time_ids: Tensor
    ) -> Tensor:
        embeds = conditions["prompt_embeds"].to(noisy_latents.dtype)
        prompts = list(embeds)
        if "attention_mask" in conditions:
            masks = conditions["attention_mask"].bool()
            prompts = [rows[mask] for rows, mask in zip(embeds, masks, strict=True)]  # (own length, dim) each
        answers = denoiser(
            list(noisy_latents.unsqueeze(2)),  # (channels, 1, h, w) each
            1 - timesteps,
            prompts,
            return_dict=False,
        )[0]
        return -torch.stack(list(answers)).squeeze(2)

    def stand_in(self, batch: int, resolution: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
        """With prompts of full length."""
        config, side = self.denoiser.config, resolution // self.pixels_per_latent
        conditions = {"prompt_embeds": torch.empty(batch, PROMPT_TOKENS, config.cap_feat_dim)}
        return torch.empty(batch, config.in_channels, side, side), torch.empty(batch), conditions, torch.empty(batch, 6)
