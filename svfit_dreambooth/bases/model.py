"""A base model that is open, or opened one network at a time."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from svfit_dreambooth.bases.families import family_of
from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.bases.few_steps import FewSteps, few_steps
from svfit_dreambooth.bases.networks import UNITS, check_latent_unit
from svfit_dreambooth.bases.quantizing import empty
from svfit_dreambooth.bases.stored import StoredBase
from svfit_dreambooth.method.basis import weight_hash
from svfit_dreambooth.method.decomposition import as_matrix
from svfit_dreambooth.method.quantized import is_quantized, stored_weight
from svfit_dreambooth.method.targets import Projections
from svfit_dreambooth.method.weights import Lazy, joined

logger = logging.getLogger(__name__)

SAMPLE = 64  # values of each weight that the digest looks at, at least


@dataclass
class BaseModel:
    """A base model ready for use: a diffusers pipeline and the name that adapter files give it."""

    name: str  # the embedded one's word, hub id with "@revision", or the name of a folder or file
    pipeline: Any  # a DiffusionPipeline of one of the families
    stored: StoredBase | None = None  # from where its networks are opened one at a time; None: all are open
    vae_name: str | None = None  # what another autoencoder is called that it was given; None: it has its own
    quantize: str | None = None  # in what its denoiser's blocks are held, see `quantizing`; None: as they are

    @cached_property
    def family(self) -> Family:
        """All that is known of its kind."""
        return family_of(self.pipeline, self.name)

    @cached_property
    def digest(self) -> str:
        """What tells this base from others, its copy in float16 excepted, as it was when this was first asked for.

        By a sample of every weight: even a light fine-tune moves some.  To be asked for before anything is cast or put in.
        """
        family, pipeline = self.family, self.pipeline
        if self.stored is not None:
            return self.stored.print(*self.stored.parts)
        vae = pipeline.vae
        unit = [vae.config.get(name) for name in UNITS]
        digest = hashlib.sha256(repr([family.prediction_type, unit]).encode())
        for component, network in {**family.networks, "vae": vae}.items():
            for name, value in network.state_dict().items():
                sample = value.detach().flatten()[:: max(1, value.numel() // SAMPLE)]
                digest.update(f"{component}.{name} {tuple(value.shape)} {weight_hash(sample[None])}\n".encode())
        return digest.hexdigest()

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures that the base was trained on."""
        return self.family.resolution

    @property
    def few_steps(self) -> FewSteps | None:
        """What suits a base that was distilled to paint in a few steps; None: nothing says that it was."""
        return few_steps(self.name, self.family)

    @property
    def guidance_scale(self) -> float:
        """Guidance that suits the base: 1, which is none, where that was distilled too."""
        return self.family.guidance_scale if self.few_steps is None else self.few_steps.guidance_scale

    @property
    def guiding(self) -> list[float]:
        """What pictures that are guided as suits the base are kept under."""
        rescale = self.family.guidance_rescale
        return [self.guidance_scale, *([rescale] if rescale else [])]

    @property
    def num_inference_steps(self) -> int:
        """Denoising steps that suit the base."""
        return self.family.num_inference_steps if self.few_steps is None else self.few_steps.num_inference_steps

    @property
    def architecture(self) -> str:
        """ModelSpec's word for the family."""
        return self.family.architecture

    def weights(self, layers: Mapping[str, Projections]) -> Mapping[str, Tensor]:
        """The weights of `layers` by component, as matrices (out, in), by "<component>.<layer>".

        They share memory with the base, as long as that is not cast; those of a base that is quantised or opened one
        network at a time are read from its files, each time they are asked for.
        """
        if self.stored is None:
            found = {
                f"{component}.{name}": layer for component, own in layers.items() for name, (_, _, layer) in own.items()
            }
            plain = {name: as_matrix(layer.weight.detach()) for name, layer in found.items() if not is_quantized(layer)}
            coarse = {name: partial(stored_weight, name, layer) for name, layer in found.items() if name not in plain}
            return joined(plain, Lazy(coarse)) if coarse else plain
        (component,) = layers
        stored = self.stored.weights(component)
        return Lazy(
            {
                f"{component}.{name}": lambda name=name: as_matrix(stored[f"{name}.weight"])  # type: ignore[misc]
                for name in layers[component]
            }
        )

    def is_open(self, part: str) -> bool:
        """Whether a network holds its weights: before it is opened it is an outline, and a text encoder let go is None."""
        network = getattr(self.pipeline, part)
        return network is not None and not next(network.parameters()).is_meta

    def open(self, *parts: str, dtype: torch.dtype = torch.float32) -> None:
        """Opens those networks, in `dtype` on the CPU, that are not open.  Raises SVFitError where they are not whole."""
        for part in parts:
            if self.stored is not None and not self.is_open(part):
                logger.info("opening the %s of %s.", part, self.name)
                setattr(self.pipeline, part, self.stored.open(part, dtype))
                if part == "vae":
                    check_latent_unit(self.name, self.family)

    def let_go(self, *parts: str) -> None:
        """Frees the memory of those networks, of a base that is opened one at a time."""
        for part in parts:
            if self.stored is not None and self.is_open(part):
                empty(getattr(self.pipeline, part))
            if self.stored is not None and part in self.family.text_encoder_names:
                setattr(self.pipeline, part, None)  # a pipeline asks each part for its device

    @contextmanager
    def opened(
        self, *parts: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Iterator[None]:
        """Within it those networks are open and on `device`; those that were not open before are let go afterwards."""
        closed = [part for part in parts if not self.is_open(part)]
        try:
            self.open(*closed, dtype=dtype)
            for part in parts:
                network = getattr(self.pipeline, part).eval()
                if device is not None:
                    network.to(device)
            yield
        finally:
            self.let_go(*closed)

    def to(self, device: torch.device | str) -> None:
        """Moves all networks that are open to `device`."""
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module) and self.is_open(name):
                part.to(device)
