"""Checkpoints in one file, in the layout of the original code: which family they are of, and what they predict."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.bases.sdxl import SDXL
from svfit_dreambooth.bases.stable_diffusion import StableDiffusion
from svfit_dreambooth.errors import SVFitError

DENOISER_PREFIX = "model.diffusion_model."
SDXL_KEY = "model.diffusion_model.label_emb."  # of its UNet, which is told sizes and crops
EDM_KEYS = ("edm_mean", "edm_std", "edm_vpred.sigma_max")
TRANSFORMERS = ("double_blocks.", "joint_blocks.", "transformer_blocks.", "layers.", "blocks.")  # their first entries
REFINER_KEY = "conditioner.embedders.0.model."


def read_single_file(path: Path) -> tuple[type[Family], dict[str, Any] | None]:
    """The family of a checkpoint, and what its scheduler must be told where the file says what the model predicts.

    Checkpoints that predict v say so by an entry "v_pred" (with "ztsnr" for zero terminal SNR) or in their ModelSpec
    metadata; of the others the configs decide.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys, metadata = set(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise SVFitError(f"{path} is no whole safetensors file ({error}): download it again.") from None
    block = next((key for key in sorted(keys) if key.removeprefix(DENOISER_PREFIX).startswith(TRANSFORMERS)), None)
    if block is not None:
        raise SVFitError(
            f"{path} holds a transformer, it has an entry {block}, and of Stable Diffusion 1, 2 and XL alone single files "
            "can be opened: give that base's diffusers folder or hub id."
        )
    if not any(key.startswith(DENOISER_PREFIX) for key in keys):
        raise SVFitError(
            f"{path} is no Stable Diffusion checkpoint, it holds no model.diffusion_model: give a whole one."
        )
    if any(key.startswith(REFINER_KEY) for key in keys):
        raise SVFitError(f"{path} is the SDXL refiner, which cannot be adapted: give the base model.")
    family = SDXL if any(key.startswith(SDXL_KEY) for key in keys) else StableDiffusion
    if edm := [key for key in EDM_KEYS if key in keys]:
        raise SVFitError(f"{path} is trained by EDM, it holds {edm[0]}, and models of that kind cannot be adapted.")
    encoders = ("conditioner.embedders.0.", "conditioner.embedders.1.") if family is SDXL else ("cond_stage_model.",)
    for part, prefix in (("autoencoder", "first_stage_model."), *(("text encoder", each) for each in encoders)):
        if not any(key.startswith(prefix) for key in keys):
            kind = family.pipeline_class.__name__
            raise SVFitError(
                f"{path} is a checkpoint for {kind} without {part}, no entry begins with {prefix}: give a whole one."
            )
    named = {"v": "v_prediction", "epsilon": "epsilon"}.get(metadata.get("modelspec.prediction_type", ""))
    if "v_pred" in keys:
        named = "v_prediction"
    if named is None:
        return family, None
    return family, {"prediction_type": named} | ({"rescale_betas_zero_snr": True} if "ztsnr" in keys else {})
