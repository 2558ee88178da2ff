"""FLUX.1 (Black Forest Labs, 2024): a transformer that reads a T5, and the pooled answer of a CLIP."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from PIL import Image
from torch import Tensor, nn

from svfit_dreambooth.bases.family import Conditions, Role, Tokens, warn_of_cut
from svfit_dreambooth.bases.flow import FlowTransformer, side_by_side
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.targets import LayerNames

FLUX1 = LayerNames(
    attention=(
        ("to_q", "to_k", "to_v", "to_out.0"),
        ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        ("to_q", "to_k", "to_v"),  # of a single block, where attention and feed-forward share the way out:
        ("attn", "proj_out"),
    ),
    feed_forward=("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
)
DOUBLE, SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
ORIGINAL = {
    **side_by_side("double_blocks.{}.img_attn.qkv", DOUBLE, "attn.to_q", "attn.to_k", "attn.to_v"),
    **side_by_side("double_blocks.{}.img_attn.proj", DOUBLE, "attn.to_out.0"),
    **side_by_side("double_blocks.{}.txt_attn.qkv", DOUBLE, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    **side_by_side("double_blocks.{}.txt_attn.proj", DOUBLE, "attn.to_add_out"),
    **side_by_side("double_blocks.{}.img_mlp.0", DOUBLE, "ff.net.0.proj"),
    **side_by_side("double_blocks.{}.img_mlp.2", DOUBLE, "ff.net.2"),
    **side_by_side("double_blocks.{}.txt_mlp.0", DOUBLE, "ff_context.net.0.proj"),
    **side_by_side("double_blocks.{}.txt_mlp.2", DOUBLE, "ff_context.net.2"),
    **side_by_side("single_blocks.{}.linear1", SINGLE, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    **side_by_side("single_blocks.{}.linear2", SINGLE, "proj_out"),
}
PROMPT_TOKENS = 512
UNGUIDED = 1.0  # the guidance at which the distilled base answers as it was taught before, without any


class Flux1(FlowTransformer):
    """Guidance was distilled into the dev base, which is told its strength; in training that is none."""

    pipeline_class = FluxPipeline
    denoiser_class = FluxTransformer2DModel
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    layer_names: ClassVar[Mapping[Role, LayerNames]] = {"denoiser": FLUX1}
    original_names = ORIGINAL
    checkpointed = (FluxTransformerBlock, FluxSingleTransformerBlock)
    guidance_scale = 3.5
    tokens_per_latent = 0.25
    no_negative_prompt: ClassVar[str | None] = "FLUX.1, whose guidance was distilled"

    def check(self, name: str) -> None:
        taken, given = self.denoiser.config.in_channels, 4 * self.pipeline.vae.config.latent_channels
        if taken != given:
            raise SVFitError(f"{name} takes {taken} channels, as inpainting models do: give the plain model.")

    @property
    def architecture(self) -> str:
        return "flux-1-dev" if self.denoiser.config.guidance_embeds else "flux-1-schnell"

    @property
    def resolution(self) -> int:
        return int(self.pipeline.vae.config.sample_size)

    @property
    def undistilled(self) -> str | None:
        return None if self.denoiser.config.guidance_embeds else "black-forest-labs/FLUX.1-dev"

    # prompts

    def tokenize(self, prompts: list[str]) -> Tokens:
        """CLIP gives no more than a summary, from as much as it can read; T5 reads all."""
        warn_of_cut(self.pipeline.tokenizer_2, prompts, prompts, PROMPT_TOKENS)
        lengths = {"text_encoder": self.pipeline.tokenizer_max_length, "text_encoder_2": PROMPT_TOKENS}
        return {
            name: self.tokenizers[name](
                prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).input_ids
            for name, length in lengths.items()
        }

    def encode_tokens(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Conditions:
        read = [encoders["text_encoder_2"](ids[None])[0] for ids in tokens["text_encoder_2"]]
        return {
            "prompt_embeds": torch.cat(read),  # (prompts, tokens, dim)
            "pooled_prompt_embeds": encoders["text_encoder"](tokens["text_encoder"]).pooler_output,  # (prompts, dim)
        }

    def guided(self, guidance_scale: float) -> bool:
        """The denoiser itself is told the guidance."""
        return False

    # pictures

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        return super().decode_latents(self.unpacked(latents, height, width), height, width)

    def unpacked(self, latents: Tensor, height: int, width: int) -> Tensor:
        return self.pipeline._unpack_latents(latents, height, width, self.pixels_per_latent)

    # the loss

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions, time_ids: Tensor
    ) -> Tensor:
        batch, channels, h, w = noisy_latents.shape
        device, dtype = noisy_latents.device, noisy_latents.dtype
        embeds, pooled = (conditions[name].to(dtype) for name in ("prompt_embeds", "pooled_prompt_embeds"))
        told = self.denoiser.config.guidance_embeds
        answer = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy_latents, batch, channels, h, w),
            timestep=timesteps.to(dtype),
            guidance=torch.full((batch,), UNGUIDED, device=device) if told else None,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=dtype),
            img_ids=self.pipeline._prepare_latent_image_ids(batch, h // 2, w // 2, device, dtype),
            return_dict=False,
        )[0]
        return self.unpacked(answer, h * self.pixels_per_latent, w * self.pixels_per_latent)

    def stand_in(self, batch: int, resolution: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
        config, side = self.denoiser.config, resolution // self.pixels_per_latent
        conditions = {
            "prompt_embeds": torch.empty(batch, PROMPT_TOKENS, config.joint_attention_dim),
            "pooled_prompt_embeds": torch.empty(batch, config.pooled_projection_dim),
        }
        latents = torch.empty(batch, config.in_channels // 4, side, side)
        return latents, torch.empty(batch), conditions, torch.empty(batch, 6)
