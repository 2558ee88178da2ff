"""How bases of the diffusion kind were taught: noise on latents by a schedule, told as epsilon or as v.

noisy latents   x_t = sqrt(a_t) x + sqrt(1 - a_t) e         a_t: the schedule's `alphas_cumprod`
epsilon         e                                           (Ho et al., 2020, arXiv 2006.11239)
v               sqrt(a_t) e - sqrt(1 - a_t) x               (Salimans and Ho, 2022, arXiv 2202.00512)
"""

from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from svfit_dreambooth.errors import SVFitError


class Diffusion:
    """A `Noising` by the schedule that a pipeline's sampler names."""

    def __init__(self, sampler: Any) -> None:
        """`sampler`: the scheduler of the base's pipeline.

        Raises SVFitError for samplers of models that are trained otherwise (EDM, flow matching), and for bases that
        predict neither the noise nor v.
        """
        kind = type(sampler).__name__
        if kind.startswith(("EDM", "FlowMatch")):
            raise SVFitError(f"the base is sampled with {kind}, and models of that kind cannot be trained here.")
        self.scheduler = DDPMScheduler.from_config(sampler.config)
        self.prediction_type: str = self.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise SVFitError(
                f"the base predicts {self.prediction_type!r}, and only epsilon and v_prediction can be trained."
            )
        self.steps: int = self.scheduler.config.num_train_timesteps

    def draw_timestep(self, generator: torch.Generator) -> int:
        """One of 0 .. T - 1, all alike."""
        return int(torch.randint(self.steps, (), generator=generator))

    def even_timesteps(self, count: int) -> list[float]:
        """The middles of `count` equal parts of 0 .. T - 1."""
        return [(2 * i + 1) * self.steps // (2 * count) for i in range(count)]

    def noisy_latents(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t, (batch, channels, h, w), of latents and noise of that shape and timesteps (batch,)."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should answer, (batch, channels, h, w)."""
        if self.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def alphas_cumprod(self, timesteps: Tensor) -> Tensor:
        """a_t of `timesteps` (n,), (n,) on the CPU: the table moves with the first noise, and MPS has no float64."""
        return self.scheduler.alphas_cumprod.cpu()[timesteps.cpu()]
