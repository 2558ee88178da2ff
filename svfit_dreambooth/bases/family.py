"""What a family of base models must say, so that everything else can adapt it without knowing it.

A family is one file: a class that holds a diffusers pipeline and answers for it.  Within, tensors are as the denoiser
sees them: latents (n, channels, h, w) in its unit, conditions as `encode_tokens` makes them.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor, nn

from svfit_dreambooth.bases.clip_skip import clip_skip_of
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.targets import LayerNames, Projections, find_projections

Tokens: TypeAlias = dict[str, Tensor]  # what the tokenizers make of prompts, (prompts, tokens) each
Conditions: TypeAlias = dict[str, Tensor]  # what the denoiser is told of prompts, (prompts, ...) each
Role: TypeAlias = Literal["denoiser", "text_encoder"]


logger = logging.getLogger(__name__)


class Noising(Protocol):
    """How a family was taught: what noise does to latents, and what the denoiser is to answer."""

    prediction_type: str  # "epsilon", "v_prediction", "flow"

    def draw_timestep(self, generator: torch.Generator, shape: torch.Size) -> float:
        """A timestep for latents (channels, h, w), as often as the family is trained at it."""

    def even_timesteps(self, count: int) -> list[float]:
        """`count` timesteps that cover all of them evenly."""

    def noisy_latents(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(batch, channels, h, w) of latents and noise of that shape and timesteps (batch,)."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should answer, (batch, channels, h, w)."""

    def alphas_cumprod(self, timesteps: Tensor) -> Tensor:
        """Share of the latents in the variance of the noisy ones at `timesteps` (n,), (n,) on the CPU."""


