"""Which layers and which singular values carry a base, in numbers and drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svfit_dreambooth.adapter.describe import block_name, natural_order
from svfit_dreambooth.adapter.plot import AFTER, BEFORE, block_table, draw_table, figure_of, save_figure, table_height
from svfit_dreambooth.training.sensitivity import Sensitivity

HEAVIEST = 10  # layers that are named
DRAWN = 5  # of them, value by value


def describe_sensitivity(found: Sensitivity) -> dict[str, Any]:
    """What carries the base, as plain data for printing or JSON.

    "total", "blocks" and "layers" (the `HEAVIEST`, heaviest first) give layers, values, share: the part of
    sum F_i that theirs make up, and half: how many of their values, those with the largest F_i, make up half of it.
    "change": of the answers, relative, where every value moves by 1 at random; "error": the relative standard error of F_i.
    """
    names = sorted(found.values, key=natural_order)
    total = float(sum(own.double().sum() for own in found.values.values()))
    blocks: dict[str, list[Tensor]] = {}
    for name in names:
        blocks.setdefault(block_name(name), []).append(found.values[name])
    layers = sorted(names, key=lambda name: -float(found.values[name].double().sum()))[:HEAVIEST]
    return {
        "total": _summary(list(found.values.values()), total),
        "blocks": {name: _summary(parts, total) for name, parts in blocks.items()},
        "layers": {name: _summary([found.values[name]], total) for name in layers},
        "change": (total / found.power) ** 0.5,
        "error": found.error,
    }


def _summary(parts: Sequence[Tensor], total: float) -> dict[str, int | float]:
    every = torch.cat(list(parts)).double().sort(descending=True).values  # (values,)
    half = int((every.cumsum(0) < every.sum() / 2).sum()) + 1
    return {"layers": len(parts), "values": len(every), "share": float(every.sum()) / total, "half": half}


def plot_sensitivity(found: Sensitivity, title: str, path: str | Path) -> Path:
    """Draws it into the PNG `path`, replaced if there is one: blocks and projections, then value by value.

    Raises SVFitError where matplotlib is not installed or `path` cannot be written.
    """
    described = describe_sensitivity(found)
    table = block_table(found.values, lambda parts: float(sum(part.double().sum() for part in parts)) / found.power)
    figure, parts = figure_of([table_height(table), 3.4])
    shares = [row["share"] for row in described["blocks"].values()]
    draw_table(parts[0], f"{title}: what carries its answers (sum of F, logarithmic)", table, shares, norm="log")
    single, together = parts[1].subplots(1, 2)
    for name in list(described["layers"])[:DRAWN]:
        own = found.values[name].double().numpy() / found.power
        single.plot(np.arange(1, len(own) + 1), own, lw=0.9, label=name if len(name) < 50 else f"...{name[-47:]}")
    single.set(yscale="log")
    single.set_title("F of the heaviest layers, relative to the answers", fontsize=8, loc="left")
    single.set_xlabel("number of the singular value, largest first", fontsize=8)
    single.legend(fontsize=6, frameon=False)
    every = np.sort(np.concatenate([own.double().numpy() for own in found.values.values()]))[::-1]
    together.plot(np.arange(1, len(every) + 1), every.cumsum() / every.sum(), color=AFTER, lw=1.5)
    together.axhline(0.5, color=BEFORE, lw=0.8)
    together.set(xscale="log")
    together.set_title("share of all F that so many values carry", fontsize=8, loc="left")
    together.set_xlabel("values, heaviest first", fontsize=8)
    for axes in (single, together):
        axes.tick_params(labelsize=8)
    return save_figure(figure, Path(path))
