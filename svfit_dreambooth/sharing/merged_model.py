"""An adapter merged into its base: a model of its own, as a diffusers folder or as one file in the original layout."""

import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from svfit_dreambooth.adapter.describe import base_metadata, licence_note
from svfit_dreambooth.adapter.file import Adapter, read_adapter
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.bases.sdxl import SDXL
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import check_output, share, size_text
from svfit_dreambooth.method.arithmetic import merged_weight
from svfit_dreambooth.method.targets import matrix_layers, svfit_layers
from svfit_dreambooth.method.word import word_pieces
from svfit_dreambooth.painting.loading import load_adapter, unload_adapter
from svfit_dreambooth.painting.registry import loaded_adapters
from svfit_dreambooth.sharing.checkpoint import check_checkpoint, read_checkpoint, write_checkpoint

SUFFIX = ".safetensors"
NOTE = "svfit.json"  # beside model_index.json: where the model comes from
TYPE_NAME = {torch.float16: "float16", torch.float32: "float32"}


@dataclass
class MergedExport:
    """A model that was written and opened again."""

    path: Path  # a folder, or a file
    bytes: int
    worst_error: float  # largest relative error of a merged weight against W + change, from rounding to the type

    def summary(self) -> str:
        """In one line."""
        return (
            f"{self.path}: {size_text(self.bytes)}, opened again and compared with base and adapter: "
            f"{self.worst_error:.2e} off in the worst weight"
        )


def merged_bytes(base: BaseModel, dtype: torch.dtype) -> int:
    """Size in bytes of the weights of `base` in `dtype`."""
    modules = [part for part in base.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    values = sum(tensor.numel() for module in modules for tensor in module.state_dict().values())
    return values * torch.finfo(dtype).bits // 8


def check_merged_output(output: Path, inputs: Sequence[str | Path | None], overwrite: bool = False) -> None:
    """Raises SVFitError where no merged model may be written to `output`, see `export_merged`; asked before the work."""
    if output.suffix == SUFFIX:
        check_output(output, SUFFIX, inputs, overwrite)
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SVFitError(f"{output} exists already: a merged model wants a new or empty folder.")


def export_merged(
    adapter_path: str | Path,
    base: BaseModel,
    output: str | Path,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float16,
    without_words: bool = False,
    allow_other_base: bool = False,
    basis_cache_dir: str | Path | None = None,
    overwrite: bool = False,
) -> MergedExport:
    """Writes `base` with the adapter at `adapter_path` merged in.

    `output`: a diffusers folder, new or empty; or, where it ends in .safetensors, one file in the layout of Stable
    Diffusion's original code, see `checkpoint` and, for `overwrite`, `files.check_output`.
    `scale`: the adapter's strength.  `dtype`: torch.float16 or torch.float32 of all weights.  The files that `base`
    came from are left alone, but its pipeline in memory is merged and cast: open it anew for other work.
    A learned word that is one token moves the token's embedding; one of several tokens, which other words share, has no
    place in a model, and is refused unless `without_words` leaves all learned words out.
    Raises SVFitError for an adapter of another base (unless `allow_other_base`), a place that cannot be written or
    holds something, weights beyond float16, and a model that does not read back right; then nothing is left behind.
    """
    if dtype not in TYPE_NAME:
        raise SVFitError(f"a merged model is saved as torch.float16 or torch.float32, not as {dtype}.")
    output, adapter, pipeline = Path(output), read_adapter(adapter_path), base.pipeline
    if loaded_adapters(pipeline):
        raise SVFitError("the pipeline carries adapters already: unload them before exporting.")
    check_merged_output(output, [adapter_path, pipeline.config.get("_name_or_path")], overwrite)
    if output.suffix == SUFFIX:
        check_checkpoint(base)
    name = load_adapter(
        pipeline, adapter, scale, "export", allow_other_base=allow_other_base, basis_cache_dir=basis_cache_dir
    )
    merged = _merged_weights(base)
    unload_adapter(pipeline, name)
    if not without_words:
        _put_words(base, adapter, scale)
    _put(base, merged)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):  # one by one: a pipeline would say that float16 does not run on a CPU
            part.to("cpu", dtype)
    _check_finite(base, dtype)
    note = {
        "base_model": adapter.base_model,
        "adapter": adapter.title or Path(adapter_path).stem,
        "payload_sha256": adapter.metadata.get("payload_sha256"),
        "scale": scale,
        "instance_prompt": adapter.instance_prompt,
        "clip_skip": adapter.clip_skip,
        "licence": licence_note(adapter),
    }
    try:
        if output.suffix == SUFFIX:
            worst = _write_file(output, base, merged, adapter, note)
        else:
            worst = _write_folder(output, base, merged, note)
    except (OSError, SafetensorError) as error:
        raise SVFitError(f"'{output}' can't be written ({error}): choose another place.") from error
    files = [output] if output.is_file() else [file for file in output.rglob("*") if file.is_file()]
    return MergedExport(output, sum(file.stat().st_size for file in files), worst)


