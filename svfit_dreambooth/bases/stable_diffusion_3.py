"""Stable Diffusion 3 and 3.5 (Esser et al., 2024, arXiv 2403.03206): two CLIPs and a T5, read side by side."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn
from torch.nn.functional import pad

from svfit_dreambooth.bases.family import Conditions, Role, Tokens, warn_of_cut
from svfit_dreambooth.bases.flow import FlowTransformer, side_by_side
from svfit_dreambooth.method.targets import LayerNames

SD3 = LayerNames(
    attention=(
        ("to_q", "to_k", "to_v", "to_out.0"),
        ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    feed_forward=("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
BLOCK = "transformer_blocks.{}"
ORIGINAL = {
    **side_by_side("joint_blocks.{}.x_block.attn.qkv", BLOCK, "attn.to_q", "attn.to_k", "attn.to_v"),
    **side_by_side("joint_blocks.{}.x_block.attn.proj", BLOCK, "attn.to_out.0"),
    **side_by_side("joint_blocks.{}.x_block.attn2.qkv", BLOCK, "attn2.to_q", "attn2.to_k", "attn2.to_v"),
    **side_by_side("joint_blocks.{}.x_block.attn2.proj", BLOCK, "attn2.to_out.0"),
    **side_by_side("joint_blocks.{}.x_block.mlp.fc1", BLOCK, "ff.net.0.proj"),
    **side_by_side("joint_blocks.{}.x_block.mlp.fc2", BLOCK, "ff.net.2"),
    **side_by_side(
        "joint_blocks.{}.context_block.attn.qkv", BLOCK, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"
    ),
    **side_by_side("joint_blocks.{}.context_block.attn.proj", BLOCK, "attn.to_add_out"),
    **side_by_side("joint_blocks.{}.context_block.mlp.fc1", BLOCK, "ff_context.net.0.proj"),
    **side_by_side("joint_blocks.{}.context_block.mlp.fc2", BLOCK, "ff_context.net.2"),
}
CLIPS = ("text_encoder", "text_encoder_2")
PROMPT_TOKENS = 256  # of T5


class StableDiffusion3(FlowTransformer):
    """The T5 may be missing; zeros stand in its place then."""

    pipeline_class = StableDiffusion3Pipeline
    denoiser_class = SD3Transformer2DModel
    text_encoder_names = (*CLIPS, "text_encoder_3")
    optional_text_encoders = ("text_encoder_3",)
    layer_names: ClassVar[Mapping[Role, LayerNames]] = {"denoiser": SD3}
    original_names = ORIGINAL
    checkpointed = (JointTransformerBlock,)
    guidance_scale = 4.5
    tokens_per_latent = 0.25
    timestep_sampling = "shifted_logit_normal"

    @property
    def architecture(self) -> str:
        return "stable-diffusion-3"

    @property
    def resolution(self) -> int:
        return int(self.denoiser.config.sample_size) * self.pixels_per_latent

    @property
    def undistilled(self) -> str | None:
        return "stabilityai/stable-diffusion-3.5-large" if self.is_turbo else None

    # prompts

    def tokenize(self, prompts: list[str]) -> Tokens:
        lengths = dict.fromkeys(CLIPS, self.pipeline.tokenizer_max_length)
        if "text_encoder_3" in self.text_encoders:
            lengths["text_encoder_3"] = PROMPT_TOKENS
        longest = list(lengths)[-1]  # what a CLIP cuts off, T5 reads
        warn_of_cut(self.tokenizers[longest], prompts, prompts, lengths[longest])
        return {
            name: self.tokenizers[name](
                prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).input_ids
            for name, length in lengths.items()
        }

    def encode_tokens(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Conditions:
        answers = [encoders[name](tokens[name], output_hidden_states=True) for name in CLIPS]
        clip = torch.cat([answer.hidden_states[-2] for answer in answers], dim=-1)  # (prompts, 77, both dims)
        width = self.denoiser.config.joint_attention_dim
        if "text_encoder_3" in tokens:
            t5 = torch.cat([encoders["text_encoder_3"](ids[None])[0] for ids in tokens["text_encoder_3"]])
        else:
            t5 = clip.new_zeros(len(clip), PROMPT_TOKENS, width)  # (prompts, tokens, dim)
        return {
            "prompt_embeds": torch.cat([pad(clip, (0, width - clip.shape[-1])), t5], dim=1),
            "pooled_prompt_embeds": torch.cat([answer[0] for answer in answers], dim=-1),  # (prompts, both dims)
        }

    # the loss

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions, time_ids: Tensor
    ) -> Tensor:
        embeds, pooled = (
            conditions[name].to(noisy_latents.dtype) for name in ("prompt_embeds", "pooled_prompt_embeds")
        )
        return denoiser(
            hidden_states=noisy_latents,
            timestep=1000 * timesteps,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def stand_in(self, batch: int, resolution: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
        config, side = self.denoiser.config, resolution // self.pixels_per_latent
        tokens = self.pipeline.tokenizer_max_length + PROMPT_TOKENS
        conditions = {
            "prompt_embeds": torch.empty(batch, tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": torch.empty(batch, config.pooled_projection_dim),
        }
        return torch.empty(batch, config.in_channels, side, side), torch.empty(batch), conditions, torch.empty(batch, 6)