class Family(ABC):
    """A pipeline, and what is known of its kind.

    Its denoiser and its text encoders are called "components", by the names that adapter files give them.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_name: ClassVar[str]
    text_encoder_names: ClassVar[tuple[str, ...]]  # prompts go through all of them
    optional_text_encoders: ClassVar[tuple[str, ...]] = ()  # those of them that a base may lack
    adaptable_text_encoders: ClassVar[bool] = True  # whether adapters may change them
    layer_names: ClassVar[Mapping[Role, LayerNames]]
    values_per_layer: ClassVar[int | None] = None  # what a run trains unasked, on the average; None: all of them
    # layers of the denoiser in the base's original code -> what they are here, row under row; {} stands for a number
    original_names: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    checkpointed: ClassVar[tuple[type[nn.Module], ...]]  # the blocks that gradient checkpointing runs again
    guidance_scale: float  # that suits
    guidance_rescale: ClassVar[float] = 0.0  # that suits; see `rescale_for` of painting/numbers.py
    num_inference_steps: ClassVar[int] = 25  # denoising steps that suit a base that was not distilled
    no_prompt: ClassVar[str] = ""  # what stands for no negative prompt
    guided_together: ClassVar[bool] = True  # whether one call of the denoiser answers with and without the prompt

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.answers: dict[str, Conditions] = {}  # to prompts, (1, ...) each, of text encoders that were let go

    @classmethod
    @abstractmethod
    def fits(cls, pipeline: DiffusionPipeline) -> bool:
        """Whether `pipeline` is built of this family's networks, whatever it does with them."""

    @classmethod
    @abstractmethod
    def load_options(cls, content_filter: bool) -> dict[str, Any]:
        """What `from_pretrained` is told beside the type; without the content filter it must not ask for one."""

    @abstractmethod
    def check(self, name: str) -> None:
        """Raises SVFitError where `name`, as the user called the base, is a variety that cannot be adapted."""

    @property
    @abstractmethod
    def architecture(self) -> str:
        """ModelSpec's word for the family."""

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """What both sides of a picture, in pixels, should be multiples of, for the denoiser to take it evenly."""

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Side in pixels of the pictures that the base was trained on."""

    @property
    def required_multiple(self) -> int:
        """What both sides of a picture, in pixels, must be multiples of."""
        return self.pixels_per_latent

    @property
    def prediction_type(self) -> str | None:
        """ModelSpec's word for what the denoiser answers; None where it has none."""
        return None

    @property
    def undistilled(self) -> str | None:
        """The base that should be trained in place of this one, which was distilled for few steps; None: this is it."""
        return None

    # components

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        found = {name: getattr(self.pipeline, name, None) for name in self.text_encoder_names}
        return {name: module for name, module in found.items() if module is not None}

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizer of each text encoder, by the encoder's name."""
        return {name: getattr(self.pipeline, tokenizer_name(name)) for name in self.text_encoders}

    @property
    def components(self) -> dict[str, nn.Module]:
        """The networks that adapters may change, by name, the denoiser first."""
        return {self.denoiser_name: self.denoiser, **(self.text_encoders if self.adaptable_text_encoders else {})}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The denoiser and all text encoders, whether adapters may change them or not."""
        return {self.denoiser_name: self.denoiser, **self.text_encoders}

    def role(self, component: str) -> Role:
        """What a component does; also of the full name of a layer, "<component>.<path>"."""
        return "denoiser" if component.partition(".")[0] == self.denoiser_name else "text_encoder"

    def find_projections(self, component: str, target_modules: Sequence[str] | None = None) -> Projections:
        """The layers of a component to adapt, see `method.targets.find_projections`; None: its attention."""
        names = self.layer_names[self.role(component)]
        return find_projections(self.components[component], target_modules, names)

    def adapted_layers(
        self, target_modules: Sequence[str] | None = None, train_text_encoder: bool = False
    ) -> dict[str, Projections]:
        """The layers of every component that a run adapts: of the denoiser those named, of text encoders the attention."""
        found = {self.denoiser_name: self.find_projections(self.denoiser_name, target_modules)}
        if train_text_encoder:
            found |= {component: self.find_projections(component) for component in self.text_encoders}
        return found

    # prompts

    @abstractmethod
    def tokenize(self, prompts: list[str]) -> Tokens:
        """The tokens of prompts; one that is cut off is named in a warning."""

    @abstractmethod
    def encode_tokens(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Conditions:
        """What the denoiser is told of tokens that lie where the `encoders` are.

        `encoders`: the text encoders by name, maybe wrapped for training.
        """

    @torch.no_grad()
    def conditions(self, prompts: list[str]) -> Conditions:
        """What the denoiser is told of prompts, where the text encoders answer."""
        device = get_module_execution_device(next(iter(self.text_encoders.values())))
        tokens = {name: ids.to(device) for name, ids in self.tokenize(prompts).items()}
        return self.encode_tokens(tokens, self.text_encoders)

    @property
    def clip_skip(self) -> int:
        """How many layers earlier than the family does the text encoders are read, see `read_earlier`."""
        return max(map(clip_skip_of, self.text_encoders.values()), default=0)

    def read_earlier(self, clip_skip: int) -> None:
        """Has the text encoders read `clip_skip` layers earlier than the family does, from now on; 0: as it does.

        Counted as diffusers counts, 1 less than A1111.  All prompts are read so, negative ones too.
        Raises SVFitError for encoders of another kind than CLIP, and for more layers than there are.
        """
        if clip_skip:
            raise SVFitError(
                f"clip_skip {clip_skip} is for Stable Diffusion 1.x, 2.x and XL: leave it out.", "clip_skip"
            )

    def painting_arguments(self, words: dict[str, Any], guidance_scale: float) -> dict[str, Any]:
        """What the pipeline is called with to paint `words`, "prompt" and "negative_prompt" or their embeddings."""
        return words | {"guidance_scale": guidance_scale}

    # pictures

    @property
    def pixels_per_latent(self) -> int:
        return int(self.pipeline.vae_scale_factor)

    def latent_unit(self) -> tuple[Tensor | float, Tensor | float]:
        """Offset and factor from the autoencoder's latents z to the denoiser's, (z - offset) * factor."""
        config = self.pipeline.vae.config
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread of the latents of `pixel_values` (n, 3, height, width) in [-1, 1], float32.

        Each (n, channels, h, w), in the denoiser's unit; an autoencoder without posterior has spread 0.
        """
        mean, spread = posterior(self.pipeline.vae, pixel_values)
        offset, factor = (_like(value, mean) for value in self.latent_unit())
        return (mean - offset) * factor, spread * factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        """The pictures, `height` by `width` pixels, of what the pipeline returns for the output type "latent".

        Decoded in the autoencoder's own precision.
        """
        latents = latents.to(self.pipeline.vae.dtype)
        offset, factor = (_like(value, latents) for value in self.latent_unit())
        return self.decode(latents / factor + offset)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """The pictures of `latents` in the autoencoder's own unit and shape."""
        pipeline, vae = self.pipeline, self.pipeline.vae
        device = get_module_execution_device(vae)  # if offloaded, not where its weights wait
        pixels = vae.decode(latents.to(device, vae.dtype), return_dict=False)[0]
        if pixels.ndim == 5:  # of an autoencoder for videos: the only frame
            pixels = pixels[:, :, 0]
        pipeline.maybe_free_model_hooks()
        if getattr(pipeline, "watermark", None) is not None:
            pixels = pipeline.watermark.apply_watermark(pixels)
        return pipeline.image_processor.postprocess(pixels, output_type="pil")

    def cast(self, dtype: torch.dtype) -> None:
        """Casts every network of the pipeline to `dtype`."""
        for module in self.pipeline.components.values():
            if isinstance(module, nn.Module):
                module.to(dtype)

    # the loss

    @abstractmethod
    def noising(self, sampling: str | None = None) -> Noising:
        """How the base was taught.  `sampling`: how timesteps are drawn, None: as suits the family.

        Raises SVFitError for bases that were taught in a way that is not known here, and for a `sampling` that is not
        for them.
        """

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions, time_ids: Tensor
    ) -> Tensor:
        """The denoiser's answer, (batch, channels, h, w), to noisy latents of that shape, whose type it works in.

        `denoiser`: the family's own, maybe wrapped for training.  `timesteps`: (batch,), as `noising` draws them.
        `conditions`: as `encode_tokens`, (batch, ...).  `time_ids`: (batch, 6), height and width of the photo, top and
        left of the window, its height and width, in pixels.
        """

    @abstractmethod
    def stand_in(self, batch: int, resolution: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
        """What `predict` takes after the denoiser, of the right shapes and without meaning: to count memory."""


def posterior(vae: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of the latents that `vae` gives `pixel_values`, float32, in its own unit."""
    encoded = vae.encode(pixel_values.to(vae.device, vae.dtype))
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latents  # as AutoencoderDC and Tiny call them
    return latents.float(), torch.zeros_like(latents, dtype=torch.float32)


def tokenizer_name(text_encoder: str) -> str:
    """How a pipeline calls the tokenizer of its text encoder of that name."""
    return text_encoder.replace("text_encoder", "tokenizer", 1)


def warn_of_cut(tokenizer: Any, prompts: Sequence[str], texts: Sequence[str], length: int) -> None:
    """Names in a warning each of `prompts` whose text the tokenizer will cut to `length` tokens."""
    for prompt, text in zip(prompts, texts, strict=True):
        count = len(tokenizer(text).input_ids)
        if count > length:
            logger.warning("the prompt %r has %d tokens, and only the first %d are read.", prompt, count, length)


def _like(value: Tensor | float, latents: Tensor) -> Tensor | float:
    return value.to(latents.device, torch.float32) if isinstance(value, Tensor) else value
