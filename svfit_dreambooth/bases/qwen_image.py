"""Qwen-Image (Wu et al., 2025, arXiv 2508.02324): two streams, and an autoencoder made for videos."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from PIL import Image
from torch import Tensor, nn

from svfit_dreambooth.bases.family import Conditions, Role, Tokens, posterior
from svfit_dreambooth.bases.flow import FlowTransformer, padded_tokens
from svfit_dreambooth.method.targets import LayerNames

QWEN_IMAGE = LayerNames(
    attention=(
        ("to_q", "to_k", "to_v", "to_out.0"),
        ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    feed_forward=tuple(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")),
)
ORIGINAL = {  # the same names
    f"transformer_blocks.{{}}.{name}": (f"transformer_blocks.{{}}.{name}",)
    for name in [*(f"attn.{name}" for group in QWEN_IMAGE.attention for name in group), *QWEN_IMAGE.feed_forward]
}
PROMPT_TOKENS = 1024


class QwenImage(FlowTransformer):
    """Prompts are read at their own length, by a Qwen2.5-VL that is asked to describe them, without the question."""

    pipeline_class = QwenImagePipeline
    denoiser_class = QwenImageTransformer2DModel
    layer_names: ClassVar[Mapping[Role, LayerNames]] = {"denoiser": QWEN_IMAGE}
    original_names = ORIGINAL
    checkpointed: ClassVar[tuple[type[nn.Module], ...]] = (QwenImageTransformerBlock,)
    guidance_scale = 4.0
    tokens_per_latent = 0.25
    guidance_argument = "true_cfg_scale"
    no_prompt = " "

    @property
    def architecture(self) -> str:
        return "Qwen-Image"

    @property
    def resolution(self) -> int:
        return int(self.pipeline.default_sample_size) * self.pixels_per_latent

    # prompts

    def tokenize(self, prompts: list[str]) -> Tokens:
        pipeline = self.pipeline
        texts = [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        length = PROMPT_TOKENS + pipeline.prompt_template_encode_start_idx
        return padded_tokens(pipeline.tokenizer, prompts, texts, length)

    def encode_tokens(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Conditions:
        asked = self.pipeline.prompt_template_encode_start_idx  # tokens of the question
        masks = tokens["attention_mask"]
        rows = []
        for ids, mask in zip(tokens["text_encoder"], masks, strict=True):
            own = mask.bool()
            output = encoders["text_encoder"](
                input_ids=ids[own][None], attention_mask=mask[own][None], output_hidden_states=True
            )
            states = output.hidden_states[-1][0, asked:]  # (own length, dim)
            rows.append(nn.functional.pad(states, (0, 0, 0, PROMPT_TOKENS - len(states))))
        lengths = masks.sum(1) - asked
        kept = torch.arange(PROMPT_TOKENS, device=masks.device)[None] < lengths[:, None]
        return {"prompt_embeds": torch.stack(rows), "prompt_embeds_mask": kept.long()}

    def as_arguments(self, conditions: Conditions) -> dict[str, Any]:
        """Without the padding."""
        mask = conditions["prompt_embeds_mask"][0].bool()
        own = super().as_arguments({"prompt_embeds": conditions["prompt_embeds"][:, mask]})
        return own | {"prompt_embeds_mask": torch.ones(1, int(mask.sum()), device=own["prompt_embeds"].device).long()}

    # pictures

    def latent_unit(self) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        mean, spread = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return mean, 1 / spread

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """A photo is a video of one frame."""
        mean, spread = (z.squeeze(2) for z in posterior(self.pipeline.vae, pixel_values.unsqueeze(2)))
        offset, factor = (value.to(mean) for value in self.latent_unit())
        return (mean - offset) * factor, spread * factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        latents = self.unpacked(latents, height, width).float()
        offset, factor = (value.to(latents) for value in self.latent_unit())
        return self.decode((latents / factor + offset).unsqueeze(2))

    def unpacked(self, latents: Tensor, height: int, width: int) -> Tensor:
        return self.pipeline._unpack_latents(latents, height, width, self.pixels_per_latent).squeeze(2)

    # the loss

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions, time_ids: Tensor
    ) -> Tensor:
        batch, channels, h, w = noisy_latents.shape
        embeds, mask = conditions["prompt_embeds"].to(noisy_latents.dtype), None
        if "prompt_embeds_mask" in conditions:
            mask = conditions["prompt_embeds_mask"].bool()
            longest = int(mask.sum(1).max())
            embeds, mask = embeds[:, :longest], mask[:, :longest]
            if mask.all():
                mask = None
        answer = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy_latents, batch, channels, h, w),
            timestep=timesteps.to(noisy_latents.dtype),
            guidance=None,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, h // 2, w // 2)]] * batch,
            return_dict=False,
        )[0]
        return self.unpacked(answer, h * self.pixels_per_latent, w * self.pixels_per_latent)

    def stand_in(self, batch: int, resolution: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
        """With prompts of full length."""
        config, side = self.denoiser.config, resolution // self.pixels_per_latent
        conditions = {"prompt_embeds": torch.empty(batch, PROMPT_TOKENS, config.joint_attention_dim)}
        latents = torch.empty(batch, config.in_channels // 4, side, side)
        return latents, torch.empty(batch), conditions, torch.empty(batch, 6)
