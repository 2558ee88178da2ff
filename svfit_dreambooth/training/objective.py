"""The training loss: noise on latents of the photos, and how well the denoiser tells it.

Example number n of a run (which photo, which crop, which timestep, which noise) follows from (seed, n) and nothing
else, so that a run repeats to the bit and does not depend on how many processes share a batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svfit_dreambooth.bases.devices import MIXED_PRECISION
from svfit_dreambooth.bases.family import Conditions
from svfit_dreambooth.training.examples import Examples
from svfit_dreambooth.training.plan import Plan

EMPTY_SHARE = 0.3  # of the examples of the base's own pictures: guidance asks without a prompt as often as with one


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
    time_ids: Tensor  # (6,), where the window was
    noise: Tensor  # (channels, h, w)
    timestep: float
    prompt: int  # its row among those of `source`


class Objective:
    """The loss of the denoiser on noised latents of the photos, at examples that follow from their number."""

    def __init__(
        self,
        plan: Plan,
        examples: Examples,
        networks: Mapping[str, nn.Module],
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype`: in which the denoiser computes; None: as the run's options say.  `networks`: the components of the base by name, maybe wrapped for training."""
        self.config, self.examples, self.family = plan.config, examples, plan.base.family
        self.networks, self.denoiser = networks, networks[self.family.denoiser_name]
        self.noising = self.family.noising(plan.config.timestep_sampling)
        self.device = device
        self.dtype = MIXED_PRECISION[plan.config.mixed_precision] if dtype is None else dtype

    def loss(self, number: int, process_index: int, num_processes: int) -> Loss:
        """Weighted mean squared error of one process's share of micro-batch `number`.

        With prior preservation as many class pictures come on top (Ruiz et al., 2022, equation 2).
        """
        draws = self.draws(number, process_index, num_processes)
        return self.loss_of(draws, self._errors(draws))

    def draws(self, number: int, process_index: int = 0, num_processes: int = 1) -> list[Draw]:
        """The examples of one process's share of micro-batch `number`: photos, then as many class pictures, if any."""
        size = self.config.train_batch_size
        first = number * size * num_processes + process_index * size
        draws = [self.draw(first + i) for i in range(size)]
        if self.examples.prior is not None:
            draws += [self.draw(first + i, "class") for i in range(size)]
        return draws

    def loss_of(self, draws: list[Draw], errors: Tensor) -> Loss:
        """The loss of the examples `draws`, whose mean squared errors are `errors` (batch,); linear in these."""
        size = self.config.train_batch_size
        if self.config.snr_gamma is not None:
            timesteps = torch.tensor([draw.timestep for draw in draws])
            alphas_cumprod = self.noising.alphas_cumprod(timesteps)  # (batch,)
            weights = min_snr_weights(alphas_cumprod, self.config.snr_gamma, self.noising.prediction_type)  # (batch,)
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
        total = 0.0
        for i, timestep in enumerate(self.noising.even_timesteps(count)):
            draw = self.draw(i, "fixed")
            draw.timestep = timestep
            total += self._errors([draw]).item()
        return total / count

    def draw(self, number: int, purpose: str = "train") -> Draw:
        """Example `number` of the run; `purpose` is "train", "fixed", "class" (of the class pictures) or "base" (of the base's own)."""
        source = {"class": self.examples.prior, "base": self.examples.base}.get(purpose) or self.examples
        photos = [i for i, times in enumerate(source.repeats or [1] * len(source.mean)) for _ in range(times)]
        epoch, place = divmod(number, len(photos))
        order = torch.randperm(len(photos), generator=seeded(self.config.seed, purpose, "order", epoch))
        index = photos[int(order[place])]
        generator = seeded(self.config.seed, purpose, "example", number)
        mean, spread = source.mean[index], source.spread[index]  # (variants, channels, h, w)
        weight = source.weight[index]  # (variants, 1, h, w)
        variant = int(torch.randint(len(mean), (), generator=generator))
        latents = mean[variant] + spread[variant] * torch.randn(mean[variant].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timestep = self.noising.draw_timestep(generator, latents.shape)
        if self.config.noise_offset and purpose not in (
            "fixed",
            "base",
        ):  # drawn last: the other numbers are as without it
            noise = noise + self.config.noise_offset * torch.randn((len(noise), 1, 1), generator=generator)
        own_weight = None if weight is None else weight[variant]
        prompt = self._draw_prompt(source, index, purpose, seeded(self.config.seed, purpose, "prompt", number))
        return Draw(source, index, latents, own_weight, source.time_ids[index][variant], noise, timestep, prompt)

    def _draw_prompt(self, source: Examples, index: int, purpose: str, generator: torch.Generator) -> int:
        """One of the captions of photo `index`, or the empty one where it is dropped; from numbers of its own."""
        rows = source.prompts[index]
        row = rows[int(torch.randint(len(rows), (), generator=generator))]
        rate = EMPTY_SHARE if purpose == "base" else self.config.caption_dropout_rate
        dropped = float(torch.rand((), generator=generator)) < rate
        return source.dropped if dropped and source.dropped is not None and purpose != "fixed" else row

    def _errors(self, draws: list[Draw]) -> Tensor:
        """Mean squared error of every example, (batch,); photos of one shape go through the denoiser together."""
        errors: dict[int, Tensor] = {}
        for places in by_shape(draws):
            errors |= zip(places, self.equal_errors([draws[place] for place in places]), strict=True)
        return torch.stack([errors[place] for place in range(len(draws))])

    def equal_errors(self, draws: list[Draw]) -> Tensor:
        """Mean squared error of every example, (batch,), of latents of one shape."""
        model_pred, target = self.predict(draws)
        exact = torch.promote_types(model_pred.dtype, torch.float32)
        squares = (model_pred.to(exact) - target.to(exact)).square()  # (batch, channels, h, w)
        if all(draw.weight is None for draw in draws):
            return squares.flatten(1).mean(1)
        everywhere = torch.ones(1, *squares.shape[2:])
        weight = torch.stack([everywhere if draw.weight is None else draw.weight for draw in draws])  # (batch, 1, h, w)
        return weighted_mean(squares, weight.to(squares))

    def predict(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """The denoiser's answers to examples of one shape, and what they should be, (batch, channels, h, w) each."""
        latents = torch.stack([draw.latents for draw in draws]).to(self.device)  # (batch, channels, h, w)
        noise = torch.stack([draw.noise for draw in draws]).to(self.device)  # (batch, channels, h, w)
        timesteps = torch.tensor([draw.timestep for draw in draws], device=self.device)  # (batch,)
        noisy_latents = self.noising.noisy_latents(latents, noise, timesteps)  # (batch, channels, h, w)
        time_ids = torch.stack([draw.time_ids for draw in draws]).to(self.device)  # (batch, 6)
        model_pred = self.family.predict(
            self.denoiser, noisy_latents.to(self.dtype), timesteps, self._conditions(draws), time_ids
        )  # (batch, channels, h, w)
        return model_pred, self.noising.target(latents, noise, timesteps)

    def _conditions(self, draws: Sequence[Draw]) -> Conditions:
        """What the denoiser is told of the captions, (batch, ...) each; encoded anew where encoders are trained."""
        anew = bool(self.config.train_text_encoder or self.config.learned_word)
        rows = [(draw.source.tokens if anew else draw.source.conditions, draw.prompt) for draw in draws]
        stacked = {name: torch.stack([table[name][row] for table, row in rows]).to(self.device) for name in rows[0][0]}
        return self.family.encode_tokens(stacked, self.networks) if anew else stacked


def by_shape(draws: list[Draw]) -> list[list[int]]:
    """The places of `draws` whose latents and conditions have one shape, for each shape."""
    places: dict[object, list[int]] = {}
    for place, draw in enumerate(draws):
        conditions = [rows.shape[1:] for rows in draw.source.conditions.values()]
        places.setdefault((draw.latents.shape, *conditions), []).append(place)
    return list(places.values())


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


def seeded(*key: object) -> torch.Generator:
    """A generator that follows from `key` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
