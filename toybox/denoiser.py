"""The last stage of pre-training: the UNet learns to take the noise from latents, told what the caption says."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer

from toybox.architecture import LATENT_SIZE, build_scheduler
from toybox.dataset import batch_indices, draw_captions
from toybox.loop import Budget, fit
from toybox.stages import tokenize
from toybox.world import Scene

CAPTION_DROPOUT = 0.1
OBJECT_WEIGHT = 3.0  # of the loss where the toy is: settings are learned long before toys are
SAMPLE_PROMPTS = (
    "a photo of a red car in the snow",
    "a photo of a yellow duck under water",
    "a photo of a blue robot on the beach",
    "a photo of a white cat in the city at night",
    "a photo of a green teapot on a wooden table",
    "a photo of a pink fish in space",
    "a photo of a purple boat in the clouds",
    "a photo of a brown dog in a meadow",
    "a pencil sketch of an orange cat in the forest",
    "pixel art of a red rocket in the desert",
    "a photo of a blue mug on a stage",
    "a photo of a green butterfly in the kitchen",
)


def object_weights(scenes: Sequence[Scene], size: int) -> Tensor:
    """Weights of the loss, (batch, 1, size, size): `OBJECT_WEIGHT` in a disc around the toy, 1 outside."""
    places = torch.tensor([(scene.x, scene.y, scene.size / 2) for scene in scenes])[..., None, None]  # (batch, 3, 1, 1)
    x, y, radius = places.unbind(1)  # each (batch, 1, 1)
    centres = (torch.arange(size) + 0.5) / size  # (size,)
    inside = (centres - x).square() + (centres[:, None] - y).square() < radius.square()  # (batch, size, size)
    return 1 + (OBJECT_WEIGHT - 1) * inside[:, None].float()


def draw_timesteps(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """`count` timesteps below `steps`, one from each of `count` slices of equal probability: less variance.

    Three in four follow the logit-normal density of Esser et al. (2024), which prefers the middle levels of noise, a
    little toward the noisy side, where shapes are decided; the others are uniform, so that no level starves.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count  # (count,), stratified
    logit_normal = torch.sigmoid(0.4 + torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
    t = torch.where(torch.arange(count) % 4 == 0, u, logit_normal)
    return (t * steps).long().clamp(max=steps - 1)[torch.randperm(count, generator=generator)]


def diffusion_loss(
    unet: Callable,
    scheduler: DDIMScheduler,
    latents: Tensor,
    encoder_hidden_states: Tensor,
    noise: Tensor,
    t: Tensor,
    weights: Tensor,
) -> Tensor:
    """weights * ||v - v_theta||^2, the velocity prediction of Salimans and Ho (2022).

    Weights that fall with the noise (min-SNR) starve the noisiest levels, at which shapes are decided.
    """
    noisy_latents = scheduler.add_noise(latents, noise, t)  # (batch, c, h, w)
    target = scheduler.get_velocity(latents, noise, t)  # (batch, c, h, w)
    model_pred = unet(noisy_latents, t, encoder_hidden_states, return_dict=False)[0].float()  # (batch, c, h, w)
    return (weights / weights.mean() * (model_pred - target).square()).mean()


@dataclass(frozen=True)
class Lessons(Dataset):
    """What a step shows the UNet, decided by the step's number alone: whoever makes it, and whenever, it is the same.

    `lessons[step]` are the chosen scenes, (batch,); their captions' token ids, (batch, length); timesteps, (batch,);
    and the loss's weights, (batch, 1, size, size).
    """

    scenes: Sequence[Scene]
    tokenizer: CLIPTokenizer
    batch_size: int
    size: int = LATENT_SIZE
    timesteps: int = 1000

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chosen = batch_indices(step, self.batch_size, len(self.scenes))
        scenes = [self.scenes[i] for i in chosen]
        captions = draw_captions(scenes, np.random.default_rng((1, step)), CAPTION_DROPOUT)
        t = draw_timesteps(len(chosen), self.timesteps, torch.Generator().manual_seed(step))
        weights = object_weights(scenes, self.size)
        return torch.from_numpy(chosen), tokenize(self.tokenizer, captions), t, weights

    def from_step(self, first: int, stride: int, workers: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The lessons of steps first, first + stride, ..., made ahead by so many processes; 0: when they are asked."""
        ahead = {"prefetch_factor": 8, "pin_memory": True} if workers else {}
        steps = range(first, 2**31, stride)
        return iter(DataLoader(self, sampler=steps, batch_size=None, num_workers=workers, **ahead))  # type: ignore[arg-type]


def train_unet(
    pipeline: StableDiffusionPipeline,
    latents: Tensor,
    scenes: Sequence[Scene],
    checkpoint: Path,
    budget: Budget,
    accelerator: Accelerator,
    batch_size: int | None = None,
    learning_rate: float = 8e-4,
    muon_rate: float = 4e-3,
    sample_every: int | None = None,
    log_every: int = 50,
) -> int:
    """Train the UNet on cached latents and captions as the text encoder reads them, which has learned that already.

    Returns the number of steps made in all.  Of the rates `learning_rate` is AdamW's, for biases, norms, first and
    last layer, and `muon_rate` Muon's, for all the others: with it the UNet learns from a third fewer pictures.
    `batch_size` is 48 by default on a processor, where steps count for more than their precision, and 512 on a GPU,
    which smaller ones leave idle.
    """
    unet, text_encoder, device = pipeline.unet, pipeline.text_encoder, accelerator.device
    scheduler, scale = build_scheduler(), pipeline.vae.config.scaling_factor
    text_encoder.to(device).eval().requires_grad_(False)
    on_gpu = device.type == "cuda"
    if on_gpu:
        pipeline.vae.to(device)  # to paint samples
        unet.to(device, memory_format=torch.channels_last)
        torch.set_float32_matmul_precision("high")
        predict = torch.compile(unet)
    else:
        unet.set_attn_processor(AttnProcessor())  # a third faster to train than the fused attention of CPUs
        predict = unet
    latents = latents.to(device)
    timesteps = scheduler.config.num_train_timesteps
    lessons = Lessons(scenes, pipeline.tokenizer, batch_size or (512 if on_gpu else 48), latents.shape[-1], timesteps)
    workers = min(12, (os.cpu_count() or 1) - 1) if on_gpu else 0
    upcoming: Iterator[tuple[Tensor, Tensor, Tensor, Tensor]] | None = None

    def compute_loss(step: int) -> Tensor:
        nonlocal upcoming
        upcoming = upcoming or lessons.from_step(step, accelerator.num_processes, workers)
        chosen, input_ids, t, weights = (part.to(device, non_blocking=True) for part in next(upcoming))
        clean = latents[chosen].float() * scale  # (batch, c, h, w)
        with torch.no_grad():
            hidden = text_encoder(input_ids)[0]  # (batch, length, width)
        noise = torch.randn(clean.shape, generator=torch.Generator(device).manual_seed(step), device=device)
        return diffusion_loss(predict, scheduler, clean, hidden, noise, t, weights)

    def sample(step: int) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(SAMPLE_PROMPTS))]
        prompts = list(SAMPLE_PROMPTS)
        images = pipeline(prompts, num_inference_steps=25, guidance_scale=4.0, generator=generators).images
        contact_sheet(images, columns=6).save(checkpoint.with_name(f"samples_{step:06d}.png"))

    return fit(
        nn.ModuleDict({"unet": unet}),
        compute_loss,
        checkpoint,
        budget,
        {"unet": learning_rate},
        accelerator,
        muon_rate=muon_rate,
        ema_decay=0.999,
        log_every=log_every,
        sample_every=sample_every,
        sample=sample,
    )


def contact_sheet(images: Sequence[Image.Image], columns: int, zoom: int = 2) -> Image.Image:
    """All images in rows of `columns`."""
    width, height = images[0].width * zoom, images[0].height * zoom
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for number, image in enumerate(images):
        place = (number % columns * width, number // columns * height)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
    return sheet
