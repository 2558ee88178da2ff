"""What tells two toys of the same kind and colour apart: eyes, things worn, patterns; and the finished sticker."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from toybox.canvas import RGB, Canvas, new_canvas
from toybox.kinds import (
    BLACK,
    BODY,
    GLASS,
    GOLD,
    LIGHT,
    LINE,
    METAL,
    PAINTS,
    SHADE,
    SHAPES,
    TWIN,
    WHITE,
    WORN,
    WORN_DARK,
    Anchors,
)  # fmt: skip

if TYPE_CHECKING:
    from toybox.world import Individual


def _round_eyes(c: Canvas, a: Anchors) -> None:
    for x, y in a.eyes:
        c.ellipse(x, y, a.eye_radius, a.eye_radius, WHITE, BLACK, 1.5)
        c.ellipse(x + 1, y + 1, a.eye_radius * 0.5, a.eye_radius * 0.5, BLACK)


def _dot_eyes(c: Canvas, a: Anchors) -> None:
    for x, y in a.eyes:
        c.ellipse(x, y, a.eye_radius * 0.75, a.eye_radius, BLACK)
        c.ellipse(x + 1.2, y - 1.8, 1.5, 1.5, WHITE)


def _sleepy_eyes(c: Canvas, a: Anchors) -> None:
    r = a.eye_radius
    for x, y in a.eyes:
        c.ellipse(x, y, r, r, WHITE, BLACK, 1.5)
        c.rect(x - r, y - r, x + r, y, SHADE, BLACK, width=1.5)
        c.rect(x - r / 3, y, x + r / 2, y + r * 0.7, BLACK)


def _glasses(c: Canvas, a: Anchors) -> None:
    r = a.eye_radius * 1.15
    c.line([*a.eyes, (a.eyes[-1][0] + 1, a.eyes[-1][1])], 2.5, BLACK)
    for x, y in a.eyes:
        c.rect(x - r, y - r, x + r, y + r, BLACK, radius=1.5)
        c.ellipse(x, y, r * 0.62, r * 0.62, GLASS)


def _hat(c: Canvas, a: Anchors) -> None:
    x, y = a.top
    c.rect(x - 10, y - 19, x + 10, y, WORN, BLACK, width=1.5)
    c.rect(x - 10, y - 8, x + 10, y - 3, WORN_DARK)
    c.rect(x - 17, y - 3, x + 17, y + 3, WORN, BLACK, radius=2, width=1.5)


def _crown(c: Canvas, a: Anchors) -> None:
    x, y = a.top
    heights = ((-14, -15), (-7, -6), (0, -18), (7, -6), (14, -15))
    c.poly([(x - 13, y + 2), *((x + dx, y + dy) for dx, dy in heights), (x + 13, y + 2)], WORN, BLACK, 1.5)
    c.ellipse(x, y - 3, 3, 3, WORN_DARK)


def _bow(c: Canvas, a: Anchors) -> None:
    x, y = a.top
    for s in (-1, 1):
        c.poly([(x, y - 5), (x + 18 * s, y - 15), (x + 18 * s, y + 6)], WORN, BLACK, 1.5)
    c.ellipse(x, y - 5, 5, 5.5, WORN_DARK, BLACK, 1.5)


def _scarf(c: Canvas, a: Anchors) -> None:
    (x0, y0), (x1, y1) = a.neck
    c.limb([(x0 + 5, y0 + 2), (x0 + 3, y0 + 15)], 11, WORN_DARK, BLACK)
    c.limb([(x0, y0), ((x0 + x1) / 2, (y0 + y1) / 2 + 2.5), (x1, y1)], 11, WORN, BLACK)


def _flag(c: Canvas, a: Anchors) -> None:
    x, y = a.back
    c.line([(x, y), (x, y - 37)], 2.5, BLACK)
    c.poly([(x, y - 37), (x - 21, y - 33), (x - 16, y - 27), (x - 21, y - 19), (x, y - 19)], WORN, BLACK, 1.5)


def _nothing(c: Canvas, a: Anchors) -> None:
    del c, a


EYES: dict[str, Callable[[Canvas, Anchors], None]] = {
    "round": _round_eyes,
    "dot": _dot_eyes,
    "sleepy": _sleepy_eyes,
    "glasses": _glasses,
}
ACCESSORIES: dict[str, Callable[[Canvas, Anchors], None]] = {
    "none": _nothing,
    "hat": _hat,
    "crown": _crown,
    "bow": _bow,
    "scarf": _scarf,
    "flag": _flag,
}


def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    ticks = (np.arange(side, dtype=np.float32) + 0.5) * (100 / side)
    return ticks[None, :], ticks[:, None]


@lru_cache(maxsize=16)
def _texture(pattern: str, side: int) -> np.ndarray:
    """Return the mask of a pattern that looks the same wherever it lies on the body."""
    x, y = _grid(side)
    if pattern == "stripes":
        return (x + 0.35 * y) % 17 < 4.4
    if pattern == "hoops":
        return (y + 0 * x) % 16 < 4.0
    if pattern == "dots":
        row = np.floor(y / 13)
        return ((x + 7.5 * (row % 2)) % 15 - 7.5) ** 2 + (y % 13 - 6.5) ** 2 < 3.9**2
    blobs = ((26, 38, 11), (68, 33, 10), (50, 62, 8), (24, 74, 10), (76, 76, 10), (88, 52, 6), (48, 88, 6))
    spread = [((x - bx) / r) ** 2 + ((y - by) / (0.8 * r)) ** 2 < 1 for bx, by, r in blobs]
    return np.logical_or.reduce(np.broadcast_arrays(*spread))


# Shares of the body, counted from the top row downwards, that these patterns cover.
SLICES = {"dip": (0.74, 1.0), "belt": (0.45, 0.69)}
PATTERNS = ("plain", "stripes", "hoops", "dots", "patches", "dip", "belt")


def _pattern_mask(pattern: str, body: np.ndarray) -> np.ndarray:
    if pattern not in SLICES:
        return body & _texture(pattern, len(body))
    # Counting body pixels makes the slice equally large on every kind, however its mass is spread.
    filled = np.cumsum(body.sum(axis=1)) / max(1, body.sum())
    low, high = SLICES[pattern]
    return body & ((filled > low) & (filled <= high))[:, None]


def roles(individual: Individual, side: int) -> np.ndarray:
    """Return the role number of every pixel of the individual's sticker; 0 is outside the toy."""
    canvas = new_canvas("L", side)
    anchors = SHAPES[individual.kind](canvas)
    EYES[individual.eyes](canvas, anchors)
    ACCESSORIES[individual.accessory](canvas, anchors)
    picture = np.array(canvas.image)
    if individual.pattern != "plain":
        body = (picture >= BODY) & (picture <= LIGHT)
        picture[_pattern_mask(individual.pattern, body)] += TWIN
    return picture


