"""SDXL (Podell et al., 2023, arXiv 2307.01952): two text encoders, and a UNet that is told how pictures were cut."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from svfit_dreambooth.bases.clip_skip import Skip, hide_last_states
from svfit_dreambooth.bases.family import Conditions, Tokens
from svfit_dreambooth.bases.stable_diffusion import StableDiffusion
from svfit_dreambooth.errors import SVFitError


class SDXL(StableDiffusion):
    """The last but one hidden states of both encoders side by side, and the second's pooled projection."""

    pipeline_class = StableDiffusionXLPipeline
    text_encoder_names = ("text_encoder", "text_encoder_2")
    addition_embed_type = "text_time"
    skip_layers: ClassVar[Skip] = staticmethod(hide_last_states)

    @classmethod
    def fits(cls, pipeline: DiffusionPipeline) -> bool:
        return hasattr(pipeline, "unet") and hasattr(pipeline, "text_encoder_2")

    @classmethod
    def load_options(cls, content_filter: bool) -> dict[str, Any]:
        return {} if content_filter else {"add_watermarker": False}

    @property
    def architecture(self) -> str:
        return "stable-diffusion-xl-v1-base"

    def layers_read(self, text_encoder: str) -> int:
        """The first encoder is read before its last layer; the second's pooled projection comes behind all of them."""
        layers = int(self.text_encoders[text_encoder].config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
        return layers - 1 - self.clip_skip if text_encoder == "text_encoder" else layers

    def encode_tokens(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Conditions:
        outputs = [encoders[name](tokens[name], output_hidden_states=True) for name in self.text_encoder_names]
        return {
            "prompt_embeds": torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
            "pooled_prompt_embeds": outputs[1][0],  # (prompts, dim)
        }

    def latent_unit(self) -> tuple[Tensor | float, Tensor | float]:
        """As its pipeline decodes: by mean and spread of each channel too, where the autoencoder names them."""
        config = self.pipeline.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return super().latent_unit()
        return torch.tensor(mean)[:, None, None], config.scaling_factor / torch.tensor(std)[:, None, None]

    def _check_units(self, name: str) -> None:
        config = self.pipeline.vae.config
        if (getattr(config, "latents_mean", None) is None) != (getattr(config, "latents_std", None) is None):
            raise SVFitError(f"the autoencoder of {name} has one of latents_mean and latents_std: give both.")

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions, time_ids: Tensor
    ) -> Tensor:
        embeds, pooled = (
            conditions[name].to(noisy_latents.dtype) for name in ("prompt_embeds", "pooled_prompt_embeds")
        )
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return denoiser(noisy_latents, timesteps, embeds, added_cond_kwargs=added, return_dict=False)[0]

    def stand_in(self, batch: int, resolution: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
        latents, timesteps, conditions, time_ids = super().stand_in(batch, resolution)
        width = self.pipeline.text_encoder_2.config.projection_dim
        return latents, timesteps, conditions | {"pooled_prompt_embeds": torch.empty(batch, width)}, time_ids

    def cast(self, dtype: torch.dtype) -> None:
        """SDXL's own autoencoder overflows in float16 and stays as it is."""
        precise = dtype == torch.float16 and self.pipeline.vae.config.force_upcast
        for name, module in self.pipeline.components.items():
            if isinstance(module, nn.Module) and not (precise and name == "vae"):
                module.to(dtype)
