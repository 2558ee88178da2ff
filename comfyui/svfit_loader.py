"""A ComfyUI node that loads SVFit adapters as they are: copy this file into ComfyUI/custom_nodes.

It needs this package in ComfyUI's Python, and takes adapters from the folders where ComfyUI looks for LoRAs.  The
file's shifts become weight patches, W + strength * U diag(shift) Vh, along the directions of the loaded model, which
are decomposed at the first use and cached on disk.  The node lists adapters alone; ComfyUI's own LoRA loader lists them
too, reports success and changes nothing, so use this one.  Stable Diffusion 1.x, 2.x and SDXL, in float32 or float16;
FLUX.2-klein, Z-Image, Qwen-Image, FLUX.1, Stable Diffusion 3, Chroma, Lumina 2 and PixArt-Sigma, in bfloat16 too, which
need no CLIP.

Written from ComfyUI's published interface (model patches, the maps from LoRA names to weights) and tested against a
stand-in of it, not in ComfyUI itself.
"""

import os

import comfy.lora
import folder_paths
import torch

from svfit_dreambooth.adapter.file import is_adapter, read_adapter
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.arithmetic import exact_delta
from svfit_dreambooth.method.basis import model_basis, same_base

# How ComfyUI's maps call the parts of a model; the text encoder of a pipeline with one is "lora_te", with two "lora_te1"
PREFIXES = {"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}
TRANSFORMER = "transformer"  # in ComfyUI's maps by diffusers' own names, as rows of a layer where that holds several


class SVFitLoader:
    """Adds an adapter to a model and its text encoder; loaders may follow each other, strengths may differ."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "loaders"
    DESCRIPTION = "Loads an SVFit adapter: trained singular values of a base model, a few hundred kilobytes."

    @classmethod
    def INPUT_TYPES(cls):
        strength = ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05})
        return {
            "required": {
                "model": ("MODEL",),
                "adapter": ([name for name in folder_paths.get_filename_list("loras") if _is_adapter(name)],),
                "strength_model": strength,
                "strength_clip": strength,
            },
            "optional": {"clip": ("CLIP",), "allow_other_base": ("BOOLEAN", {"default": False})},
        }

    def load(self, model, clip=None, adapter="", strength_model=1.0, strength_clip=1.0, allow_other_base=False):
        """Raises SVFitError for a file that is no whole adapter or learned a word, for a model that is not its base or
        holds it in 8 bits, and for an adapter of a text encoder without one."""
        content = read_adapter(folder_paths.get_full_path("loras", adapter))
        if content.learned_words:
            words = ", ".join(word.word for word in content.learned_words)
            raise SVFitError(
                f"{adapter} has learned the word {words}, which this node cannot load: export a LoRA or a merged model."
            )
        if clip is None and (content.clip_skip or any(_part(name) == "text_encoder" for name in content.shifts)):
            raise SVFitError(f"{adapter} changes how prompts are read too: connect a CLIP.")
        maps = {
            "unet": comfy.lora.model_lora_keys_unet(model.model, {}),
            "text_encoder": {} if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}),
        }
        keys = {name: _key(name, maps) for name in content.shifts}  # projection -> ComfyUI's name of its weight
        missing = sorted(name for name, key in keys.items() if key is None)
        if missing:
            raise SVFitError(f"{adapter} was trained on {content.base_model}, and this model has no {missing[0]}.")
        originals = model.get_key_patches() | ({} if clip is None else clip.patcher.get_key_patches())
        weights = {name: _weight(originals, key) for name, key in keys.items()}  # (out, in), without any patches
        coarse = next((name for name, weight in weights.items() if weight.element_size() == 1), None)
        if coarse is not None and not allow_other_base:
            raise SVFitError(
                f"this model holds its weights in {weights[coarse].dtype}, too coarse to find the directions of {adapter} "
                "again: load it in float16 (weight_dtype default), or export a LoRA in kohya's layout for it."
            )
        if same_base(content.base_fingerprint, weights) == "different" and not allow_other_base:
            raise SVFitError(
                f"{adapter} was trained on {content.base_model}, and other weights are loaded: load that checkpoint, or "
                "allow another base for a fine-tune of the same family."
            )
        patches = {"unet": {}, "text_encoder": {}}
        moved = {name: shift.nonzero().flatten() for name, shift in content.shifts.items() if shift.any()}
        for name, (U, Vh) in model_basis({name: weights[name] for name in moved}, moved).items():
            patches[_part(name)] |= _patch(keys[name], weights[name], U, content.shifts[name][moved[name]], Vh)
        model = model.clone()
        model.add_patches(patches["unet"], strength_model)
        if clip is not None:
            clip = clip.clone()
            clip.add_patches(patches["text_encoder"], strength_clip)
            if content.clip_skip:
                clip.clip_layer(-1 - content.clip_skip)  # prompts are read as in training
        return model, clip


_KINDS = {}  # (path, time, size) -> whether the file is an adapter: the list is asked for often


def _is_adapter(name):
    """LoRAs lie in the same folders, and their own loader reads an adapter without a word and changes nothing."""
    path = folder_paths.get_full_path("loras", name)
    if path is None or not os.path.isfile(path):
        return False
    about = os.stat(path)
    key = (path, about.st_mtime_ns, about.st_size)
    if key not in _KINDS:
        _KINDS[key] = is_adapter(path)
    return _KINDS[key]


def _patch(key, weight, U, shift, Vh):
    """ComfyUI's patch for the weight `key`: two thin matrices of a few values, or else the whole change."""
    if weight.ndim == 2 and len(shift) * sum(weight.shape) < weight.numel():
        thin = {"x.lora_up.weight": (U * shift.to(U)).contiguous(), "x.lora_down.weight": Vh.contiguous()}
        return comfy.lora.load_lora(thin, {"x": key})
    change = exact_delta(U, shift, Vh).view(weight.shape)
    return {key: ("diff", (change if weight.dtype == torch.float32 else change.half(),))}


def _part(name):
    return "unet" if name.startswith(("unet.", f"{TRANSFORMER}.")) else "text_encoder"


def _key(name, maps):
    component, _, path = name.partition(".")
    if component == TRANSFORMER:
        return maps["unet"].get(name)
    candidates = (f"{prefix}_{path.replace('.', '_')}" for prefix in PREFIXES[component])
    return next((maps[_part(name)][key] for key in candidates if key in maps[_part(name)]), None)


def _weight(originals, key):
    """The original weight that `key` names: a tensor, or a tensor and how to decode it; of a tuple some of its rows."""
    whole, rows = (key, None) if isinstance(key, str) else (key[0], key[1])
    original = originals[whole][0]
    if isinstance(original, tuple):
        weight, decode = original
        original = decode(weight, inplace=False)
    return original if rows is None else original.narrow(*rows)


NODE_CLASS_MAPPINGS = {"SVFitLoader": SVFitLoader}
NODE_DISPLAY_NAME_MAPPINGS = {"SVFitLoader": "Load SVFit adapter"}
