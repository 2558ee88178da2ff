"""Stable Diffusion 1.x and 2.x (Rombach et al., 2022, arXiv 2112.10752), and what is built like them."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from svfit_dreambooth.bases.clip_skip import Skip, hand_through, set_clip_skip
from svfit_dreambooth.bases.family import Conditions, Family, Role, Tokens, warn_of_cut
from svfit_dreambooth.bases.noising import Diffusion
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.targets import LayerNames, Projections

logger = logging.getLogger(__name__)

UNLIMITED = 10**9  # tokens

UNET = LayerNames(attention=(("to_q", "to_k", "to_v", "to_out.0"),), feed_forward=("ff.net.0.proj", "ff.net.2"))
CLIP = LayerNames(attention=(("q_proj", "k_proj", "v_proj", "out_proj"),), feed_forward=("mlp.fc1", "mlp.fc2"))


class StableDiffusion(Family):
    """A UNet that reads the last hidden states of one CLIP text encoder."""

    pipeline_class = StableDiffusionPipeline
    denoiser_name = "unet"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    layer_names: ClassVar[Mapping[Role, LayerNames]] = {"denoiser": UNET, "text_encoder": CLIP}
    checkpointed = (ResnetBlock2D, BasicTransformerBlock)
    guidance_scale = 7.5
    skip_layers: ClassVar[Skip] = staticmethod(hand_through)
    addition_embed_type: ClassVar[str | None] = None  # what the denoiser is told beside prompts

    @classmethod
    def fits(cls, pipeline: DiffusionPipeline) -> bool:
        return hasattr(pipeline, "unet") and not hasattr(pipeline, "text_encoder_2")

    @classmethod
    def load_options(cls, content_filter: bool) -> dict[str, Any]:
        return {} if content_filter else {"safety_checker": None, "requires_safety_checker": False}

    def check(self, name: str) -> None:
        config = self.denoiser.config
        taken, given = config.in_channels, self.pipeline.vae.config.latent_channels
        if taken != given:
            raise SVFitError(f"{name} takes {taken} channels, as inpainting models do: give the plain model.")
        if config.addition_embed_type != self.addition_embed_type or config.class_embed_type or config.num_class_embeds:
            raise SVFitError(f"{name} is told more than prompts of this family, such as classes: give the plain model.")
        size = config.sample_size
        sides = size if isinstance(size, list | tuple) and len(size) == 2 else [size]
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise SVFitError(f"the sample_size of {name} is {size!r}: write the side of its latents into its config.")
        self._check_units(name)
        read = sum(encoder.config.hidden_size for encoder in self.text_encoders.values())  # type: ignore[union-attr,misc]
        if config.cross_attention_dim != read:
            raise SVFitError(
                f"{name} reads prompts {config.cross_attention_dim} wide, and its text encoders give {read}: they do "
                "not belong together, fetch it again."
            )
        for component, tokenizer in self.tokenizers.items():
            _set_length(name, tokenizer, self.text_encoders[component])

    def _check_units(self, name: str) -> None:
        """Pictures of this family are decoded by one factor alone, see its pipeline."""
        config = self.pipeline.vae.config
        for option in ("latents_mean", "latents_std", "shift_factor"):
            if getattr(config, option, None):
                raise SVFitError(
                    f"the autoencoder of {name} has {option}, which pipelines of its family ignore: give it a "
                    "scaling_factor alone."
                )

    @property
    def architecture(self) -> str:
        width = self.denoiser.config.cross_attention_dim
        return {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2"}.get(width, "stable-diffusion")

    @property
    def size_multiple(self) -> int:
        """The UNet halves latents between its blocks."""
        return self.pixels_per_latent * 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """Of a square with as many pixels, where the base was trained on another shape."""
        size = self.denoiser.config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        multiple = self.size_multiple
        side = math.sqrt(height * width) * self.pixels_per_latent
        return int(side) if height == width else max(multiple, round(side / multiple) * multiple)

    def layers_read(self, text_encoder: str) -> int:
        """How many layers of a text encoder have a say in what the denoiser is told."""
        return int(self.text_encoders[text_encoder].config.num_hidden_layers) - self.clip_skip  # type: ignore[union-attr,arg-type]

    def find_projections(self, component: str, target_modules: Sequence[str] | None = None) -> Projections:
        """Layers of a text encoder behind the last that is read stay out."""
        found = super().find_projections(component, target_modules)
        if component not in self.text_encoders:
            return found
        read = self.layers_read(component)
        numbers = {name: re.search(r"encoder\.layers\.(\d+)\.", name) for name in found}
        return {name: found[name] for name, match in numbers.items() if match is None or int(match[1]) < read}

    def read_earlier(self, clip_skip: int) -> None:
        before = self.clip_skip
        for name in self.text_encoders:
            most = self.layers_read(name) + before - 1
            if not 0 <= clip_skip <= most:
                raise SVFitError(
                    f"clip_skip is {clip_skip}: of the layers of this base's {name}, 0 to {most} can be left out.",
                    "clip_skip",
                )
        for encoder in self.text_encoders.values():
            set_clip_skip(encoder, clip_skip, type(self).skip_layers)

    def tokenize(self, prompts: list[str]) -> Tokens:
        tokens: Tokens = {}
        for name, tokenizer in self.tokenizers.items():
            length = tokenizer.model_max_length
            if not tokens:
                warn_of_cut(tokenizer, prompts, prompts, length)
            text = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            tokens[name] = text.input_ids
        return tokens

    def encode_tokens(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Conditions:
        return {"prompt_embeds": encoders["text_encoder"](tokens["text_encoder"])[0]}  # (prompts, tokens, dim)

    def noising(self, sampling: str | None = None) -> Diffusion:
        if self.denoiser.config.time_cond_proj_dim is not None:
            raise SVFitError(
                "the base was distilled to be told its guidance (time_cond_proj_dim in its config), which plain noise "
                "does not teach: train on the base that it was made from, and paint on this one with allow_other_base."
            )
        return Diffusion(self.pipeline.scheduler, sampling)

    @property
    def prediction_type(self) -> str:
        return "v" if self.pipeline.scheduler.config.get("prediction_type") == "v_prediction" else "epsilon"

    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions, time_ids: Tensor
    ) -> Tensor:
        embeds = conditions["prompt_embeds"].to(noisy_latents.dtype)
        return denoiser(noisy_latents, timesteps, embeds, return_dict=False)[0]

    def stand_in(self, batch: int, resolution: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
        config, side = self.denoiser.config, resolution // self.pixels_per_latent
        tokens = self.pipeline.tokenizer.model_max_length
        conditions = {"prompt_embeds": torch.empty(batch, tokens, config.cross_attention_dim)}
        latents = torch.empty(batch, config.in_channels, side, side)
        return latents, torch.empty(batch), conditions, torch.empty(batch, 6)


def _set_length(name: str, tokenizer: Any, encoder: Any) -> None:
    """Sets right how many tokens of a prompt are read; raises SVFitError for fewer than a word with its two marks."""
    given, length = tokenizer.model_max_length, encoder.config.max_position_embeddings
    if given < 3:
        raise SVFitError(f"the tokenizer of {name} reads {given} tokens (model_max_length): write {length} there.")
    if given > length:
        if given < UNLIMITED:  # where nothing is said, libraries put a huge number
            logger.warning("%s reads %d tokens, not the %d that its tokenizer claims.", name, length, given)
        tokenizer.model_max_length = length
