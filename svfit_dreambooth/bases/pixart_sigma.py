"""PixArt-Sigma (Chen et al., 2024, arXiv 2403.04692): a transformer taught to predict noise, read by a T5."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from svfit_dreambooth.bases.family import Conditions, Role, Tokens
from svfit_dreambooth.bases.flow import EXACT_SIZE, TransformerFamily, hidden_states, padded_tokens, side_by_side
from svfit_dreambooth.bases.noising import Diffusion
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.targets import LayerNames

PIXART = LayerNames(attention=(("to_q", "to_k", "to_v", "to_out.0"),), feed_forward=("ff.net.0.proj", "ff.net.2"))
BLOCK = "transformer_blocks.{}"
ORIGINAL = {
    **side_by_side("blocks.{}.attn.qkv", BLOCK, "attn1.to_q", "attn1.to_k", "attn1.to_v"),
    **side_by_side("blocks.{}.attn.proj", BLOCK, "attn1.to_out.0"),
    **side_by_side("blocks.{}.cross_attn.q_linear", BLOCK, "attn2.to_q"),
    **side_by_side("blocks.{}.cross_attn.kv_linear", BLOCK, "attn2.to_k", "attn2.to_v"),
    **side_by_side("blocks.{}.cross_attn.proj", BLOCK, "attn2.to_out.0"),
    **side_by_side("blocks.{}.mlp.fc1", BLOCK, "ff.net.0.proj"),
    **side_by_side("blocks.{}.mlp.fc2", BLOCK, "ff.net.2"),
}
PROMPT_TOKENS = 300


class PixArtSigma(TransformerFamily):
    """Half of its answer is the noise, the other its spread, which samplers leave alone, and so does the loss."""

    pipeline_class = PixArtSigmaPipeline
    denoiser_class = PixArtTransformer2DModel
    layer_names: ClassVar[Mapping[Role, LayerNames]] = {"denoiser": PIXART}
    original_names = ORIGINAL
    checkpointed = (BasicTransformerBlock,)
    guidance_scale = 4.5
    painting_options = EXACT_SIZE

    def check(self, name: str) -> None:
        if self.denoiser.use_additional_conditions:
            raise SVFitError(
                f"{name} is told the sizes of pictures (use_additional_conditions), as PixArt-Alpha is: give a PixArt-Sigma."
            )

    @property
    def architecture(self) -> str:
        return "pixart-sigma"

    @property
    def resolution(self) -> int:
        return int(self.denoiser.config.sample_size) * self.pixels_per_latent

    @property
    def prediction_type(self) -> str:
        return "epsilon"

    # prompts

    def tokenize(self, prompts: list[str]) -> Tokens:
        """Small letters, as the base was taught; signs are not cleaned away, which would ask for other libraries."""
        texts = [prompt.lower().strip() for prompt in prompts]
        return padded_tokens(self.pipeline.tokenizer, prompts, texts, PROMPT_TOKENS)

    def encode_tokens(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Conditions:
        states = hidden_states(tokens, encoders, [-1])[:, 0]  # (prompts, tokens, dim)
        return {"prompt_embeds": states, "prompt_attention_mask": tokens["attention_mask"]}

    # the loss

    def noising(self, sampling: str | None = None) -> Diffusion:
        return Diffusion(self.pipeline.scheduler, sampling)

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions, time_ids: Tensor
    ) -> Tensor:
        answer = denoiser(
            noisy_latents,
            encoder_hidden_states=conditions["prompt_embeds"].to(noisy_latents.dtype),
            encoder_attention_mask=conditions["prompt_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return answer[:, : noisy_latents.shape[1]]

    def stand_in(self, batch: int, resolution: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
        config, side = self.denoiser.config, resolution // self.pixels_per_latent
        conditions = {
            "prompt_embeds": torch.empty(batch, PROMPT_TOKENS, config.caption_channels),
            "prompt_attention_mask": torch.ones(batch, PROMPT_TOKENS, dtype=torch.long),
        }
        return torch.empty(batch, config.in_channels, side, side), torch.empty(batch), conditions, torch.empty(batch, 6)
