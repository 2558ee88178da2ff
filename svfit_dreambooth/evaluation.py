"""Metrics of personalisation: pure functions on features, apart from whatever network extracts them.

Features are rows of unit length: DINO's or a judge's identity embedding for what a subject looks like, CLIP's or
the judge's joint space for how a picture fits a prompt.
"""

import torch
from torch import Tensor


def subject_fidelity(generated: Tensor, real: Tensor) -> float:
    """Mean cosine over all pairs of `generated` (n, d) and `real` (m, d); DINO, CLIP-I of Ruiz et al., 2022."""
    return (_unit(generated) @ _unit(real).mT).mean().item()


def prompt_fidelity(generated: Tensor, prompts: Tensor) -> float:
    """Mean cosine of each picture with its own prompt, both (n, d); CLIP-T of Ruiz et al., 2022."""
    return (_unit(generated) * _unit(prompts)).sum(-1).mean().item()


def drift(adapted: Tensor, base: Tensor) -> float:
    """1 - mean cosine of each picture with the base's own for the same prompt and seed, both (n, d); 0 is none."""
    return 1 - (_unit(adapted) * _unit(base)).sum(-1).mean().item()


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.double(), dim=-1)
