"""The judge: a small CLIP-style model that looks at pictures and tells what they show and whether two show one toy.

It learns from renderings of the world only, never from pictures of the generator that it measures.
`python -m toybox.judge` prints its own accuracy on fresh renderings.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, RegNetConfig, RegNetModel

from toybox.world import COLOURS, KINDS, SETTINGS, STYLES, Scene, canonical_caption, render, sample_individual
from toybox.world import sample_scene as draw

WEIGHTS = Path(__file__).parent / "judge_weights"
ATTRIBUTES = {"kind": KINDS, "colour": COLOURS, "setting": SETTINGS, "style": STYLES}


class JudgeNetwork(nn.Module):
    """A convolutional picture encoder, a text encoder, and linear heads on the pooled picture features.

    `width` is that of the picture encoder's last stage, `joint` the size of the space shared with texts.
    """

    def __init__(self, vocab_size: int, max_length: int, width: int = 256, joint: int = 128, identity: int = 128):
        super().__init__()
        vision = RegNetConfig(
            embedding_size=width // 8,
            hidden_sizes=[width // 4, width // 2, width],
            depths=[1, 2, 2],
            groups_width=width // 4,
            layer_type="x",
        )
        vision.downsample_in_first_stage = False  # small pictures: keep 32 x 32 for a while
        self.vision = RegNetModel(vision)
        text = CLIPTextConfig(
            vocab_size=vocab_size,
            max_position_embeddings=max_length,
            hidden_size=joint,
            intermediate_size=4 * joint,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        self.text = CLIPTextModel(text)
        self.image_projection = nn.Linear(2 * width, joint)
        self.text_projection = nn.Linear(joint, joint)
        self.identity = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, identity))
        self.heads = nn.ModuleDict({name: nn.Linear(2 * width, len(names)) for name, names in ATTRIBUTES.items()})

    def pooled(self, pixel_values: Tensor) -> Tensor:
        """(batch, 3, 64, 64) in [-1, 1] to (batch, 2 * width): what is there on average, and what is there at all."""
        grid = self.vision(pixel_values).last_hidden_state  # (batch, width, 8, 8)
        return torch.cat([grid.mean(dim=(2, 3)), grid.amax(dim=(2, 3))], dim=1)  # (batch, 2 * width)

    def read(self, input_ids: Tensor) -> Tensor:
        """(batch, length) to (batch, joint), not normalised."""
        return self.text_projection(self.text(input_ids).pooler_output)


class Judge:
    """The trained network behind plain functions on lists of pictures and texts. Features are float32, unit length."""

    def __init__(self, network: JudgeNetwork, tokenizer: CLIPTokenizer, threshold: float, device: str = "cpu"):
        self.network = network.to(device).eval()
        self.tokenizer = tokenizer
        self.threshold = threshold  # cosine of identity features from which on two pictures show the same individual
        self.device = device

    @torch.no_grad()
    def _pooled(self, images: Sequence[Image.Image], batch: int = 128) -> Tensor:
        chunks = [images[start : start + batch] for start in range(0, len(images), batch)]
        return torch.cat([self.network.pooled(to_pixels(chunk).to(self.device)) for chunk in chunks])

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Features in the space shared with texts, (n, d)."""
        return F.normalize(self.network.image_projection(self._pooled(images)), dim=-1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Features in the space shared with pictures, (n, d)."""
        input_ids = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return F.normalize(self.network.read(input_ids.to(self.device)), dim=-1)

    @torch.no_grad()
    def identity_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Features that are near for one individual in two scenes and far for two individuals, (n, d)."""
        return F.normalize(self.network.identity(self._pooled(images)), dim=-1)

    @torch.no_grad()
    def attributes(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """The likeliest kind, colour, setting and style of each picture."""
        pooled = self._pooled(images)
        guesses = {name: head(pooled).argmax(dim=1).tolist() for name, head in self.network.heads.items()}
        return [{name: ATTRIBUTES[name][guesses[name][i]] for name in ATTRIBUTES} for i in range(len(images))]


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """PIL images of any size to (n, 3, 64, 64) in [-1, 1]."""
    small = [image.convert("RGB").resize((64, 64), Image.Resampling.BOX) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_judge(device: str = "cpu", folder: Path = WEIGHTS) -> Judge:
    """Open the shipped judge."""
    settings = json.loads((folder / "config.json").read_text())
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    network = JudgeNetwork(len(tokenizer), tokenizer.model_max_length, width=settings["width"])
    network.load_state_dict(load_file(folder / "model.safetensors"))  # half precision on disk, single in memory
    return Judge(network, tokenizer, settings["identity_threshold"], device)


def fresh_scenes(count: int, seed: int) -> list[Scene]:
    """Random scenes of any combination, held-out ones included."""
    rng = np.random.default_rng((seed, 99))
    return [draw(rng) for _ in range(count)]


def attribute_accuracy(judge: Judge, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of renderings whose kind, colour, setting and style the judge tells right; and `text`: the share for
    which the picture is nearer to its own caption than to that of the same picture of another kind, colour or setting.
    """
    images = [render(scene) for scene in scenes]
    truths = [
        {"kind": s.individual.kind, "colour": s.individual.colour, "setting": s.setting, "style": s.style}
        for s in scenes
    ]
    guesses = judge.attributes(images)
    shares = {
        name: float(np.mean([guess[name] == truth[name] for guess, truth in zip(guesses, truths, strict=True)]))
        for name in ATTRIBUTES
    }
    rng = np.random.default_rng(len(scenes))
    wrong = []
    for truth in truths:
        name = ("kind", "colour", "setting")[int(rng.integers(3))]
        others = [option for option in ATTRIBUTES[name] if option != truth[name]]
        wrong.append({**truth, name: others[int(rng.integers(len(others)))]})
    right = judge.text_features([canonical_caption(**truth) for truth in truths])  # (n, d)
    false = judge.text_features([canonical_caption(**truth) for truth in wrong])  # (n, d)
    seen = judge.image_features(images)  # (n, d)
    return {**shares, "text": ((seen * right).sum(1) > (seen * false).sum(1)).float().mean().item()}


def identity_pairs(judge: Judge, count: int, seed: int, style: str | None = "photo") -> tuple[Tensor, Tensor]:
    """Cosines (count,) of two pictures of one individual, and of two individuals of the same kind and colour."""
    rng = np.random.default_rng((seed, 98))
    images = []
    for _ in range(count):
        one = sample_individual(rng)
        other = one
        while other == one:
            other = sample_individual(rng, one.kind, one.colour)
        images += [render(draw(rng, individual, style=style)) for individual in (one, one, other)]
    features = judge.identity_features(images).view(count, 3, -1)  # (count, 3, d)
    return (features[:, 0] * features[:, 1]).sum(1), (features[:, 0] * features[:, 2]).sum(1)


def identity_accuracy(same: Tensor, different: Tensor, threshold: float) -> float:
    """Share of pairs on the right side of the threshold, both sorts counting alike."""
    return 0.5 * ((same > threshold).float().mean() + (different <= threshold).float().mean()).item()


def best_threshold(same: Tensor, different: Tensor) -> float:
    """The cosine that tells the two sorts apart best."""
    candidates = torch.cat([same, different]).sort().values
    return max(candidates.tolist(), key=lambda value: identity_accuracy(same, different, value))


def accuracy_table(judge: Judge, count: int = 1000, seed: int = 1) -> dict[str, float]:
    """All of the judge's accuracies on fresh renderings."""
    shares = attribute_accuracy(judge, fresh_scenes(count, seed))
    for style, name in (("photo", "identity (photos)"), (None, "identity (all styles)")):
        shares[name] = identity_accuracy(*identity_pairs(judge, count // 2, seed, style), judge.threshold)
    return shares


def main() -> None:
    """Print the judge's accuracy."""
    print("The judge on fresh renderings (share right):")
    for name, share in accuracy_table(load_judge()).items():
        print(f"  {name:22s} {share:6.1%}")


if __name__ == "__main__":
    main()
