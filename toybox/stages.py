"""The first stages of pre-training: autoencoder, latents, and reading lessons for the text encoder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from toybox.dataset import as_tensor, batch_indices, draw_captions
from toybox.loop import Budget, fit
from toybox.world import COLOURS, KINDS, SETTINGS, STYLES, Scene


def gradient_l1(image: Tensor, target: Tensor) -> Tensor:
    """L1 between the differences of neighbouring pixels: punishes blur where plain L1 does not."""
    return F.l1_loss(image.diff(dim=-1), target.diff(dim=-1)) + F.l1_loss(image.diff(dim=-2), target.diff(dim=-2))


@torch.no_grad()
def fit_encoder(vae: AutoencoderTiny, pictures: np.ndarray, count: int = 4000) -> None:
    """Sets the encoder in closed form: the leading principal components of the 4x4 patches of `pictures`.

    Without residual blocks `AutoencoderTiny`'s encoder is linear, wide enough to collect the 48 numbers of a patch
    and project them.  Such latents look like small pictures, which a UNet learns far sooner than those of a trained
    encoder, and they never change: the decoder can be trained at any time.  A component with standard deviation s
    is scaled by s^-1/2, half way to whitening, and all of them to 0.5 on average, well inside the decoder's tanh.
    """
    chosen = pictures[np.linspace(0, len(pictures) - 1, min(count, len(pictures))).astype(int)]
    patches = F.pixel_unshuffle(as_tensor(chosen).double(), 4)  # (n, 48, h/4, w/4), channel = colour, row, column
    patches = patches.movedim(1, -1).flatten(0, -2)  # (n h w / 16, 48)
    mean, covariance = patches.mean(0), patches.mT.cov()
    variances, vectors = torch.linalg.eigh(covariance)  # smallest first
    channels = vae.config.latent_channels
    spread, vectors = variances.flip(0)[:channels].sqrt(), vectors.flip(1)[:, :channels]  # (c,), (48, c)
    scales = spread**-0.5
    scales *= 0.5 / (scales * spread).square().mean().sqrt()
    projection = (vectors * scales).mT  # (c, 48)

    collect, halve, halve_again, project = vae.encoder.layers
    for layer in vae.encoder.layers:
        layer.weight.zero_()
    for colour in range(3):
        collect.weight[colour, colour, 1, 1] = 2  # the encoder is given (x + 1) / 2
    collect.bias.fill_(-1)
    for row, column in np.ndindex(2, 2):
        for colour in range(3):  # pixel (2i + row, 2j + column) to channel `first`
            first = (colour * 2 + row) * 2 + column
            halve.weight[first, colour, 1 + row, 1 + column] = 1
        for channel in range(12):
            halve_again.weight[(row * 2 + column) * 12 + channel, channel, 1 + row, 1 + column] = 1
    for channel in range(48):  # where halve_again has put colour, row and column of the patch
        colour, row, column = channel // 16, channel // 4 % 4, channel % 4
        inner = (colour * 2 + row % 2) * 2 + column % 2
        place = (row // 2 * 2 + column // 2) * 12 + inner
        project.weight[:, place, 1, 1] = projection[:, channel].float()
    project.bias.copy_((-projection @ mean).float())


def decoder_loss(vae: AutoencoderTiny, pixel_values: Tensor, noise: float = 0.05) -> Tensor:
    """L1 and gradient L1 of the pictures decoded from a little noisy latents: the UNet's will not be perfect."""
    with torch.no_grad():
        latents = vae.encode(pixel_values).latents.float()  # (batch, c, h/4, w/4)
    level = noise * torch.rand(len(latents), 1, 1, 1, device=latents.device)
    image = vae.decode(latents + level * torch.randn_like(latents)).sample.float()  # (batch, 3, h, w)
    return F.l1_loss(image, pixel_values) + gradient_l1(image, pixel_values)


def train_autoencoder(
    vae: AutoencoderTiny,
    pictures: np.ndarray,
    checkpoint: Path,
    budget: Budget,
    accelerator: Accelerator,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    muon_rate: float = 4e-3,
    log_every: int = 50,
) -> None:
    """Fit the encoder and train the decoder; the rates are those of `train_unet`."""
    fit_encoder(vae, pictures)
    vae.encoder.requires_grad_(False)

    def compute_loss(step: int) -> Tensor:
        torch.manual_seed(step)
        pixel_values = as_tensor(pictures[batch_indices(step, batch_size, len(pictures))])
        return decoder_loss(vae, pixel_values.to(accelerator.device, memory_format=torch.channels_last))

    vae.to(accelerator.device, memory_format=torch.channels_last)  # a quarter faster on CPUs
    parts = nn.ModuleDict({"encoder": vae.encoder, "decoder": vae.decoder})
    fit(
        parts, compute_loss, checkpoint, budget, {"decoder": learning_rate}, accelerator, muon_rate, log_every=log_every
    )  # fmt: skip
    vae.requires_grad_(True)


@torch.no_grad()
def encode_pictures(vae: AutoencoderTiny, pictures: np.ndarray, accelerator: Accelerator, batch: int = 128) -> Tensor:
    """The latents of all pictures, float16 (count, c, h/4, w/4); sets the autoencoder's scaling factor from them."""
    vae.to(accelerator.device).eval()
    chunks = []
    for start in range(0, len(pictures), batch):
        chunks.append(vae.encode(as_tensor(pictures[start : start + batch]).to(accelerator.device)).latents.cpu())
    latents = torch.cat(chunks)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return latents.half()


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids padded as the pipeline pads them, (batch, max_length)."""
    return tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids


def scene_labels(scenes: Sequence[Scene]) -> Tensor:
    """What captions may name, as numbers of kind, colour, setting and style, (batch, 4)."""
    return torch.tensor(
        [
            (KINDS.index(s.individual.kind), COLOURS.index(s.individual.colour), SETTINGS.index(s.setting),
             STYLES.index(s.style))
            for s in scenes
        ]
    )  # fmt: skip


def train_text_encoder(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scenes: Sequence[Scene],
    checkpoint: Path,
    budget: Budget,
    accelerator: Accelerator,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    log_every: int = 50,
) -> None:
    """Teach the text encoder to read: tell the scene's traits from its caption, as far as the caption tells them.

    Seconds of this save the UNet many minutes, in which it would learn what words mean from noisy pictures.
    """
    counts = [len(KINDS), len(COLOURS), len(SETTINGS), len(STYLES)]
    heads = nn.Linear(text_encoder.config.hidden_size, sum(counts))
    modules = nn.ModuleDict({"text_encoder": text_encoder, "heads": heads})

    def compute_loss(step: int) -> Tensor:
        batch = [scenes[i] for i in batch_indices(step, batch_size, len(scenes))]
        input_ids = tokenize(tokenizer, draw_captions(batch, np.random.default_rng((2, step))))
        summary = text_encoder(input_ids.to(accelerator.device)).pooler_output  # (batch, width)
        labels = scene_labels(batch).to(accelerator.device)  # (batch, 4)
        logits = heads(summary).float().split(counts, dim=1)
        return torch.stack([F.cross_entropy(each, labels[:, i]) for i, each in enumerate(logits)]).mean()

    fit(
        modules, compute_loss, checkpoint, budget, dict.fromkeys(modules, learning_rate), accelerator,
        log_every=log_every,
    )  # fmt: skip
