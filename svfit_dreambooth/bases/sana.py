"""Sana (Xie et al., 2024, arXiv 2410.10629): linear attention on latents of 32 x 32 pixels, read by a Gemma 2."""

import inspect
from collections.abc import Mapping
from typing import ClassVar

import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor, nn

from svfit_dreambooth.bases.family import Conditions, Role, Tokens
from svfit_dreambooth.bases.flow import EXACT_SIZE, FlowTransformer, hidden_states, padded_tokens
from svfit_dreambooth.method.targets import LayerNames

SANA = LayerNames(attention=(("to_q", "to_k", "to_v", "to_out.0"),))  # its feed-forward layers are convolutions
PROMPT_TOKENS = 300
PIXELS = 32  # sides of pictures are multiples of it, whatever the autoencoder
INSTRUCTION = "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


class Sana(FlowTransformer):
    """An instruction leads all but negative prompts; of what is read, its first and the last 299 tokens are kept."""

    pipeline_class = SanaPipeline
    denoiser_class = SanaTransformer2DModel
    layer_names: ClassVar[Mapping[Role, LayerNames]] = {"denoiser": SANA}
    checkpointed = (SanaTransformerBlock,)
    guidance_scale = 4.5
    painting_options = EXACT_SIZE
    timestep_sampling = "shifted"
    bare = no_prompt = "\0"

    @property
    def architecture(self) -> str:
        return "sana"

    @property
    def resolution(self) -> int:
        return int(self.denoiser.config.sample_size) * self.pixels_per_latent

    # prompts

    def tokenize(self, prompts: list[str]) -> Tokens:
        """As many tokens for each as its kind has: prompts and negative ones do not go together."""
        tokenizer = self.pipeline.tokenizer
        tokenizer.padding_side = "right"
        leading = len(tokenizer.encode(INSTRUCTION)) - 2
        rows: dict[str, list[Tensor]] = {"text_encoder": [], "attention_mask": []}
        for prompt in prompts:
            led = not prompt.startswith(self.bare)
            text = INSTRUCTION + prompt.lower().strip() if led else prompt[1:].lower().strip()
            length = PROMPT_TOKENS + (leading if led else 0)
            for name, row in padded_tokens(tokenizer, [prompt], [text], length).items():
                rows[name].append(row)
        return {name: torch.cat(each) for name, each in rows.items()}

    def encode_tokens(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Conditions:
        states = hidden_states(tokens, encoders, [-1])[:, 0]  # (prompts, tokens, dim)
        kept = [0, *range(1 - PROMPT_TOKENS, 0)]
        return {"prompt_embeds": states[:, kept], "prompt_attention_mask": tokens["attention_mask"][:, kept]}

    # pictures

    @property
    def required_multiple(self) -> int:
        return max(PIXELS, self.pixels_per_latent * int(self.denoiser.config.patch_size))

    # the loss

    def shift(self, shape: torch.Size) -> float:
        return float(self.pipeline.scheduler.config.get("flow_shift") or super().shift(shape))

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions, time_ids: Tensor
    ) -> Tensor:
        return denoiser(
            hidden_states=noisy_latents,
            encoder_hidden_states=conditions["prompt_embeds"].to(noisy_latents.dtype),
            encoder_attention_mask=conditions["prompt_attention_mask"],
            timestep=1000 * timesteps * self.denoiser.config.timestep_scale,
            return_dict=False,
        )[0]

    def stand_in(self, batch: int, resolution: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
        config, side = self.denoiser.config, resolution // self.pixels_per_latent
        conditions = {
            "prompt_embeds": torch.empty(batch, PROMPT_TOKENS, config.caption_channels),
            "prompt_attention_mask": torch.ones(batch, PROMPT_TOKENS, dtype=torch.long),
        }
        return torch.empty(batch, config.in_channels, side, side), torch.empty(batch), conditions, torch.empty(batch, 6)
