"""Train the judge: attributes, caption matching and identity at once, on renderings of the world."""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from toybox.architecture import replace_folder
from toybox.dataset import (
    as_tensor,
    batch_indices,
    draw_captions,
    load_pictures,
    load_scenes,
    render_dataset,
    rival_scenes,
)
from toybox.judge import ATTRIBUTES, Judge, JudgeNetwork, best_threshold, identity_pairs
from toybox.loop import Budget, fit
from toybox.stages import scene_labels, tokenize
from toybox.tokenizer import save_tokenizer
from toybox.world import Scene

TRAITS = ("pattern", "pattern_colour", "eyes", "accessory", "accessory_colour")  # what makes an individual
FOURS = 16  # of pictures in a batch: two individuals of one kind and colour, twice each


def disturb(pixel_values: Tensor, vae: AutoencoderTiny | None, generator: torch.Generator) -> Tensor:
    """Noise, blur, contrast and the autoencoder's own losses, so that imperfect pictures are judged fairly too."""
    batch = len(pixel_values)
    chance = torch.rand(4, batch, 1, 1, 1, generator=generator).to(pixel_values.device)
    if vae is not None:
        with torch.no_grad():
            part = pixel_values[: batch // 4]
            pixel_values = torch.cat([vae.decode(vae.encode(part).latents).sample.float(), pixel_values[batch // 4 :]])
        order = torch.arange(batch, device=pixel_values.device)
        chance[0, order < batch // 4] = 1.0  # a picture is blurred by the autoencoder or by this, not by both
    blurred = F.avg_pool2d(F.pad(pixel_values, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pixel_values = torch.where(chance[0] < 0.3, 0.5 * (pixel_values + blurred), pixel_values)
    noise = torch.randn(pixel_values.shape, generator=generator).to(pixel_values.device)
    pixel_values = pixel_values + 0.12 * (chance[1] - 0.4).clamp(min=0) * noise
    return (pixel_values * (0.85 + 0.3 * chance[2]) + 0.2 * (chance[3] - 0.5)).clamp(-1, 1)


def supervised_contrast(features: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss (Khosla et al., 2020): features (batch, d) of equal labels attract, others repel."""
    similar = F.normalize(features, dim=-1) @ F.normalize(features, dim=-1).T / temperature  # (batch, batch)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    log_share = similar - similar.masked_fill(itself, -torch.inf).logsumexp(dim=1, keepdim=True)  # (batch, batch)
    positive = (labels[:, None] == labels[None]) & ~itself  # (batch, batch)
    return -(log_share * positive).sum() / positive.sum()


def trait_numbers(scenes: Sequence[Scene], vocabulary: dict[str, list[str]]) -> Tensor:
    """The traits that captions never name, as numbers, (batch, 5)."""
    return torch.tensor([[vocabulary[t].index(getattr(scene.individual, t)) for t in TRAITS] for scene in scenes])


def train_judge_network(
    network: JudgeNetwork,
    tokenizer: CLIPTokenizer,
    pictures: np.ndarray,
    scenes: Sequence[Scene],
    checkpoint: Path,
    budget: Budget,
    accelerator: Accelerator,
    vae: AutoencoderTiny | None = None,
    learning_rate: float = 2e-3,
    fours: int = FOURS,
    log_every: int = 50,
) -> None:
    """Sum of losses: attributes, hidden traits (heads dropped afterwards), captions (CLIP) and identity."""
    vocabulary = {trait: sorted({getattr(scene.individual, trait) for scene in scenes}) for trait in TRAITS}
    sizes = [len(names) for names in vocabulary.values()]
    width = network.image_projection.in_features
    modules = nn.ModuleDict({"network": network, "traits": nn.Linear(width, sum(sizes))})
    device = accelerator.device
    if vae is not None:
        vae.to(device).eval()

    def compute_loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        groups = batch_indices(step, fours, len(scenes) // 4)
        chosen = (4 * groups[:, None] + np.arange(4)).reshape(-1)
        batch = [scenes[i] for i in chosen.tolist()]
        pooled = network.pooled(disturb(as_tensor(pictures[chosen]).to(device), vae, generator))  # (batch, width)
        labels = scene_labels(batch).to(device)  # (batch, 4)
        traits = trait_numbers(batch, vocabulary).to(device)  # (batch, 5)
        logits = [network.heads[name](pooled).float() for name in ATTRIBUTES]
        logits += modules["traits"](pooled).float().split(sizes, dim=1)
        numbers = torch.cat([labels, traits], dim=1)  # (batch, 9)
        named = torch.stack([F.cross_entropy(each, numbers[:, i]) for i, each in enumerate(logits)]).sum()
        input_ids = tokenize(tokenizer, draw_captions(batch, np.random.default_rng((3, step)))).to(device)
        input_ids = input_ids[:, : int((input_ids != tokenizer.pad_token_id).sum(1).max()) + 1]  # padding tells nothing
        images = F.normalize(network.image_projection(pooled).float(), dim=-1)  # (batch, joint)
        texts = F.normalize(network.read(input_ids).float(), dim=-1)  # (batch, joint)
        agreement = 20 * images @ texts.T  # (batch, batch)
        order = torch.arange(len(batch), device=device)
        matched = F.cross_entropy(agreement, order) + F.cross_entropy(agreement.T, order)
        individuals = torch.from_numpy(np.repeat(np.arange(2 * len(groups)), 2)).to(device)
        return named + 0.5 * matched + supervised_contrast(network.identity(pooled).float(), individuals)

    fit(
        modules, compute_loss, checkpoint, budget, dict.fromkeys(modules, learning_rate), accelerator,
        log_every=log_every,
    )  # fmt: skip


def export_judge(judge: Judge, folder: Path) -> None:
    """Write weights (half precision), settings and tokenizer; `folder` is replaced as a whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in judge.network.state_dict().items()
    }
    save_file(state, partial / "model.safetensors")
    width = judge.network.image_projection.in_features // 2
    settings = {"width": width, "identity_threshold": round(judge.threshold, 4)}
    (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_tokenizer(judge.tokenizer, partial / "tokenizer")
    replace_folder(partial, folder)


def train_judge(args: argparse.Namespace) -> None:
    """The stage `judge` of `toybox.pretrain`: render, train, fix the threshold on other data, export."""
    from toybox.pretrain import open_pipeline, precision, stage_minutes

    data = args.work_dir / "rivals"
    render_dataset(data, args.num_pictures // 8 * 4, args.seed + 7, sample=rival_scenes)
    pipeline = open_pipeline(args)
    accelerator = Accelerator(mixed_precision=precision(args))
    torch.manual_seed(args.seed)
    width = 256 if args.size == "full" else 32
    network = JudgeNetwork(len(pipeline.tokenizer), pipeline.tokenizer.model_max_length, width)
    train_judge_network(
        network,
        pipeline.tokenizer,
        load_pictures(data),
        load_scenes(data),
        args.work_dir / "judge.pt",
        Budget(stage_minutes("judge", args), args.max_steps),
        accelerator,
        vae=pipeline.vae if (args.work_dir / "autoencoder.pt").exists() else None,
        learning_rate=args.learning_rate or 2e-3,
        fours=args.batch_size // 4 if args.batch_size else FOURS,
        log_every=args.log_every,
    )
    judge = Judge(network.cpu(), pipeline.tokenizer, 0.5)
    judge.threshold = best_threshold(*identity_pairs(judge, 500 if args.size == "full" else 8, seed=args.seed + 1000))
    export_judge(judge, args.judge_dir)
