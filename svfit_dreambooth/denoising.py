"""The training loss: noise on latents of the photos, and how well the UNet tells it.

Example number n of a run (which photo, which crop, which timestep, which noise) follows from (seed, n) and nothing
else, so that a run repeats to the bit and does not depend on how many processes share a batch.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svfit_dreambooth.base_model import noise_scheduler
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.preparation import Examples, Run


class Loss(NamedTuple):
    """The loss of a micro-batch, all scalars; `total` is what to go down along."""

    total: Tensor
    instance: Tensor  # of the subject's photos
    prior: Tensor | None = None  # of the class pictures, before its weight; None: without prior preservation


@dataclass
class Draw:
    """One training example."""

    index: int  # of the photo
    latents: Tensor  # (channels, h, w)
    noise: Tensor  # (channels, h, w)
    timestep: int


class Denoiser:
    """The loss of the UNet on noised latents of the photos, at examples that follow from their number."""

    def __init__(
        self,
        run: Run,
        examples: Examples,
        unet: nn.Module,
        text_encoder: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.examples = run.config, examples
        self.unet, self.text_encoder, self.pipeline = unet, text_encoder, run.base.pipeline
        self.scheduler = noise_scheduler(run.base.pipeline)
        self.device, self.dtype = device, dtype

    def loss(self, number: int, process_index: int, num_processes: int) -> Loss:
        """Weighted mean squared error of one process's share of micro-batch `number`."""
        size = self.config.train_batch_size
        first = number * size * num_processes + process_index * size
        draws = [self._draw(first + i) for i in range(size)]
        errors = self._errors(draws)  # (batch,)
        if self.config.snr_gamma is not None:
            timesteps = torch.tensor([draw.timestep for draw in draws])
            weights = min_snr_weights(
                self.scheduler.alphas_cumprod[timesteps], self.config.snr_gamma, self.scheduler.config.prediction_type
            )  # (batch,)
            errors = errors * weights.to(errors)
        instance = errors.mean()
        return Loss(instance, instance)

    @torch.no_grad()
    def fixed_loss(self) -> float | None:
        """The loss on noises and evenly spread timesteps that the seed fixes; None if none were asked for.

        Neither min-SNR weights nor offset noise enter, so that runs with and without them can be compared.
        """
        count = self.config.fixed_loss_examples
        if count == 0:
            return None
        steps = self.scheduler.config.num_train_timesteps
        total = 0.0
        for i in range(count):
            draw = self._draw(i, "fixed")
            draw.timestep = (2 * i + 1) * steps // (2 * count)
            total += self._errors([draw]).item()
        return total / count

    def _draw(self, number: int, purpose: str = "train") -> Draw:
        """Example `number` of the run."""
        photos = len(self.examples.mean)
        epoch, place = divmod(number, photos)
        order = torch.randperm(photos, generator=_generator(self.config.seed, purpose, "order", epoch))
        index = int(order[place])
        generator = _generator(self.config.seed, purpose, "example", number)
        mean, spread = self.examples.mean[index], self.examples.spread[index]  # (variants, channels, h, w)
        variant = int(torch.randint(len(mean), (), generator=generator))
        latents = mean[variant] + spread[variant] * torch.randn(mean[variant].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timestep = int(torch.randint(self.scheduler.config.num_train_timesteps, (), generator=generator))
        if self.config.noise_offset and purpose != "fixed":  # drawn last: the other numbers are as without it
            noise = noise + self.config.noise_offset * torch.randn((len(noise), 1, 1), generator=generator)
        return Draw(index, latents, noise, timestep)

    def _errors(self, draws: list[Draw]) -> Tensor:
        """Mean squared error of every example, (batch,)."""
        latents = torch.stack([draw.latents for draw in draws]).to(self.device)  # (batch, channels, h, w)
        noise = torch.stack([draw.noise for draw in draws]).to(self.device)  # (batch, channels, h, w)
        timesteps = torch.tensor([draw.timestep for draw in draws], device=self.device)  # (batch,)
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)  # (batch, channels, h, w)
        encoder_hidden_states = self._encode(torch.tensor([draw.index for draw in draws]))  # (batch, tokens, dim)
        model_pred = self.unet(
            noisy_latents.to(self.dtype), timesteps, encoder_hidden_states.to(self.dtype), return_dict=False
        )[0]
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            target = noise
        elif prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        else:
            raise SVFitError(
                f"the base predicts {prediction_type!r}, and only epsilon and v_prediction can be trained."
            )
        return (model_pred.float() - target.float()).square().flatten(1).mean(1)

    def _encode(self, index: Tensor) -> Tensor:
        if self.config.train_text_encoder:
            ids = self.examples.input_ids[index].to(self.device)  # (batch, tokens)
            return self.text_encoder(ids)[0]
        return self.examples.prompt_embeds[index].to(self.device)


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weights of the loss at timesteps whose cumulative alphas are `alphas_cumprod` (n,), (n,).

    SNR = alpha / (1 - alpha); min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v-prediction
    (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023, arXiv 2303.09556).  Pure noise,
    SNR 0, weighs 1 and 0; so written that neither end divides 0 by 0.
    """
    snr = alphas_cumprod.double() / (1 - alphas_cumprod.double())
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
