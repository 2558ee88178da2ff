"""The training loss: noise on latents of the photos, and how well the UNet tells it.

Example number n of a run (which photo, which crop, which timestep, which noise) follows from (seed, n) and nothing
else, so that a run repeats to the bit and does not depend on how many processes share a batch.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svfit_dreambooth.base_model import noise_scheduler
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.preparation import Examples, Run


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

    def loss(self, number: int, process_index: int, num_processes: int) -> Tensor:
        """Mean squared error of one process's share of micro-batch `number`."""
        size = self.config.train_batch_size
        first = process_index * size
        draws = [self._draw(number * size * num_processes + first + i) for i in range(size)]
        return self._loss(*(torch.stack(column) for column in zip(*draws, strict=True)))

    @torch.no_grad()
    def fixed_loss(self) -> float | None:
        """The loss on noises and evenly spread timesteps that the seed fixes; None if none were asked for."""
        count = self.config.fixed_loss_examples
        if count == 0:
            return None
        steps = self.scheduler.config.num_train_timesteps
        total = 0.0
        for i in range(count):
            index, latents, noise, _ = self._draw(i, "fixed")
            timestep = torch.tensor((2 * i + 1) * steps // (2 * count))
            total += self._loss(*(value[None] for value in (index, latents, noise, timestep))).item()
        return total / count

    def _draw(self, number: int, purpose: str = "train") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Example `number` of the run: photo index (), latents and noise (channels, h, w), timestep ()."""
        photos = len(self.examples.mean)
        epoch, place = divmod(number, photos)
        order = torch.randperm(photos, generator=_generator(self.config.seed, purpose, "order", epoch))
        index = int(order[place])
        generator = _generator(self.config.seed, purpose, "example", number)
        mean, spread = self.examples.mean[index], self.examples.spread[index]  # (variants, channels, h, w)
        variant = int(torch.randint(len(mean), (), generator=generator))
        latents = mean[variant] + spread[variant] * torch.randn(mean[variant].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.randint(self.scheduler.config.num_train_timesteps, (), generator=generator)
        return torch.tensor(index), latents, noise, timestep

    def _loss(self, index: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        latents, noise, timesteps = (value.to(self.device) for value in (latents, noise, timesteps))
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)  # (batch, channels, h, w)
        encoder_hidden_states = self._encode(index)  # (batch, tokens, dim)
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
        return F.mse_loss(model_pred.float(), target.float())

    def _encode(self, index: Tensor) -> Tensor:
        if self.config.train_text_encoder:
            ids = self.examples.input_ids[index].to(self.device)  # (batch, tokens)
            return self.text_encoder(ids)[0]
        return self.examples.prompt_embeds[index].to(self.device)


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
