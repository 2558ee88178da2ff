"""Chroma (lodestones, 2025): FLUX.1's blocks without its distilled guidance and without CLIP, read by a T5 alone."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock, ChromaTransformerBlock
from torch import Tensor, nn

from svfit_dreambooth.bases.family import Conditions, Tokens
from svfit_dreambooth.bases.flow import hidden_states, padded_tokens
from svfit_dreambooth.bases.flux1 import Flux1
from svfit_dreambooth.errors import SVFitError

PROMPT_TOKENS = 512


class Chroma(Flux1):
    """Of what pads a prompt, the denoiser sees the first token alone.

    Padding is cut off where it can be: diffusers adds the mask to the attention's logits, which changes nothing where
    it is 1 everywhere.
    """

    pipeline_class = ChromaPipeline
    denoiser_class = ChromaTransformer2DModel
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    checkpointed = (ChromaTransformerBlock, ChromaSingleTransformerBlock)
    guidance_scale = 5.0
    no_negative_prompt: ClassVar[str | None] = None
    guided_together = False

    @property
    def architecture(self) -> str:
        return "chroma"

    @property
    def resolution(self) -> int:
        return int(self.pipeline.default_sample_size) * self.pixels_per_latent

    @property
    def undistilled(self) -> str | None:
        return None

    # prompts

    def tokenize(self, prompts: list[str]) -> Tokens:
        return padded_tokens(self.pipeline.tokenizer, prompts, prompts, PROMPT_TOKENS)

    def encode_tokens(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Conditions:
        states, mask = hidden_states(tokens, encoders, [-1])[:, 0], tokens["attention_mask"]  # (prompts, tokens, dim)
        seen = torch.arange(mask.shape[1], device=mask.device)[None] <= mask.sum(1, keepdim=True)
        return {"prompt_embeds": states, "prompt_attention_mask": seen}

    def guided(self, guidance_scale: float) -> bool:
        return guidance_scale > self.unguided

    def as_arguments(self, conditions: Conditions) -> dict[str, Any]:
        """Without the padding that is not seen."""
        seen = conditions["prompt_attention_mask"][0]
        return super().as_arguments({name: rows[:, seen] for name, rows in conditions.items()})

    # the loss

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions, time_ids: Tensor
    ) -> Tensor:
        batch, channels, h, w = noisy_latents.shape
        device, dtype = noisy_latents.device, noisy_latents.dtype
        packed = self.pipeline._pack_latents(noisy_latents, batch, channels, h, w)
        embeds, mask = conditions["prompt_embeds"].to(dtype), None
        if "prompt_attention_mask" in conditions:
            seen = conditions["prompt_attention_mask"]
            longest = int(seen.sum(1).max())
            embeds, seen = embeds[:, :longest], seen[:, :longest]
            if not seen.all():
                if self.denoiser.is_gradient_checkpointing:  # diffusers forgets the mask then
                    raise SVFitError(
                        "gradient_checkpointing reads prompts of one length alone with Chroma: leave it out, or use "
                        "train_batch_size 1.",
                        "gradient_checkpointing",
                    )
                mask = torch.cat([seen, seen.new_ones(batch, packed.shape[1])], dim=1)
        answer = denoiser(
            hidden_states=packed,
            timestep=timesteps.to(dtype),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=dtype),
            img_ids=self.pipeline._prepare_latent_image_ids(batch, h // 2, w // 2, device, dtype),
            attention_mask=mask,
            return_dict=False,
        )[0]
        return self.unpacked(answer, h * self.pixels_per_latent, w * self.pixels_per_latent)

    def stand_in(self, batch: int, resolution: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
        """With prompts of full length."""
        config, side = self.denoiser.config, resolution // self.pixels_per_latent
        conditions = {"prompt_embeds": torch.empty(batch, PROMPT_TOKENS, config.joint_attention_dim)}
        latents = torch.empty(batch, config.in_channels // 4, side, side)
        return latents, torch.empty(batch), conditions, torch.empty(batch, 6)
