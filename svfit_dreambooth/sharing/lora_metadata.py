"""What a LoRA says about itself to other programs: ModelSpec fields, kohya's `ss_*`, hashes.

`ss_*` are the fields of sd-scripts that generators show or tell the base by; only those are written that we know.
"""

import json
import time

from svfit_dreambooth.adapter.describe import base_metadata, licence_note
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.model import BaseModel

KOHYA_VERSIONS = {  # beginning of modelspec's architecture -> ss_base_model_version
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2": "sd_v2",
    "stable-diffusion-xl": "sdxl_base_v1-0",
}


def lora_metadata(
    adapter: Adapter,
    *,
    title: str,
    scale: float,
    ranks: dict[str, int],
    alpha: float,
    error: float,
    base: BaseModel,
) -> dict[str, str]:
    """The header of a LoRA made from `adapter` at the strength `scale`, without hashes; all values are text.

    `ranks`: layer -> rank.  `error`: share of the adapter's change that is left out.
    """
    architecture, prediction = adapter.architecture, base.family.prediction_type
    if architecture == "stable-diffusion-v2":
        architecture += "-768-v" if prediction == "v" else "-512"
    metadata = {key: value for key, value in adapter.metadata.items() if key.startswith("modelspec.")}
    metadata |= base_metadata(base.architecture, base.resolution, base.family.prediction_type) | {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "modelspec.license": licence_note(adapter),
        "ss_output_name": title,
        "ss_sd_model_name": adapter.base_model,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks.values())),
        "ss_network_alpha": f"{alpha:g}",
        "svfit_source": json.dumps(
            {
                "base_model": adapter.base_model,
                "payload_sha256": adapter.metadata.get("payload_sha256"),
                "scale": scale,
                "left_out": round(error, 6),
            }
        ),
    }
    metadata.pop("modelspec.hash_sha256", None)  # of the adapter, not of this file
    version = next((word for start, word in KOHYA_VERSIONS.items() if architecture.startswith(start)), None)
    if version is not None:
        v = version == "sd_v2" and prediction == "v"
        metadata |= {"ss_base_model_version": version + ("_v" if v else ""), "ss_v2": str(version == "sd_v2")}
    training = adapter.training
    for key, ours in (
        ("ss_steps", "steps"),
        ("ss_num_train_images", "photos"),
        ("ss_learning_rate", "learning_rate"),
        ("ss_seed", "seed"),
        ("ss_text_encoder_lr", "text_encoder_lr"),
        ("ss_lr_scheduler", "lr_scheduler"),
        ("ss_mixed_precision", "mixed_precision"),
        ("ss_total_batch_size", "batch_size"),
        ("ss_vae_name", "vae"),
    ):
        if training.get(ours) is not None:
            metadata[key] = str(training[ours])
    if adapter.clip_skip:
        metadata["ss_clip_skip"] = str(adapter.clip_skip + 1)  # sd-scripts count from 1
    if training.get("resolution") is not None:
        metadata["ss_resolution"] = f"({training['resolution']}, {training['resolution']})"
    if adapter.instance_prompt:
        count = training.get("photos", 1)
        metadata |= {
            "modelspec.trigger_phrase": adapter.instance_prompt,
            "ss_dataset_dirs": json.dumps({"photos": {"n_repeats": 1, "img_count": count}}),
            "ss_tag_frequency": json.dumps({"photos": {adapter.instance_prompt: count}}, ensure_ascii=False),
        }
        metadata.setdefault("modelspec.usage_hint", f"Write {adapter.instance_prompt!r} for the subject.")
    return metadata


def hashes(payload_sha256: str) -> dict[str, str]:
    """The fields that name the hash of a file's tensor bytes, given in hexadecimal."""
    return {"modelspec.hash_sha256": "0x" + payload_sha256, "sshs_model_hash": payload_sha256}
