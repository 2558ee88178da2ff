"""Krea 2 (Krea, 2026): one stream of picture and prompt, of which twelve layers of a Qwen3-VL tell."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from diffusers.models.transformers.transformer_krea2 import Krea2TextFusionBlock, Krea2TransformerBlock
from torch import Tensor, nn

from svfit_dreambooth.bases.family import Conditions, Role, Tokens
from svfit_dreambooth.bases.flow import FlowTransformer, padded_tokens
from svfit_dreambooth.bases.qwen_image import QwenImage
from svfit_dreambooth.method.targets import LayerNames

KREA2 = LayerNames(
    attention=(("to_q", "to_k", "to_v", "to_gate", "to_out.0"),), feed_forward=("ff.gate", "ff.up", "ff.down")
)
PARTS = {
    **{
        f"attn.{own}": f"attn.{here}"
        for own, here in zip(("wq", "wk", "wv", "gate", "wo"), KREA2.attention[0], strict=True)
    },
    **{f"mlp.{name}": f"ff.{name}" for name in ("gate", "up", "down")},
}
BLOCKS = {
    "blocks.{}": "transformer_blocks.{}",
    "txtfusion.layerwise_blocks.{}": "text_fusion.layerwise_blocks.{}",
    "txtfusion.refiner_blocks.{}": "text_fusion.refiner_blocks.{}",
}
ORIGINAL = {f"{block}.{part}": (f"{own}.{name}",) for block, own in BLOCKS.items() for part, name in PARTS.items()}
PROMPT_TOKENS = 512
DISTILLED_MU = 1.15  # of the distilled base's sampler, whatever the size of the picture


class Krea2(QwenImage):
    """Pictures are Qwen-Image's; prompts are padded before the words that end them, and their padding is not seen."""

    pipeline_class = Krea2Pipeline
    denoiser_class = Krea2Transformer2DModel
    layer_names: ClassVar[Mapping[Role, LayerNames]] = {"denoiser": KREA2}
    original_names = ORIGINAL
    checkpointed: ClassVar[tuple[type[nn.Module], ...]] = (Krea2TransformerBlock, Krea2TextFusionBlock)
    guidance_scale = 4.5
    guidance_argument = "guidance_scale"
    unguided = 0.0
    few_steps = 8  # as its authors paint
    no_prompt = ""

    @property
    def denoiser(self) -> Any:
        """The blocks that compare the layers of the encoder see every token of every prompt as a sample."""
        network = super().denoiser
        for layer in network.text_fusion.layerwise_blocks.modules():
            if isinstance(layer, nn.Linear):
                layer.folded = True  # type: ignore[assignment]  # see `method.layer`
        return network

    @property
    def architecture(self) -> str:
        return "krea-2"

    @property
    def resolution(self) -> int:
        return 1024

    @property
    def undistilled(self) -> str | None:
        return "krea/Krea-2-Raw" if self.pipeline.config.get("is_distilled") else None

    # prompts

    def tokenize(self, prompts: list[str]) -> Tokens:
        """Marks at the end of the template come behind the padding."""
        pipeline = self.pipeline
        texts = [pipeline.prompt_template_encode_prefix + prompt for prompt in prompts]
        length = PROMPT_TOKENS + pipeline.prompt_template_encode_start_idx
        length -= pipeline.prompt_template_encode_num_suffix_tokens
        found = padded_tokens(pipeline.tokenizer, prompts, texts, length)
        ends = pipeline.tokenizer([pipeline.prompt_template_encode_suffix] * len(texts), return_tensors="pt")
        return {
            "text_encoder": torch.cat([found["text_encoder"], ends.input_ids], dim=1),
            "attention_mask": torch.cat([found["attention_mask"], ends.attention_mask], dim=1),
        }

    def encode_tokens(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Conditions:
        """Padding takes no position."""
        asked = self.pipeline.prompt_template_encode_start_idx  # tokens of the question
        rows, masks = [], tokens["attention_mask"].bool()
        for ids, mask in zip(tokens["text_encoder"], masks, strict=True):
            positions = (mask.long().cumsum(0) - 1).clamp(min=0)
            states = encoders["text_encoder"](
                input_ids=ids[None],
                attention_mask=mask[None],
                position_ids=positions.expand(3, 1, -1),
                output_hidden_states=True,
            ).hidden_states
            rows.append(torch.stack([states[layer] for layer in self.pipeline.text_encoder_select_layers], dim=2))
        embeds = torch.cat(rows)[:, asked:]  # (prompts, tokens, layers, dim)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": masks[:, asked:]}

    def as_arguments(self, conditions: Conditions) -> dict[str, Any]:
        return FlowTransformer.as_arguments(self, conditions)

    # pictures

    @property
    def required_multiple(self) -> int:
        return self.pixels_per_latent * int(self.pipeline.patch_size)

    def unpacked(self, latents: Tensor, height: int, width: int) -> Tensor:
        return self.pipeline._unpack_latents(latents, height, width).squeeze(2)

    # the loss

    def shift_mu(self, tokens: int) -> float:
        return super().shift_mu(tokens) if self.undistilled is None else DISTILLED_MU

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions, time_ids: Tensor
    ) -> Tensor:
        batch, channels, h, w = noisy_latents.shape
        side = int(self.pipeline.patch_size)
        embeds = conditions["prompt_embeds"].to(noisy_latents.dtype)
        places = self.pipeline.prepare_position_ids(embeds.shape[1], h // side, w // side, noisy_latents.device)
        answer = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy_latents, batch, channels, h, w),
            encoder_hidden_states=embeds,
            timestep=timesteps.to(noisy_latents.dtype),
            position_ids=places,
            encoder_attention_mask=conditions["prompt_embeds_mask"],
            return_dict=False,
        )[0]
        return self.unpacked(answer, h * self.pixels_per_latent, w * self.pixels_per_latent)

    def stand_in(self, batch: int, resolution: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
        config, side = self.denoiser.config, resolution // self.pixels_per_latent
        conditions = {
            "prompt_embeds": torch.empty(batch, PROMPT_TOKENS, config.num_text_layers, config.text_hidden_dim),
            "prompt_embeds_mask": torch.ones(batch, PROMPT_TOKENS, dtype=torch.bool),
        }
        latents = torch.empty(batch, config.in_channels // int(self.pipeline.patch_size) ** 2, side, side)
        return latents, torch.empty(batch), conditions, torch.empty(batch, 6)
