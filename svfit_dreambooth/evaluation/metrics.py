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
    return max(0.0, 1 - (_unit(adapted) * _unit(base)).sum(-1).mean().item())  # a cosine may round to above 1


def diversity(generated: Tensor) -> float:
    """1 - mean cosine of different pictures of one prompt, (prompts, pictures, d); 0: they all look alike.

    Ruiz et al., 2022, take LPIPS for it; here it is whatever the features see.  Raises ValueError for one picture a
    prompt, which has none to differ from.
    """
    count = generated.shape[1]
    if count < 2:
        raise ValueError("diversity needs two pictures of a prompt or more.")
    features = _unit(generated)
    cosines = (features @ features.mT).sum((1, 2)) - count  # without each picture's 1 with itself
    return 1 - (cosines / (count * (count - 1))).mean().item()


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.cpu().double(), dim=-1)  # MPS has no float64
