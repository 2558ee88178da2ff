"""Another autoencoder for a base: SDXL's own overflows in float16, and people bring better ones for old bases."""

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from svfit_dreambooth.bases.hub import reason_of
from svfit_dreambooth.bases.names import as_asked, is_hub_id
from svfit_dreambooth.errors import SVFitError

KINDS = ("AutoencoderKL", "AutoencoderTiny")
CONFIGS = ("config.json", "vae/config.json")  # of which a folder or repository has one


def open_autoencoder(name: str, pipeline: DiffusionPipeline, local_files_only: bool = False) -> Any:
    """The autoencoder `name` for `pipeline`, float32 on the CPU.

    A folder or hub id, of an autoencoder or of a model that has one in "vae", or a single .safetensors file, which is
    read by the config of the pipeline's own.  Raises SVFitError for anything else, for one that is not whole, and for
    one whose latents have another shape than the pipeline's.
    """
    name = as_asked(name)
    path = Path(name)
    if not path.exists() and not is_hub_id(name):
        raise SVFitError(
            f"pretrained_vae_model_name_or_path {name} is no autoencoder: there is no such folder or file, and a hub id "
            "reads owner/name."
        )
    try:
        vae, found = _file(path, pipeline) if path.is_file() else _folder(name, local_files_only or path.exists())
    except (SVFitError, MemoryError):
        raise
    except Exception as error:
        raise SVFitError(f"the autoencoder {name} cannot be opened: {reason_of(error, name)}.") from error
    for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "holds, beside its own,")):
        if keys := sorted(found.get(kind, ())):
            raise SVFitError(f"the autoencoder {name} {what} {keys[0]}: its files do not belong together.")
    lacking = next(
        (key for key, weight in vae.named_parameters() if weight.is_meta or not weight.isfinite().all()), None
    )
    if lacking is not None:
        raise SVFitError(f"the autoencoder {name} has no numbers for {lacking}: fetch it again.")
    own, theirs = _shape(pipeline.vae), _shape(vae)  # type: ignore[attr-defined]
    if own != theirs:
        raise SVFitError(
            f"the autoencoder {name} makes latents of {theirs[0]} channels, one for {theirs[1]} pixels, and the base wants "
            f"{own[0]}, one for {own[1]}: choose one of its own family."
        )
    return vae.eval()


def _folder(name: str, local_files_only: bool) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {"local_files_only": local_files_only}
    try:
        kind = AutoencoderKL.load_config(name, **options)["_class_name"]
    except (OSError, KeyError):
        options["subfolder"] = "vae"
        kind = AutoencoderKL.load_config(name, **options)["_class_name"]
    if kind not in KINDS:
        raise SVFitError(f"{name} holds a {kind}, and the autoencoder of a base is one of: {', '.join(KINDS)}.")
    network = getattr(diffusers, kind)
    return network.from_pretrained(
        name, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True, **options
    )


def _file(path: Path, pipeline: Any) -> tuple[Any, dict[str, Any]]:
    if path.suffix != ".safetensors":
        raise SVFitError(f"{path} is no .safetensors file: convert it, pickled files are never opened.")
    with tempfile.TemporaryDirectory() as folder:
        config = {key: value for key, value in pipeline.vae.config.items() if not key.startswith("_")}
        Path(folder, "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKL"}), encoding="utf-8")
        return AutoencoderKL.from_single_file(
            str(path), config=folder, local_files_only=True, torch_dtype=torch.float32
        ), {}


def _shape(vae: Any) -> tuple[int, int]:
    """Channels of its latents, and pixels of a side for each."""
    blocks = getattr(vae.config, "block_out_channels", None) or vae.config.decoder_block_out_channels
    return int(vae.config.latent_channels), 2 ** (len(blocks) - 1)
