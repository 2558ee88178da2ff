"""The stages of pre-training: autoencoder, latents, reading lessons for the text encoder, and the UNet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from toybox.architecture import build_scheduler
from toybox.dataset import as_tensor, batch_indices, draw_captions
from toybox.loop import Budget, fit
from toybox.world import COLOURS, KINDS, SETTINGS, STYLES, Scene

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
        with accelerator.autocast():
            latents = vae.encode(as_tensor(pictures[start : start + batch]).to(accelerator.device)).latents
        chunks.append(latents.float().cpu())
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
    unet: nn.Module,
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
    model_pred = unet(noisy_latents, t, encoder_hidden_states).sample.float()  # (batch, c, h, w)
    return (weights / weights.mean() * (model_pred - target).square()).mean()


def train_unet(
    pipeline: StableDiffusionPipeline,
    latents: Tensor,
    scenes: Sequence[Scene],
    checkpoint: Path,
    budget: Budget,
    accelerator: Accelerator,
    batch_size: int = 48,
    learning_rate: float = 8e-4,
    muon_rate: float = 4e-3,
    sample_every: int | None = None,
    log_every: int = 50,
) -> int:
    """Train the UNet on cached latents and captions as the text encoder reads them, which has learned that already.

    Returns the number of steps made in all.  Of the rates `learning_rate` is AdamW's, for biases, norms, first and
    last layer, and `muon_rate` Muon's, for all the others: with it the UNet learns from a third fewer pictures.  Small
    batches suit the beginning, when steps count for more than their precision.
    """
    unet, text_encoder, tokenizer = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    scheduler, scale, device = build_scheduler(), pipeline.vae.config.scaling_factor, accelerator.device
    count = scheduler.config.num_train_timesteps
    text_encoder.to(device).eval().requires_grad_(False)
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # a third faster to train than the fused attention of CPUs

    def compute_loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        chosen = batch_indices(step, batch_size, len(scenes))
        clean = latents[torch.from_numpy(chosen)].float() * scale  # (batch, c, h, w)
        captions = draw_captions([scenes[i] for i in chosen], np.random.default_rng((1, step)), CAPTION_DROPOUT)
        with torch.no_grad():
            hidden = text_encoder(tokenize(tokenizer, captions).to(device))[0]  # (batch, length, width)
        noise = torch.randn(clean.shape, generator=generator)
        t = draw_timesteps(len(chosen), count, generator)
        weights = object_weights([scenes[i] for i in chosen], clean.shape[-1])
        return diffusion_loss(
            unet, scheduler, clean.to(device), hidden, noise.to(device), t.to(device), weights.to(device)
        )

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