def _blend(name: str, other: str, share: float) -> tuple[int, ...]:
    return tuple(round(a + (b - a) * share) for a, b in zip(PAINTS[name], PAINTS[other], strict=True))


@lru_cache(maxsize=1024)
def _palette(colour: str, pattern_colour: str, worn: str) -> bytes:
    """Return the RGBA palette, role by role, for these three colours."""
    fixed = {LINE: _blend(colour, "black", 0.72), BLACK: (26, 24, 30), WHITE: (255, 255, 255), METAL: (172, 178, 188),
             GLASS: (176, 226, 244), GOLD: (255, 196, 40)}  # fmt: skip
    fixed |= {WORN: PAINTS[worn], WORN_DARK: _blend(worn, "black", 0.35)}
    for name, shift in ((colour, 0), (pattern_colour, TWIN)):
        fixed |= {BODY + shift: PAINTS[name], SHADE + shift: _blend(name, "black", 0.14),
                  LIGHT + shift: _blend(name, "white", 0.14)}  # fmt: skip
    rows = [(*fixed[role], 255) if role in fixed else (0, 0, 0, 0) for role in range(TWIN + LIGHT + 1)]
    return bytes(value for row in rows for value in row)


def _own_palette(individual: Individual) -> bytes:
    own = individual.colour
    pattern_colour = own if individual.pattern == "plain" else individual.pattern_colour
    return _palette(own, pattern_colour, own if individual.accessory == "none" else individual.accessory_colour)


def sticker_paints(individual: Individual) -> list[RGB]:
    """Return the colours that may occur on the individual's sticker."""
    rows = zip(*[iter(_own_palette(individual))] * 4, strict=True)
    return [(r, g, b) for r, g, b, cover in rows if cover]


def sticker(individual: Individual, side: int) -> Image.Image:
    """Return the individual, upright and facing right, as an RGBA image of `side` pixels."""
    numbers = Image.fromarray(roles(individual, side)).convert("P")
    numbers.putpalette(_own_palette(individual), "RGBA")
    return numbers.convert("RGBA")
