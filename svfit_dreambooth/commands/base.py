"""The options that name a base model, which many commands share."""

import argparse
from pathlib import Path
from typing import Any


def add_base(parser: argparse.ArgumentParser) -> None:
    """Adds them to `parser`."""
    parser.add_argument(
        "--pretrained_model_name_or_path", metavar="BASE", help="base model; default: the one the adapter names"
    )
    parser.add_argument("--revision")
    parser.add_argument("--variant")
    parser.add_argument("--base_config", help="folder with the configs of a single-file checkpoint")
    parser.add_argument(
        "--pretrained_vae_model_name_or_path", metavar="VAE", help="another autoencoder; default: the base's own"
    )
    parser.add_argument("--basis_cache_dir", type=Path)


def base_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `open_base_model` takes of them beside the name."""
    names = ["revision", "variant", "base_config", "pretrained_vae_model_name_or_path"]
    names += ["quantize"] if "quantize" in options else []
    return {name: getattr(options, name) for name in names}


def open_base(options: argparse.Namespace, named: str, path: Path) -> Any:
    """The base that the user names, else the one that the adapter at `path` names, if it is on this disk."""
    from svfit_dreambooth.bases.opening import open_base_model
    from svfit_dreambooth.painting.generate import open_named_base

    if options.pretrained_model_name_or_path is None:
        return open_named_base(named, path, **base_options(options))
    return open_base_model(options.pretrained_model_name_or_path, **base_options(options))


def add_denoising(parser: argparse.ArgumentParser) -> None:
    """Adds how a picture comes out of noise to the options of `parser`."""
    parser.add_argument(
        "--num_inference_steps", type=int, help="denoising steps; default: what suits the base, mostly 25"
    )
    parser.add_argument("--guidance_scale", type=float, help="default: what suits the base, 7.5 for Stable Diffusion")
    parser.add_argument(
        "--guidance_rescale", type=float, metavar="PHI",
        help="0 to 1, against colours that guidance makes too strong; try 0.7 on v-prediction bases; default: what suits the base",
    )  # fmt: skip
