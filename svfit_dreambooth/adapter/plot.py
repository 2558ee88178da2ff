"""Pictures of an adapter: which parts it changes and how strongly, and what singular values are.

Drawn with matplotlib, which is only asked for here.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svfit_dreambooth.adapter.describe import block_name, describe_adapter, natural_order, strength
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import write_atomically
from svfit_dreambooth.method.decomposition import decompose, resolve_rank

ENERGY = 0.99  # what the paper's top singular values hold of a matrix
MAX_SIDE = 512  # pixels of a picture that is taken apart
Table: TypeAlias = tuple[list[str], list[str], np.ndarray]  # rows, columns, numbers (rows, columns)
BEFORE, AFTER = "#8a8a8a", "#c8452f"


def strongest_layer(adapter: Adapter) -> str:
    """The layer whose singular values moved most, sqrt(sum of shift^2)."""
    return max(adapter.shifts, key=lambda name: float(adapter.shifts[name].double().norm()))


def rebuild_picture(picture: Image.Image, energy: float = ENERGY) -> tuple[Image.Image, Image.Image, int, int]:
    """After figure 1 of the SVFit paper: `picture` from its top and from its remaining singular values.

    Each colour channel is a matrix; the top are as many values as hold `energy` of it in the channel that needs most.
    The remainder is shown around grey, enlarged to full contrast.  Returns both, the number of top values, and of all.
    """
    side = max(picture.size)
    if side > MAX_SIDE:
        picture = picture.resize([max(1, round(length * MAX_SIDE / side)) for length in picture.size])  # type: ignore[arg-type]
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float64)).permute(2, 0, 1)  # (3, h, w)
    parts = [decompose(channel) for channel in pixels]
    rank = max(resolve_rank(S, energy=energy) for _, S, _ in parts)
    top = torch.stack([(U[:, :rank] * S[:rank]) @ Vh[:rank] for U, S, Vh in parts])  # (3, h, w)
    rest = pixels - top
    rest = rest / rest.abs().max().clamp(min=1e-9) * 127.5 + 127.5
    return _image(top), _image(rest), rank, min(pixels.shape[1:])


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.clamp(0, 255).round().permute(1, 2, 0).numpy().astype(np.uint8))


def strength_table(adapter: Adapter) -> Table:
    """Blocks, projections and the root mean square of the shifts, NaN where none."""
    return block_table(adapter.shifts, strength)


def block_table(values: Mapping[str, Tensor], measure: Callable[[Sequence[Tensor]], float]) -> Table:
    """Rows (blocks), columns (projections) and what `measure` says of the values of each (rows, columns), NaN where none.

    `values`: "<component>.<layer>" -> (r,).
    """
    cells: dict[tuple[str, str], list[Tensor]] = {}
    rows = list(dict.fromkeys(block_name(name) for name in sorted(values, key=natural_order)))
    for name, own in values.items():
        cells.setdefault((block_name(name), _projection(name)), []).append(own)
    columns = sorted({column for _, column in cells}, key=_column_order)
    table = np.full((len(rows), len(columns)), np.nan)
    for (row, column), parts in cells.items():
        table[rows.index(row), columns.index(column)] = measure(parts)
    return rows, columns, table


def _projection(name: str) -> str:
    """'...attn1.to_out.0' -> 'attn1 out'; '...self_attn.q_proj' -> 'q'; other layers by their last word."""
    match = re.search(r"(attn\d)\.to_(q|k|v|out)", name)
    if match:
        return f"{match[1]} {match[2]}"
    match = re.search(r"self_attn\.(q|k|v|out)_proj", name)
    return f"self {match[1]}" if match else next(part for part in reversed(name.split(".")) if not part.isdigit())


def _column_order(column: str) -> tuple[bool, str, int]:
    attention, _, kind = column.rpartition(" ")
    order = ["q", "k", "v", "out"]
    return kind not in order, attention, order.index(kind) if kind in order else 0


def plot_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    spectrum: tuple[str, Tensor] | None = None,
    picture: Image.Image | None = None,
) -> Path:
    """Draws `adapter` into the PNG `path`, replaced if there is one.

    On top the strength of the change by block and projection.  `spectrum`, a layer's name and its singular values S
    (k,): these before and after, and the shift.  `picture`: rebuilt from its top and its remaining singular values.
    Raises SVFitError where matplotlib is not installed or `path` cannot be written.
    """
    table = strength_table(adapter)
    figure, parts = figure_of([table_height(table), *([3.2] if spectrum else []), *([3.4] if picture else [])])
    by_block = [row["strength"] for row in describe_adapter(adapter)["blocks"].values()]
    title = f"{adapter.title or Path(path).stem}: strength of the change (root mean square of the shifts)"
    draw_table(parts[0], title, table, by_block)
    if spectrum is not None:
        name, S = spectrum
        _draw_spectrum(parts[1], name, S.double().cpu().numpy(), adapter.shifts[name].double().numpy())
    if picture is not None:
        _draw_pictures(parts[-1], picture)
    return save_figure(figure, Path(path))


def figure_of(heights: list[float]) -> tuple[Any, Any]:
    """A figure, and its parts of these heights in inches, one below the other.

    Raises SVFitError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SVFitError("drawing needs matplotlib, which is not installed: pip install matplotlib.") from error
    figure = Figure(figsize=(11, sum(heights) + 0.5), dpi=110, layout="constrained")
    return figure, figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.06, squeeze=False)[:, 0]