def _write_folder(output: Path, base: BaseModel, merged: Mapping[str, Tensor], note: Mapping[str, Any]) -> float:
    """Writes the folder, whole or not at all; returns the largest relative error of a merged weight."""
    temporary = output.parent / f".svfit-{secrets.token_hex(8)}"
    try:
        temporary.mkdir(parents=True)
        base.pipeline.save_pretrained(temporary, safe_serialization=True)
        _open_in_float32_unless_told(temporary)
        (temporary / NOTE).write_text(json.dumps(note, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        worst = _compare(open_base_model(str(temporary)), merged, base)
        for file in temporary.rglob("*"):
            if file.is_file():
                share(file)
        if output.exists():
            output.rmdir()
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return worst


def _write_file(
    output: Path, base: BaseModel, merged: Mapping[str, Tensor], adapter: Adapter, note: Mapping[str, Any]
) -> float:
    """The same for one file."""
    title = adapter.title or output.stem
    metadata = base_metadata(base.architecture, base.resolution, base.family.prediction_type) | {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": base.architecture + _variety(base),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models"
        if isinstance(base.family, SDXL)
        else "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": title,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "modelspec.license": licence_note(adapter),
        "modelspec.merged_from": f"{adapter.base_model}, {title}",
        **({"modelspec.trigger_phrase": adapter.instance_prompt} if adapter.instance_prompt else {}),
        "svfit_source": json.dumps(note, ensure_ascii=False),
    }
    temporary = output.parent / f".svfit-{secrets.token_hex(8)}{SUFFIX}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(base, temporary, metadata)
        with tempfile.TemporaryDirectory() as configs:
            worst = _compare(read_checkpoint(temporary, base, Path(configs)), merged, base)
        share(temporary)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return worst


def _variety(base: BaseModel) -> str:
    """What ModelSpec adds to the name of Stable Diffusion 2."""
    if base.architecture != "stable-diffusion-v2":
        return ""
    return "-768-v" if base.family.prediction_type == "v" else "-512"


def _merged_weights(base: BaseModel) -> dict[str, Tensor]:
    """W + U diag(shift) Vh of every adapted layer, at least float32: as the weight is shaped."""
    merged = {}
    for component, model in base.family.components.items():
        for path, layer in svfit_layers(model).items():
            change = layer.exact_delta()  # (out, in)
            merged[f"{component}.{path}"] = merged_weight(layer.weight.detach().to(change.dtype), change).cpu()
    return merged


@torch.no_grad()
def _put_words(base: BaseModel, adapter: Adapter, scale: float) -> None:
    """Adds the deltas of the adapter's learned words to the rows of the token embeddings."""
    for word in adapter.learned_words:
        for component, delta in word.deltas.items():
            pieces = word_pieces(base.family.tokenizers[component], word.word)
            if len(pieces) > 1:
                raise SVFitError(
                    f"the adapter has learned the word {word.word!r}, which is {len(pieces)} tokens that other words "
                    "share, so it has no place in a model: export a LoRA, beside which it is an embedding, or add "
                    "without_words and lose that part of the likeness."
                )
            weight = base.family.components[component].get_input_embeddings().weight  # type: ignore[operator]
            weight[pieces[0]] += (scale * delta[0]).to(weight)


@torch.no_grad()
def _put(base: BaseModel, weights: Mapping[str, Tensor]) -> None:
    found = _weights(base)
    for name, weight in weights.items():
        found[name].copy_(weight)


def _weights(base: BaseModel) -> dict[str, Tensor]:
    return {
        f"{component}.{path}": layer.weight
        for component, model in base.family.components.items()
        for path, (_, _, layer) in matrix_layers(model).items()
    }


def _open_in_float32_unless_told(folder: Path) -> None:
    """Without a type named, diffusers opens its models in float32, and transformers in the type of their config.

    A folder in float16 would then be a mixture that fails in the first product: their configs say float32 instead.
    """
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        own = [key for key in ("dtype", "torch_dtype") if key in config]
        if own:
            config |= dict.fromkeys(own, "float32")
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_finite(base: BaseModel, dtype: torch.dtype) -> None:
    for component, part in base.pipeline.components.items():
        for name, tensor in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise SVFitError(
                    f"{component}.{name} does not fit into {TYPE_NAME[dtype]}: export with dtype float32.",
                    "dtype",
                )


def _compare(again: BaseModel, merged: Mapping[str, Tensor], base: BaseModel) -> float:
    """The largest relative error of a merged weight in what was read `again`; raises SVFitError where anything is not as it should.

    Weights without an adapter must be those of `base`, to the bit.
    """
    worst = 0.0
    dtype = base.family.denoiser.dtype
    found = _weights(again)
    for name, weight in merged.items():
        off = ((found[name].double() - weight.double()).norm() / weight.double().norm()).item()
        worst = max(worst, off)
        if not off <= torch.finfo(dtype).eps:
            raise SVFitError(f"the merged model came out wrong and was not kept: {name} is off by {off:.2e}.")
    for component, part in base.pipeline.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        if component == "safety_checker" and again.pipeline.safety_checker is None:  # one file has no place for it
            continue
        theirs = getattr(again.pipeline, component).state_dict()
        for name, tensor in part.state_dict().items():
            if name not in theirs or not torch.equal(theirs[name].to(tensor.dtype), tensor):
                raise SVFitError(f"the merged model came out wrong and was not kept: {component}.{name} changed.")
    return worst
