"""FLUX.2-klein (Black Forest Labs, 2026): a transformer that reads three hidden layers of a Qwen3."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor, nn

from svfit_dreambooth.bases.family import Conditions, Role, Tokens, posterior
from svfit_dreambooth.bases.flow import FlowTransformer, chat_tokens, hidden_states, side_by_side
from svfit_dreambooth.method.targets import LayerNames

FLUX2 = LayerNames(
    attention=(
        ("to_q", "to_k", "to_v", "to_out.0"),
        ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        # a single block computes attention and feed-forward side by side, in one layer each way
        ("to_qkv_mlp_proj", "to_out"),
    ),
    feed_forward=("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
)
DOUBLE, SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
ORIGINAL = {
    **side_by_side("double_blocks.{}.img_attn.qkv", DOUBLE, "attn.to_q", "attn.to_k", "attn.to_v"),
    **side_by_side("double_blocks.{}.img_attn.proj", DOUBLE, "attn.to_out.0"),
    **side_by_side("double_blocks.{}.txt_attn.qkv", DOUBLE, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    **side_by_side("double_blocks.{}.txt_attn.proj", DOUBLE, "attn.to_add_out"),
    **side_by_side("double_blocks.{}.img_mlp.0", DOUBLE, "ff.linear_in"),
    **side_by_side("double_blocks.{}.img_mlp.2", DOUBLE, "ff.linear_out"),
    **side_by_side("double_blocks.{}.txt_mlp.0", DOUBLE, "ff_context.linear_in"),
    **side_by_side("double_blocks.{}.txt_mlp.2", DOUBLE, "ff_context.linear_out"),
    **side_by_side("single_blocks.{}.linear1", SINGLE, "attn.to_qkv_mlp_proj"),
    **side_by_side("single_blocks.{}.linear2", SINGLE, "attn.to_out"),
}
ENCODER_LAYERS = (9, 18, 27)  # whose hidden states are read
PROMPT_TOKENS = 512
SAMPLING_STEPS = 50  # the sampler's shift depends on their number; training takes the pipeline's own
SIZES = {3072: "4b", 4096: "9b"}  # width -> ModelSpec's word


class Flux2Klein(FlowTransformer):
    """Latents are the autoencoder's in patches of 2 x 2, each channel normalised by its batch norm's statistics."""

    pipeline_class = Flux2KleinPipeline
    denoiser_class = Flux2Transformer2DModel
    layer_names: ClassVar[Mapping[Role, LayerNames]] = {"denoiser": FLUX2}
    original_names = ORIGINAL
    checkpointed = (Flux2TransformerBlock, Flux2SingleTransformerBlock)
    guidance_scale = 4.0
    no_negative_prompt = "FLUX.2-klein, which knows none"

    @classmethod
    def fits(cls, pipeline: Any) -> bool:
        """FLUX.2-dev has the same denoiser, and another text encoder."""
        return super().fits(pipeline) and type(pipeline).__name__.startswith("Flux2Klein")

    @property
    def architecture(self) -> str:
        config = self.denoiser.config
        size = SIZES.get(config.num_attention_heads * config.attention_head_dim)
        return f"Flux.2-klein-{size}" if size else "Flux.2-klein"

    @property
    def resolution(self) -> int:
        return int(self.pipeline.vae.config.sample_size)

    @property
    def undistilled(self) -> str | None:
        if not self.pipeline.config.get("is_distilled"):
            return None
        return {"Flux.2-klein-4b": "black-forest-labs/FLUX.2-klein-base-4B"}.get(
            self.architecture, "black-forest-labs/FLUX.2-klein-base-9B"
        )

    # prompts

    def tokenize(self, prompts: list[str]) -> Tokens:
        return chat_tokens(self.pipeline.tokenizer, prompts, PROMPT_TOKENS, thinking=False)

    def encode_tokens(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Conditions:
        states = hidden_states(tokens, encoders, ENCODER_LAYERS)  # (prompts, 3, tokens, dim)
        return {"prompt_embeds": states.transpose(1, 2).flatten(2)}  # (prompts, tokens, 3 * dim)

    def guided(self, guidance_scale: float) -> bool:
        return super().guided(guidance_scale) and not self.pipeline.config.get("is_distilled")

    # pictures

    @property
    def pixels_per_latent(self) -> int:
        return self.required_multiple

    def latent_unit(self) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        mean, variance = (value.view(1, -1, 1, 1).float() for value in (vae.bn.running_mean, vae.bn.running_var))
        return mean, 1 / torch.sqrt(variance + vae.config.batch_norm_eps)

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        offset, factor = self.latent_unit()  # (1, channels, 1, 1)
        mean, spread = (self.pipeline._patchify_latents(z) for z in posterior(self.pipeline.vae, pixel_values))
        return (mean - offset) * factor, spread * factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        """The pipeline returns them in the autoencoder's unit and shape."""
        return self.decode(latents)

    def unpacked(self, latents: Tensor, height: int, width: int) -> Tensor:
        side = self.pixels_per_latent
        return latents.transpose(1, 2).unflatten(2, (height // side, width // side))

    # the loss

    def shift_mu(self, tokens: int) -> float:
        return compute_empirical_mu(tokens, SAMPLING_STEPS)

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions, time_ids: Tensor
    ) -> Tensor:
        embeds = conditions["prompt_embeds"].to(noisy_latents.dtype)
        answer = denoiser(
            hidden_states=noisy_latents.flatten(2).transpose(1, 2),  # (batch, h * w, channels)
            encoder_hidden_states=embeds,
            timestep=timesteps.to(noisy_latents.dtype),
            img_ids=self.pipeline._prepare_latent_ids(noisy_latents).to(noisy_latents.device),
            txt_ids=self.pipeline._prepare_text_ids(embeds).to(noisy_latents.device),
            guidance=None,
            return_dict=False,
        )[0]
        return answer.transpose(1, 2).unflatten(2, noisy_latents.shape[2:])

    def stand_in(self, batch: int, resolution: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
        config, side = self.denoiser.config, resolution // self.pixels_per_latent
        conditions = {"prompt_embeds": torch.empty(batch, PROMPT_TOKENS, config.joint_attention_dim)}
        return torch.empty(batch, config.in_channels, side, side), torch.empty(batch), conditions, torch.empty(batch, 6)
