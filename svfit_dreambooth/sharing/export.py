"""Adapters for other programs: as a LoRA, in kohya's or diffusers' layout.

An adapter's change of a layer, U diag(shift) Vh, is a LoRA already: up = U diag(shift), down = Vh.  What is written is
opened again, and compared with the adapter, before it gets its name.  Beside it lie the learned words, as embedding
files, and what generators show of it.
"""

import hashlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from svfit_dreambooth.adapter.file import Adapter, read_adapter
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import check_output, share, size_text
from svfit_dreambooth.method.layer import SVFitLayer
from svfit_dreambooth.method.targets import svfit_layers
from svfit_dreambooth.painting.loading import load_adapter, unload_adapter
from svfit_dreambooth.painting.matching import adapted_weights
from svfit_dreambooth.painting.registry import loaded_adapters
from svfit_dreambooth.sharing.cards import write_cards
from svfit_dreambooth.sharing.embedding import (
    Embedding,
    called_elsewhere,
    embedding_tensors,
    embeddings_beside,
    write_embedding,
)
from svfit_dreambooth.sharing.lora_file import lora_changes, pack_layer, peft_metadata
from svfit_dreambooth.sharing.lora_metadata import hashes, lora_metadata
from svfit_dreambooth.sharing.lora_names import Layout, Place, lora_places
from svfit_dreambooth.sharing.lora_plan import LoraPlan, plan_lora

FILE_NAME = {"diffusers": "pytorch_lora_weights.safetensors"}  # the name that its loader looks for in a folder
ROUNDING = {torch.float16: 2e-3, torch.float32: 1e-5}  # relative error of a layer's change that the type accounts for


@dataclass
class LoraExport:
    """A LoRA file that was written and read back."""

    path: Path
    plan: LoraPlan
    file_bytes: int
    measured_error: float  # of the file's change against the adapter's, all layers together, relative
    worst_error: float  # the largest of one layer's
    embeddings: list[Embedding] = field(default_factory=list)  # the learned words
    cards: list[str] = field(default_factory=list)  # what became of the files that generators show, in lines

    def lines(self) -> list[str]:
        """All that was written, in plain words."""
        return [self.summary(), *(embedding.line() for embedding in self.embeddings), *self.cards]

    def show(self, adapter: Adapter) -> None:
        """Writes what generators show of the LoRA, anew where `adapter` has got a picture since."""
        if self.plan.layout == "kohya":
            self.cards = write_cards(self.path, called_elsewhere(adapter, self.embeddings))

    def summary(self) -> str:
        """In one line."""
        return (
            f"{self.path}: {size_text(self.file_bytes)}, read back and compared with the adapter: "
            f"{self.measured_error:.2e} off in all, {self.worst_error:.2e} in the worst layer"
        )


def export_lora(
    adapter_path: str | Path,
    base: BaseModel,
    output: str | Path,
    layout: Layout = "kohya",
    *,
    scale: float = 1.0,
    rank: int | None = None,
    error: float | None = None,
    dtype: torch.dtype = torch.float16,
    without_words: bool = False,
    allow_other_base: bool = False,
    basis_cache_dir: str | Path | None = None,
    overwrite: bool = False,
    on_plan: Callable[[LoraPlan], None] | None = None,
) -> LoraExport:
    """Writes the adapter at `adapter_path` as a LoRA for the layers of `base`, whose pipeline carries no adapter.

    `output`: a .safetensors file, or a folder for it; see `files.check_output` for what may be replaced.  `scale`: strength, built in.
    `rank`, `error`, `dtype`: see `plan_lora`.  A learned word becomes a file of its own beside the LoRA, see `embedding`,
    unless `without_words` leaves it out.  Beside the layout "kohya" lie a picture and notes, see `cards`.  `on_plan` is told what the file will hold and weigh before the
    work starts.  The pipeline is afterwards as before.
    Raises SVFitError for an adapter of another base (unless `allow_other_base`), values that do not fit, a place that
    cannot be written, and a file that does not read back as the adapter; then nothing is left behind.
    """
    adapter = read_adapter(adapter_path)
    pipeline = base.pipeline
    if loaded_adapters(pipeline):
        raise SVFitError("the pipeline carries adapters already: unload them before exporting.")
    path = check_output(lora_path(output, adapter_path, layout), ".safetensors", [adapter_path], overwrite)
    stem = Path(adapter_path).stem if path.name in FILE_NAME.values() else path.stem
    embeddings = [] if without_words else embeddings_beside(path, stem, adapter)
    for embedding in embeddings:
        check_output(embedding.path, ".safetensors", [adapter_path, path], overwrite)
    words = [(embedding, embedding_tensors(embedding, base, scale)) for embedding in embeddings]
    shifts = {name: scale * shift for name, shift in adapter.shifts.items()}
    shapes = layer_shapes(base, adapter)
    places = lora_places(shifts, layout, base.family)
    rows = {name: place.rows for name, place in places.items() if place.rows is not None}
    plan = plan_lora(shifts, shapes, layout, rank=rank, error=error, dtype=dtype, rows=rows)
    if on_plan is not None:
        on_plan(plan)
    name = load_adapter(
        pipeline, adapter, scale, "export", allow_other_base=allow_other_base, basis_cache_dir=basis_cache_dir
    )
    try:
        export = _write(path, plan, places, base, called_elsewhere(adapter, embeddings), scale, words)
    finally:
        unload_adapter(pipeline, name)
    export.show(adapter)
    return export


