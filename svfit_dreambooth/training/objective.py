"""The training loss: noise on latents of the photos, and how well the UNet tells it.

Example number n of a run (which photo, which crop, which timestep, which noise) follows from (seed, n) and nothing
else, so that a run repeats to the bit and does not depend on how many processes share a batch.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svfit_dreambooth.bases.encoders import encode_tokens
from svfit_dreambooth.bases.opening import noise_scheduler
from svfit_dreambooth.training.examples import Examples
from svfit_dreambooth.training.plan import Run


class Loss(NamedTuple):
    """The loss of a micro-batch, all scalars; `total` is what to go down along."""

    total: Tensor
    instance: Tensor  # of the subject's photos
    prior: Tensor | None  # of the class pictures, before its weight; None: without prior preservation


@dataclass
class Draw:
    """One training example."""

    source: Examples
    index: int  # of the photo among them
    latents: Tensor  # (channels, h, w)
    weight: Tensor | None  # (1, h, w), of the loss; None: everywhere the same
    time_ids: Tensor  # (6,), what SDXL is told of the window
    noise: Tensor  # (channels, h, w)
    timestep: int
    prompt: int  # its row among those of `source`


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
        text_encoder_2: nn.Module | None = None,
    ) -> None:
        """`text_encoder_2`: SDXL's, where the text encoders are trained."""
        self.config, self.examples = run.config, examples
        self.unet, self.pipeline = unet, run.base.pipeline
        self.text_encoders = [text_encoder] if text_encoder_2 is None else [text_encoder, text_encoder_2]
        self.scheduler = noise_scheduler(run.base.pipeline)
        self.device, self.dtype = device, dtype

    def loss(self, number: int, process_index: int, num_processes: int) -> Loss:
        """Weighted mean squared error of one process's share of micro-batch `number`.

        With prior preservation as many class pictures come on top (Ruiz et al., 2022, equation 2).
        """
        size = self.config.train_batch_size
        first = number * size * num_processes + process_index * size
        draws = [self._draw(first + i) for i in range(size)]
        if self.examples.prior is not None:
            draws += [self._draw(first + i, "class") for i in range(size)]
        errors = self._errors(draws)  # (batch,)
        if self.config.snr_gamma is not None:
            timesteps = torch.tensor([draw.timestep for draw in draws])
            alphas_cumprod = self.scheduler.alphas_cumprod.cpu()[timesteps]  # by now on the device: MPS has no float64
            prediction_type = self.scheduler.config.prediction_type
            weights = min_snr_weights(alphas_cumprod, self.config.snr_gamma, prediction_type)  # (batch,)
            errors = errors * weights.float().to(errors)
        instance = errors[:size].mean()
        if self.examples.prior is None:
            return Loss(instance, instance, None)
        prior = errors[size:].mean()
        return Loss(instance + self.config.prior_loss_weight * prior, instance, prior)

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
        """Example `number` of the run; `purpose` is "train", "class" (of the class pictures) or "fixed"."""
        source = self.examples.prior if purpose == "class" and self.examples.prior is not None else self.examples
        photos = [i for i, times in enumerate(source.repeats or [1] * len(source.mean)) for _ in range(times)]
        epoch, place = divmod(number, len(photos))
        order = torch.randperm(len(photos), generator=_generator(self.config.seed, purpose, "order", epoch))
        index = photos[int(order[place])]
        generator = _generator(self.config.seed, purpose, "example", number)
        mean, spread = source.mean[index], source.spread[index]  # (variants, channels, h, w)
        weight = source.weight[index]  # (variants, 1, h, w)
        variant = int(torch.randint(len(mean), (), generator=generator))
        latents = mean[variant] + spread[variant] * torch.randn(mean[variant].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timestep = int(torch.randint(self.scheduler.config.num_train_timesteps, (), generator=generator))
        if self.config.noise_offset and purpose != "fixed":  # drawn last: the other numbers are as without it
            noise = noise + self.config.noise_offset * torch.randn((len(noise), 1, 1), generator=generator)
        own_weight = None if weight is None else weight[variant]
        prompt = self._draw_prompt(source, index, purpose, _generator(self.config.seed, purpose, "prompt", number))
        return Draw(source, index, latents, own_weight, source.time_ids[index][variant], noise, timestep, prompt)

    def _draw_prompt(self, source: Examples, index: int, purpose: str, generator: torch.Generator) -> int:
        """One of the captions of photo `index`, or the empty one where it is dropped; from numbers of its own."""
        rows = source.prompts[index]
        row = rows[int(torch.randint(len(rows), (), generator=generator))]
        dropped = float(torch.rand((), generator=generator)) < self.config.caption_dropout_rate
        return source.dropped if dropped and source.dropped is not None and purpose != "fixed" else row

    def _errors(self, draws: list[Draw]) -> Tensor:
        """Mean squared error of every example, (batch,); photos of one shape go through the UNet together."""
        by_shape: dict[torch.Size, list[int]] = {}
        for place, draw in enumerate(draws):
            by_shape.setdefault(draw.latents.shape, []).append(place)
        errors: dict[int, Tensor] = {}
        for places in by_shape.values():
            errors |= zip(places, self._equal_errors([draws[place] for place in places]), strict=True)
        return torch.stack([errors[place] for place in range(len(draws))])

    def _equal_errors(self, draws: list[Draw]) -> Tensor:
        """The same for latents of one shape."""
        latents = torch.stack([draw.latents for draw in draws]).to(self.device)  # (batch, channels, h, w)
        noise = torch.stack([draw.noise for draw in draws]).to(self.device)  # (batch, channels, h, w)
        timesteps = torch.tensor([draw.timestep for draw in draws], device=self.device)  # (batch,)
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)  # (batch, channels, h, w)
        encoder_hidden_states, pooled = self._encode(draws)  # (batch, tokens, dim), (batch, dim)
        conditions = {}
        if pooled is not None:
            time_ids = torch.stack([draw.time_ids for draw in draws]).to(self.device)  # (batch, 6)
            conditions["added_cond_kwargs"] = {"text_embeds": pooled.to(self.dtype), "time_ids": time_ids}
        model_pred = self.unet(
            noisy_latents.to(self.dtype),
            timesteps,
            encoder_hidden_states.to(self.dtype),
            return_dict=False,
            **conditions,
        )[0]
        if self.scheduler.config.prediction_type == "epsilon":
            target = noise
        else:  # v, the only other that `noise_scheduler` lets through
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        squares = (model_pred.float() - target.float()).square()  # (batch, channels, h, w)
        if all(draw.weight is None for draw in draws):
            return squares.flatten(1).mean(1)
        everywhere = torch.ones(1, *squares.shape[2:])
        weight = torch.stack([everywhere if draw.weight is None else draw.weight for draw in draws])  # (batch, 1, h, w)
        return weighted_mean(squares, weight.to(squares))

    def _encode(self, draws: list[Draw]) -> tuple[Tensor, Tensor | None]:
        rows = [(draw.source, draw.prompt) for draw in draws]
        if self.config.train_text_encoder or self.config.learned_word:
            ids = [
                torch.stack([source.input_ids[number][row] for source, row in rows]).to(self.device)
                for number in range(len(self.text_encoders))
            ]  # (batch, tokens) for each encoder
            return encode_tokens(self.text_encoders, ids)
        embeds = torch.stack([source.prompt_embeds[row] for source, row in rows]).to(self.device)
        pooled = [source.pooled_prompt_embeds[row] for source, row in rows if source.pooled_prompt_embeds is not None]
        return embeds, torch.stack(pooled).to(self.device) if pooled else None


def weighted_mean(squares: Tensor, weight: Tensor) -> Tensor:
    """sum(weight * squares) / sum(weight) of every example, (batch,), of (batch, channels, h, w) and (batch, 1, h, w).

    So a small subject counts as much as a large one.  Where all weights are 0, as in a window beside the subject
    with unmasked_weight 0, it is 0.
    """
    weight = weight.expand_as(squares)
    total = weight.flatten(1).sum(1)
    return (weight * squares).flatten(1).sum(1) / total.clamp(min=torch.finfo(total.dtype).tiny)


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