def table_height(table: Table) -> float:
    """Inches that `draw_table` wants."""
    return 0.9 + 0.27 * len(table[0])


def draw_table(
    part: Any, title: str, table: Table, by_block: list[float], norm: str | None = None, bars_title: str = "by block"
) -> None:
    """`table` as colours, beside them a bar for each of its rows; `norm`: of the colours, None: from 0 on."""
    rows, columns, cells = table
    heat, bars = part.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    image = heat.imshow(np.ma.masked_invalid(cells), aspect="auto", cmap="YlOrRd", norm=norm, vmin=None if norm else 0)
    heat.set_yticks(range(len(rows)), rows, fontsize=8)
    heat.set_xticks(range(len(columns)), columns, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
    heat.set_title(title, fontsize=10, loc="left")
    part.colorbar(image, ax=heat, pad=0.01)
    bars.barh(range(len(rows)), by_block, color=AFTER)
    bars.set_title(bars_title, fontsize=10, loc="left")
    bars.tick_params(labelsize=8, labelleft=False)


def _draw_spectrum(part: Any, name: str, S: np.ndarray, shift: np.ndarray) -> None:
    before, change = part.subplots(1, 2)
    after = S.copy()
    after[: len(shift)] += shift
    numbers = np.arange(1, len(S) + 1)
    before.plot(numbers, S, color=BEFORE, lw=1.5, label="before")
    before.plot(numbers, after, color=AFTER, lw=0.9, label="after")
    before.set_title(f"singular values of {name}", fontsize=8, loc="left")
    before.set_xlabel("number, largest first", fontsize=8)
    before.legend(fontsize=8, frameon=False)
    change.vlines(numbers[: len(shift)], 0, shift, color=AFTER, lw=0.8)
    change.axhline(0, color=BEFORE, lw=0.8)
    moved = float(np.linalg.norm(shift) / np.linalg.norm(S))
    change.set_title(f"their shift, {moved:.2%} of the weight", fontsize=8, loc="left")
    change.set_xlabel("number", fontsize=8)
    for axes in (before, change):
        axes.tick_params(labelsize=8)
        axes.set_xlim(0, len(S) + 1)


def _draw_pictures(part: Any, picture: Image.Image) -> None:
    top, rest, rank, count = rebuild_picture(picture)
    shown = [
        (picture, "a picture"),
        (top, f"from its top {rank} of {count} singular values"),
        (rest, f"from the other {count - rank}, contrast enlarged"),
    ]
    for axes, (image, title) in zip(part.subplots(1, 3), shown, strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()


def save_figure(figure: Any, path: Path) -> Path:
    """Writes `figure` as the PNG `path`, replaced if there is one."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return write_atomically(path, content.getvalue())