def layer_shapes(base: BaseModel, adapter: Adapter) -> dict[str, tuple[int, int]]:
    """Shape (out, in) of every weight of `base` that `adapter` changes, by the adapter's names.

    A convolution counts as the matrix (out, in * h * w).
    """
    weights = adapted_weights(base.pipeline, adapter, adapter.title)
    return {name: (weights[name].shape[0], weights[name].shape[1]) for name in adapter.shifts}


def lora_path(output: str | Path, adapter_path: str | Path, layout: Layout) -> Path:
    """The file that `output` means: itself, or in the folder `output` under the name that its readers look for."""
    output = Path(output)
    if output.is_dir() or output.suffix != ".safetensors":
        output = output / FILE_NAME.get(layout, f"{Path(adapter_path).stem}.safetensors")
    return output


def _adapted_layers(base: BaseModel) -> dict[str, SVFitLayer]:
    """Those of the adapter that `base` carries, by its names."""
    return {
        f"{component}.{name}": layer
        for component, model in base.family.components.items()
        for name, layer in svfit_layers(model).items()
    }


def _write(
    path: Path,
    plan: LoraPlan,
    places: Mapping[str, Place],
    base: BaseModel,
    adapter: Adapter,
    scale: float,
    words: Sequence[tuple[Embedding, dict[str, Tensor]]],
) -> LoraExport:
    layers = _adapted_layers(base)
    together: dict[str, list[str]] = {}  # layer of the file -> ours in it
    for name in plan.kept:
        together.setdefault(places[name].stem, []).append(name)
    alpha = float(max(sum(plan.ranks[name] for name in names) for names in together.values()))
    tensors: dict[str, Tensor] = {}
    for stem, names in together.items():
        parts = [_part(layers[name], plan.kept[name], places[name]) for name in names]
        U, shift, Vh = (torch.cat(side, dim) for side, dim in zip(zip(*parts, strict=True), (1, 0, 0), strict=True))
        weight = layers[names[0]].weight
        kernel = tuple(weight.shape[1:]) if weight.ndim == 4 else ()
        tensors |= pack_layer(stem, U, shift, Vh, plan.layout, alpha, plan.dtype, kernel)
    metadata = lora_metadata(
        adapter,
        title=adapter.title or path.stem,
        scale=scale,
        ranks=plan.ranks,
        alpha=alpha,
        error=plan.total_error,
        base=base,
    )
    metadata |= hashes(_payload_sha256(tensors))
    if plan.layout == "diffusers":
        metadata["lora_adapter_metadata"] = peft_metadata(plan.ranks)
    temporary = path.parent / f".svfit-{secrets.token_hex(8)}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=metadata)
        del tensors
        total, worst = _compare(temporary, plan, layers, places)
        share(temporary)
        for embedding, rows in words:
            write_embedding(embedding, rows, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise SVFitError(f"'{path}' can't be written ({error}): choose another place.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return LoraExport(path, plan, path.stat().st_size, total, worst, [embedding for embedding, _ in words])


def _part(layer: SVFitLayer, kept: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """U (rows, rank), shift (rank,), Vh (rank, in) of a layer's part of the file's one, whose other rows are zero."""
    kept = kept.to(layer.shift.device)
    U, Vh = layer.factors()
    U, shift, Vh = U[:, kept], layer.shift.detach()[kept], Vh[kept]
    if place.rows is not None:
        U = torch.nn.functional.pad(U, (0, 0, place.first, place.rows - place.first - len(U)))
    return U, shift, Vh


def _payload_sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the bytes that safetensors writes after the header: larger types first, then by name."""
    digest = hashlib.sha256()
    for key in sorted(tensors, key=lambda key: (-tensors[key].element_size(), key)):
        digest.update(tensors[key].numpy().tobytes())
    return digest.hexdigest()


def _compare(
    path: Path, plan: LoraPlan, layers: dict[str, SVFitLayer], places: Mapping[str, Place]
) -> tuple[float, float]:
    """Relative error of the file's changes against the adapter's: of all layers together, and the worst layer's.

    Raises SVFitError where it is more than was left out and what rounding accounts for.
    """
    squares = total = worst = 0.0
    for name, change in lora_changes(path, plan.shapes, plan.layout, places):
        layer = layers[name]
        exact = layer.exact_delta().cpu()  # (out, in)
        norm, off = exact.double().norm().item(), (change - exact).double().norm().item()
        allowed = plan.errors[name] + ROUNDING[plan.dtype]
        if not off <= allowed * norm:
            raise SVFitError(
                f"the LoRA came out wrong and was not kept: the change of {name} is off by {off / norm:.2e} where "
                f"{allowed:.2e} was planned; dtype float32 may help.",
                "dtype",
            )
        squares, total, worst = squares + off**2, total + norm**2, max(worst, off / norm)
    return (squares / total) ** 0.5, worst
