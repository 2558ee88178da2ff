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
EXPLAINED = (
    "F: the mean square by which the base's answers change where one singular value of a layer is shifted by 1; "
    "dark parts are trained in small steps."
)
ATTENTIONS = "attn1: self-attention, attn2: attention to the prompt; q, k, v, out: their projections."


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
    figure, parts = figure_of([0.5, table_height(table), 4.4])
    terms = [ATTENTIONS] if "attn1 q" in table[1] else []
    parts[0].text(0.01, 0.6, "\n".join([EXPLAINED, *terms]), fontsize=9, va="center")
    shares = [row["share"] for row in described["blocks"].values()]
    title = f"{title}: sum of F by block and projection, relative to the answers, logarithmic"
    draw_table(parts[1], title, table, shares, norm="log", bars_title="share of all F")
    single, together = parts[2].subplots(1, 2)
    for name in list(described["layers"])[:DRAWN]:
        own = found.values[name].double().numpy() / found.power
        single.plot(np.arange(1, len(own) + 1), own, lw=0.9, label=name)
    single.set(yscale="log")
    single.set_title(f"the {min(DRAWN, len(found.values))} heaviest layers, value by value", fontsize=10, loc="left")
    single.set_xlabel("number of the singular value, largest first", fontsize=8)
    single.set_ylabel("F, relative to the answers", fontsize=8)
    single.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.17))
    every = np.sort(np.concatenate([own.double().numpy() for own in found.values.values()]))[::-1]
    together.plot(np.arange(1, len(every) + 1), every.cumsum() / every.sum(), color=AFTER, lw=1.5)
    half = described["total"]["half"]
    together.plot([1, half, half], [0.5, 0.5, 0], color=BEFORE, lw=0.8)
    together.annotate(f" half of it in {half:,} of {len(every):,}", (half, 0.25), fontsize=8, va="center")
    together.set(xscale="log", ylim=(0, 1.02))
    together.set_title("how few values carry the base", fontsize=10, loc="left")
    together.set_xlabel("so many values, heaviest first", fontsize=8)
    together.set_ylabel("carry this share of all F", fontsize=8)
    for axes in (single, together):
        axes.tick_params(labelsize=8)
    return save_figure(figure, Path(path))
