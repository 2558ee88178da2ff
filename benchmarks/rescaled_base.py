"""A copy of a base whose weights are of other sizes and whose pictures are the same.

    python benchmarks/rescaled_base.py toybox FOLDER [--seed 0]

What one layer is multiplied by, the next one is divided by:

    values and output of an attention                  to_v * a, to_out / a
    queries and keys                                   to_q * b, to_k / b
    a norm without anything between it and its layers  norm / c, to_q, to_k, to_v (or proj_in) * c
    the linear half of a gated feed-forward            value * d, output / d

The factors are powers of two from 1/4 to 4, drawn for each layer, so that nothing is rounded.  A rule for steps that
follows from what the weights do, and not from how they are written, learns the same on both.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from svfit_dreambooth.bases.opening import open_base_model

LARGEST = 2  # exponent of two


def rescale(network: nn.Module, generator: torch.Generator) -> None:
    """Rescales the attention, feed-forward and norm layers that `network` has of a UNet or of CLIP, in place."""

    def factor() -> float:
        return 2.0 ** int(torch.randint(-LARGEST, LARGEST + 1, (), generator=generator))

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, Attention):
                a, b = factor(), factor()
                _scale(a, module.to_v)
                _unscale(a, module.to_out[0])
                _scale(b, module.to_q)
                _scale(1 / b, module.to_k)
            elif isinstance(module, BasicTransformerBlock):
                _between(factor(), module.norm1, module.attn1.to_q, module.attn1.to_k, module.attn1.to_v)
                if module.attn2 is not None:  # its keys and values read the prompt
                    _between(factor(), module.norm2, module.attn2.to_q)
                gated, d = module.ff.net[0].proj, factor()  # rows: what is let through, then the gate
                rows = gated.out_features // 2
                for tensor in _tensors(gated):
                    tensor[:rows] *= d
                _unscale(d, module.ff.net[2])
            elif isinstance(module, Transformer2DModel):
                _between(factor(), module.norm, module.proj_in)
            elif isinstance(module, CLIPEncoderLayer):
                own, a, b = module.self_attn, factor(), factor()
                _scale(a, own.v_proj)
                _unscale(a, own.out_proj)
                _scale(b, own.q_proj)
                _scale(1 / b, own.k_proj)
                _between(factor(), module.layer_norm1, own.q_proj, own.k_proj, own.v_proj)


def rescale_base(pipeline: Any, seed: int = 0) -> None:
    """Rescales the denoiser and the text encoder of a Stable Diffusion pipeline, in place."""
    generator = torch.Generator().manual_seed(seed)
    for network in (pipeline.unet, pipeline.text_encoder):
        rescale(network, generator)


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    return (tensor for tensor in (layer.weight, layer.bias) if tensor is not None)


def _scale(factor: float, layer: nn.Module) -> None:
    """Its answers become `factor` times as large."""
    for tensor in _tensors(layer):
        tensor *= factor


def _unscale(factor: float, layer: nn.Module) -> None:
    """It takes what has become `factor` times as large."""
    layer.weight /= factor


def _between(factor: float, norm: nn.Module, *layers: nn.Module) -> None:
    _scale(1 / factor, norm)
    for layer in layers:
        layer.weight *= factor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists: name another folder.")
    pipeline = open_base_model(options.base, content_filter=False).pipeline
    rescale_base(pipeline, options.seed)
    pipeline.save_pretrained(options.folder)
    print(options.folder)


if __name__ == "__main__":
    main()
