"""What a painting compares: one picture beside the base, a strip of strengths, or a grid over two axes."""

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms.libraries import libraries
from svfit_dreambooth.web.rooms.orders import STRIP, Cell, Order
from svfit_dreambooth.web.rooms.paintings import Made
from svfit_dreambooth.web.tabs.mistakes import numbers
from svfit_dreambooth.web.tabs.reuse import ONCE

COMPARED, STRENGTHS, GRID = "beside the base model", "strengths 0 to 1.5", "grid"
MODES = (ONCE, COMPARED, STRENGTHS, GRID)
BESIDE = [Cell(0.0), Cell(1.0)]
NOTHING = "nothing"
# axis of a grid -> values that stand there at first; an adapter's are the chosen adapters, one at a time
AXES = {
    NOTHING: "",
    "strength": "0.5, 0.75, 1, 1.25",
    "sampling steps": "10, 25, 50",
    "guidance": "3, 5, 7.5",
    "adapter": "",
}
MOST = 12  # values of an axis
LARGEST_CELL = 512  # pixels of a picture on a sheet


def cells(mode: str, axes: Sequence[tuple[str, str]], adapters: int) -> list[Cell]:
    """The cells of a comparison; `axes`: (name, values as written) each, the rows first.  Raises SVFitError in form words."""
    if mode not in MODES:
        raise SVFitError(f"there is no comparison called {mode!r}: choose one of those offered.")
    if mode in (COMPARED, STRENGTHS) and not adapters:
        raise SVFitError("there is nothing to compare without an adapter: choose one.")
    if mode != GRID:
        return {ONCE: [Cell()], COMPARED: BESIDE, STRENGTHS: [Cell(factor) for factor in STRIP]}[mode]
    used = [(name, values) for name, values in axes if name != NOTHING]
    if not used or len({name for name, _ in used}) < len(used):
        raise SVFitError("a grid needs one axis or two that differ: choose what its rows and columns are.")
    found = [Cell()]
    for name, values in used:
        changes = _changes(name, values, adapters)
        found = [replace(cell, **change) for cell, change in itertools.product(found, changes)]
    return found


def _changes(name: str, values: str, adapters: int) -> list[dict[str, Any]]:
    """What each value of an axis changes in a cell."""
    if name == "adapter":
        if not adapters:
            raise SVFitError("a grid over adapters needs some: choose them above.")
        return [{"only": i} for i in range(adapters)]
    if name in ("strength",) and not adapters:
        raise SVFitError("a grid over strengths needs an adapter: choose one.")
    key = {"strength": "factor", "sampling steps": "num_inference_steps", "guidance": "guidance_scale"}.get(name)
    wanted = numbers(name, values)
    if key is None or not 1 <= len(wanted) <= MOST:
        raise SVFitError(
            f"the values of “{name}” are {values[:40]!r}: write 1 to {MOST} numbers, such as {AXES.get(name)}."
        )
    if key == "num_inference_steps" and any(value != int(value) for value in wanted):
        raise SVFitError(f"“{name}” are {values[:40]!r}: write whole numbers.")
    return [{key: float(value) if key != "num_inference_steps" else int(value)} for value in wanted]


def label(cell: Cell, base: Cell, adapters: Sequence[tuple[Path, float]]) -> str:
    """What is different in `cell`, for under a picture."""
    different = [each.name for each in fields(Cell) if getattr(cell, each.name) != getattr(base, each.name)]
    return _said(cell, different, adapters)


def _said(cell: Cell, names: Sequence[str], adapters: Sequence[tuple[Path, float]]) -> str:
    """Those settings of `cell`, in words."""
    words = {
        "only": adapters[cell.only][0].stem if cell.only is not None and cell.only < len(adapters) else "",
        "factor": _strength(
            cell.factor, adapters if cell.only is None or "only" not in names else [adapters[cell.only]]
        ),
        "num_inference_steps": f"{cell.num_inference_steps} steps",
        "guidance_scale": f"guidance {cell.guidance_scale or 0:g}",
    }
    return " · ".join(words[name] for name in words if name in names and words[name])


def _strength(factor: float, adapters: Sequence[tuple[Path, float]]) -> str:
    """What `factor` makes of the strengths of the form."""
    strengths = {strength for _, strength in adapters}
    if factor == 0:
        return "base"
    return f"strength {strengths.pop() * factor:g}" if len(strengths) == 1 else f"strengths × {factor:g}"


def _varied(cells: Sequence[Cell]) -> list[str]:
    """The settings in which the cells differ."""
    return [each.name for each in fields(Cell) if len({getattr(cell, each.name) for cell in cells}) > 1]


def sheet(made: Sequence[Made], order: Order) -> Image.Image:
    """The pictures of a comparison as one, with what is different beside them.

    A grid's first axis gives the rows; of several pictures beside the base, each seed gives one.
    """
    libraries()
    from svfit_dreambooth.painting.sheets import CELL, contact_sheet

    cells, varied = order.cells, _varied(order.cells)
    rows, across = [list(cells)], varied
    if len(varied) > 1:
        down = next(name for name in varied if getattr(cells[0], name) == getattr(cells[1], name))
        rows = [list(row) for _, row in itertools.groupby(cells, key=lambda cell: getattr(cell, down))]
        across = [name for name in varied if name != down]
    painted = {(one.cell, one.settings["seed"]): one.path for one in made}
    seeds = sorted({seed for _, seed in painted})
    labelled = []
    for seed, row in itertools.product(seeds, rows):
        text = _said(row[0], [name for name in varied if name not in across], order.adapters) or order.prompt[:120]
        text = f"seed {seed} · {text}" if len(seeds) > 1 else text
        files = [painted[cell, seed] for cell in row if (cell, seed) in painted]
        labelled += [(text, [Image.open(file).convert("RGB") for file in files])] if files else []
    largest = max(max(picture.size) for _, row in labelled for picture in row)
    captions = [_said(cell, across, order.adapters) for cell in rows[0]]
    if list(cells) == BESIDE:
        captions[1] = ", ".join(f"{path.stem} {strength:g}" for path, strength in order.adapters)
    return contact_sheet(labelled, captions, min(max(largest, CELL), LARGEST_CELL))


def arranged(made: list[Made], cells: Sequence[Cell]) -> list[Made]:
    """Beside the base: each base picture before the adapter's of the same seed."""
    if list(cells) != BESIDE:
        return made
    base, adapted = ([one for one in made if one.cell == cell] for cell in cells)
    pairs = [one for pair in zip(base, adapted, strict=False) for one in pair]
    return pairs + base[len(adapted) :]
