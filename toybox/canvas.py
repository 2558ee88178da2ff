"""A square canvas measured in percent of its side, so that drawings do not depend on the resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Canvas:
    """An image with its drawing handle; `unit` is the number of pixels in one percent of the side."""

    image: Image.Image
    draw: ImageDraw.ImageDraw
    unit: float

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Any, ink: Any = None, width: float = 2) -> None:
        """Fill an ellipse around (x, y); with `ink`, outline it inside its border."""
        u = self.unit
        box = ((x - rx) * u, (y - ry) * u, (x + rx) * u, (y + ry) * u)
        self.draw.ellipse(box, fill, ink, round(width * u) if ink is not None else 0)

    def rect(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        fill: Any,
        ink: Any = None,
        radius: float = 0,
        width: float = 2,
    ) -> None:
        """Fill a rectangle with optionally rounded corners; with `ink`, outline it inside its border."""
        u = self.unit
        box = (x0 * u, y0 * u, x1 * u, y1 * u)
        self.draw.rounded_rectangle(box, radius * u, fill, ink, round(width * u) if ink is not None else 0)

    def poly(self, points: Sequence[Point], fill: Any, ink: Any = None, width: float = 2) -> None:
        """Fill a polygon; with `ink`, draw a line along its border."""
        scaled = [(x * self.unit, y * self.unit) for x, y in points]
        self.draw.polygon(scaled, fill)
        if ink is not None:
            self.draw.line([*scaled, *scaled[:2]], ink, round(width * self.unit), joint="curve")

    def line(self, points: Sequence[Point], width: float, fill: Any) -> None:
        """Draw a thick line through the points."""
        scaled = [(x * self.unit, y * self.unit) for x, y in points]
        self.draw.line(scaled, fill, max(1, round(width * self.unit)), joint="curve")

    def limb(self, points: Sequence[Point], width: float, fill: Any, ink: Any) -> None:
        """Draw a thick outlined line with round ends."""
        for colour, wide in ((ink, width), (fill, width - 4)):
            self.line(points, wide, colour)
            for x, y in (points[0], points[-1]):
                self.ellipse(x, y, wide / 2, wide / 2, colour)

    def gradient(self, y0: float, y1: float, top: RGB, bottom: RGB) -> None:
        """Fill the rows from y0 to y1 with a vertical gradient."""
        first, last = round(y0 * self.unit), round(y1 * self.unit)
        column = np.linspace(top, bottom, max(1, last - first)).clip(0, 255).astype(np.uint8)[:, None]
        strip = Image.fromarray(column).resize((self.image.width, len(column)), Image.Resampling.NEAREST)
        self.image.paste(strip, (0, first))


def new_canvas(mode: str, side: int) -> Canvas:
    """Return an empty (black) square canvas of `side` pixels."""
    image = Image.new(mode, (side, side))
    return Canvas(image, ImageDraw.Draw(image), side / 100)
