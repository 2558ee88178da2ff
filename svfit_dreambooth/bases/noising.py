"""How bases were taught: what noise does to latents, and what the denoiser is to answer.

Diffusion: noise by a schedule, told as epsilon or as v.
noisy latents   x_t = sqrt(a_t) x + sqrt(1 - a_t) e         a_t: the schedule's `alphas_cumprod`
epsilon         e                                           (Ho et al., 2020, arXiv 2006.11239)
v               sqrt(a_t) e - sqrt(1 - a_t) x               (Salimans and Ho, 2022, arXiv 2202.00512)

Flow matching: a straight line from the latents to the noise (Liu et al., 2022, arXiv 2209.03003; Lipman et al., 2022,
arXiv 2210.02747).
noisy latents   x_s = (1 - s) x + s e                       s: in 0 .. 1
velocity        e - x
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from svfit_dreambooth.errors import SVFitError


class Diffusion:
    """A `Noising` by the schedule that a pipeline's sampler names."""

    def __init__(self, sampler: Any, sampling: str | None = None) -> None:
        """`sampler`: the scheduler of the base's pipeline.  `sampling`: how timesteps are drawn, None: all alike.

        Raises SVFitError for another `sampling`, for samplers of models that are trained otherwise (EDM, flow matching), and for bases that
        predict neither the noise nor v.
        """
        if sampling not in (None, "uniform"):
            raise SVFitError(
                f"timestep_sampling {sampling} is for bases trained by flow matching: leave it out.",
                "timestep_sampling",
            )
        kind = type(sampler).__name__
        if kind.startswith(("EDM", "FlowMatch")):
            raise SVFitError(f"the base is sampled with {kind}, and models of that kind cannot be trained here.")
        if not {"beta_start", "beta_end"} <= set(sampler.config) and sampler.config.get("trained_betas") is None:
            raise SVFitError(
                f"the base is sampled with {kind}, which names no noise schedule: it cannot be trained here."
            )
        self.scheduler = DDPMScheduler.from_config(sampler.config)
        self.prediction_type: str = self.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise SVFitError(
                f"the base predicts {self.prediction_type!r}, and only epsilon and v_prediction can be trained."
            )
        self.steps: int = self.scheduler.config.num_train_timesteps

    def draw_timestep(self, generator: torch.Generator, shape: torch.Size) -> int:
        """One of 0 .. T - 1, all alike, whatever the `shape` of the latents."""
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


class Flow:
    """A `Noising` along straight lines; its timesteps are s, 0 at the latents and 1 at the noise."""

    prediction_type = "flow"

    def __init__(self, sampling: str, shift: Callable[[torch.Size], float]) -> None:
        """`sampling`: how s is drawn, see `draw_timestep`.  `shift`: a of latents (channels, h, w)."""
        self.sampling, self.shift = sampling, shift

    def draw_timestep(self, generator: torch.Generator, shape: torch.Size) -> float:
        """s for latents (channels, h, w).

        "uniform": all alike.  "logit_normal": 1 / (1 + exp(-n)), n normal, so that the middle comes more often (Esser
        et al., 2024, arXiv 2403.03206, equation 19).  "shifted": uniform, then moved towards the noise as the base's
        sampler does, a s / (1 + (a - 1) s) (the same, equation 23).  "shifted_logit_normal": both.
        """
        if self.sampling.endswith("logit_normal"):
            s = float(torch.sigmoid(torch.randn((), generator=generator)))
        else:
            s = float(torch.rand((), generator=generator))
        if self.sampling.startswith("shifted"):
            a = self.shift(shape)
            s = a * s / (1 + (a - 1) * s)
        return s

    def even_timesteps(self, count: int) -> list[float]:
        """The middles of `count` equal parts of 0 .. 1."""
        return [(2 * i + 1) / (2 * count) for i in range(count)]

    def noisy_latents(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_s, (batch, channels, h, w), of latents and noise of that shape and timesteps (batch,)."""
        s = timesteps.to(latents).view(-1, 1, 1, 1)
        return (1 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should answer, (batch, channels, h, w)."""
        return noise - latents

    def alphas_cumprod(self, timesteps: Tensor) -> Tensor:
        """(1 - s)^2 / ((1 - s)^2 + s^2) of `timesteps` (n,), (n,) on the CPU."""
        s = timesteps.cpu()
        return (1 - s) ** 2 / ((1 - s) ** 2 + s**2)
