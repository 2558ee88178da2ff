"""The settings: twelve backdrops, each told by its colours and by what stands at its edges."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from toybox.canvas import RGB, Canvas, new_canvas

Rng = np.random.Generator


def _tint(rng: Rng, colour: RGB, amount: int = 9) -> RGB:
    """Return the colour, shifted a little."""
    r, g, b = (int(min(255, max(0, v + d))) for v, d in zip(colour, rng.integers(-amount, amount + 1, 3), strict=True))
    return r, g, b


def _edge(rng: Rng, depth: float = 14) -> float:
    """Return a horizontal place near the left or right border, where the toy does not hide it."""
    near = rng.uniform(2, depth)
    return near if rng.random() < 0.5 else 100 - near


def _steps(start: float, stop: float, step: float) -> list[float]:
    return list(np.arange(start, stop, step).tolist())


def _pine(c: Canvas, x: float, foot: float, height: float, green: RGB, snow: RGB | None) -> None:
    c.rect(x - 1.5, foot - 4, x + 1.5, foot + 3, (92, 62, 40))
    for step in range(3):
        low, wide = foot - step * height * 0.26, height * (0.34 - 0.08 * step)
        c.poly([(x - wide, low), (x + wide, low), (x, low - height * 0.45)], green)
        if snow:
            tip = low - height * 0.45
            c.poly([(x - wide * 0.5, low - height * 0.22), (x + wide * 0.5, low - height * 0.22), (x, tip)], snow)


def _cloud(c: Canvas, x: float, y: float, r: float, colour: RGB) -> None:
    for dx, dy, k in ((-1.2, 0.2, 0.7), (-0.4, -0.3, 0.9), (0.5, -0.1, 0.8), (1.2, 0.25, 0.6), (0, 0.3, 0.8)):
        c.ellipse(x + dx * r, y + dy * r, k * r, k * r * 0.75, colour)


def _beach(c: Canvas, rng: Rng) -> None:
    h = rng.uniform(30, 42)
    c.gradient(0, h, _tint(rng, (90, 185, 245)), (205, 238, 255))
    c.ellipse(rng.uniform(10, 90), rng.uniform(8, 16), 7, 7, (255, 244, 150))
    c.gradient(h, h + 20, _tint(rng, (16, 120, 186)), (64, 200, 206))
    c.gradient(h + 20, 100, _tint(rng, (250, 226, 164)), _tint(rng, (232, 196, 124)))
    shore = [(x, h + 20 + 1.5 * np.sin(x / 9 + h)) for x in range(0, 101, 5)]
    c.line(shore, 3, (255, 255, 255))
    x, y = _edge(rng), rng.uniform(h + 4, h + 10)
    c.line([(x, y), (x + 2, y + 36)], 2, (250, 250, 245))
    for i, colour in enumerate(((226, 50, 50), (255, 255, 255), (226, 50, 50), (255, 255, 255))):
        c.draw.pieslice([v * c.unit for v in (x - 17, y - 11, x + 17, y + 17)], 180 + 45 * i, 225 + 45 * i, colour)
    x, y = rng.uniform(8, 92), rng.uniform(88, 95)
    c.poly(
        [(x + r * np.sin(t), y - r * np.cos(t)) for t, r in zip(np.arange(10) * 0.628, (5, 2) * 5, strict=True)],
        (240, 96, 60),
    )


def _snow(c: Canvas, rng: Rng) -> None:
    h = rng.uniform(42, 54)
    c.gradient(0, h + 8, _tint(rng, (150, 184, 222)), (222, 234, 246))
    c.ellipse(rng.uniform(10, 40), h + 22, 60, 26, (228, 237, 248))
    c.ellipse(rng.uniform(60, 95), h + 24, 60, 24, (238, 244, 251))
    green = _tint(rng, (38, 92, 74))
    for x, size in (
        (rng.uniform(3, 12), 44),
        (rng.uniform(18, 26), 30),
        (rng.uniform(74, 82), 32),
        (rng.uniform(88, 97), 46),
    ):
        _pine(c, x, h + 6, size, green, (248, 251, 255))
    c.gradient(h + 14, 100, (246, 249, 254), _tint(rng, (214, 228, 246), 5))
    for x, y in rng.uniform(0, 100, (46, 2)):
        c.ellipse(x, y, 1.1, 1.1, (255, 255, 255))


def _city(c: Canvas, rng: Rng) -> None:
    h = rng.uniform(70, 78)
    c.gradient(0, h, _tint(rng, (10, 12, 44)), _tint(rng, (70, 44, 110)))
    x = rng.uniform(12, 88)
    c.ellipse(x, 12, 7, 7, (250, 246, 210))
    c.ellipse(x + 3, 10.5, 6, 6, (22, 20, 58))
    left = -rng.uniform(0, 10)
    while left < 100:
        wide, top = rng.uniform(13, 19), rng.uniform(14, 40)
        c.rect(left, top, left + wide, h, _tint(rng, (30, 32, 66), 8))
        for wx in _steps(left + 2.5, left + wide - 3, 4.6):
            for wy in _steps(top + 3, h - 3, 6):
                if rng.random() < 0.62:
                    c.rect(wx, wy, wx + 2.6, wy + 3.4, (255, 214, 96) if rng.random() < 0.85 else (255, 150, 90))
        left += wide + rng.uniform(0, 3)
    c.gradient(h, 100, (58, 56, 76), (34, 32, 50))
    c.rect(0, h, 100, h + 2, (120, 116, 140))
    for x in _steps(rng.uniform(-15, 0), 100, 22):
        c.rect(x, 90, x + 12, 92.5, (240, 214, 120))


def _table(c: Canvas, rng: Rng) -> None:
    h = rng.uniform(48, 58)
    c.gradient(0, 100, _tint(rng, (208, 224, 206)), _tint(rng, (180, 200, 186)))
    for x in _steps(rng.uniform(0, 8), 100, 8):
        c.rect(x, 0, x + 2, 100, (226, 236, 222))
    x = _edge(rng, 18)
    c.rect(x - 11, 8, x + 11, 30, (150, 104, 52))
    c.rect(x - 8, 11, x + 8, 27, (250, 240, 214))
    c.ellipse(x, 20, 4, 5, _tint(rng, (214, 90, 80), 30))
    wood, dark, slope = _tint(rng, (190, 120, 60)), (128, 74, 32), 9.0
    c.poly([(slope, h), (100 - slope, h), (105, 93), (-5, 93)], wood)
    for share in (0.12, 0.3, 0.54):
        y = h + share * (93 - h)
        c.line([(slope - share * (slope + 5), y), (100 - slope + share * (slope + 5), y)], 1.4, dark)
    for x, y in zip(rng.uniform(5, 80, 7), rng.uniform(h + 3, 91, 7), strict=True):
        c.line([(x, y), (x + 13, y)], 0.9, (216, 150, 88))
    c.rect(0, 93, 100, 101, (150, 90, 42), (84, 56, 40), width=1)
    side = rng.random() < 0.5
    x, y = (13 if side else 87) + rng.uniform(-2, 2), h + 7
    c.rect(x - 4, y - 13, x + 4, y, (120, 170, 214), radius=2)
    for dx, dy in ((-6, -23), (0, -27), (6, -22)):
        c.line([(x, y - 12), (x + dx, y + dy)], 1.2, (60, 130, 60))
        c.ellipse(x + dx, y + dy, 3.6, 3.6, _tint(rng, (250, 120, 160), 30))
    x = (90 if side else 10) + rng.uniform(-2, 2)
    c.ellipse(x, y + 6, 5.5, 5, (214, 44, 40))
    c.line([(x, y + 2), (x + 1.5, y - 2)], 1.2, (80, 56, 30))


def _underwater(c: Canvas, rng: Rng) -> None:
    c.gradient(0, 100, _tint(rng, (60, 200, 214)), _tint(rng, (6, 56, 124)))
    glow = c.image.copy()
    bright = Canvas(glow, type(c.draw)(glow), c.unit)
    for x in rng.uniform(0, 90, 4):
        bright.poly([(x, 0), (x + 9, 0), (x - 8, 90), (x - 30, 90)], (150, 236, 236))
    c.image.paste(Image.blend(c.image, glow, 0.35))
    floor = rng.uniform(84, 90)
    for x in range(-4, 108, 16):
        c.ellipse(x, 102, 14, 102 - floor + rng.uniform(-2, 2), _tint(rng, (206, 190, 134), 6))
    for x in (*rng.uniform(1, 17, 3), *rng.uniform(83, 99, 3)):
        top, bend = rng.uniform(36, 66), rng.uniform(0, 6)
        weed = [(x + 2.8 * np.sin(y / 6 + bend), y) for y in _steps(top, 98, 4)]
        c.line(weed, 4, _tint(rng, (34, 140, 70), 18))
    x = _edge(rng, 20)
    for dx, dy in ((-5, -9), (0, -13), (5, -8)):
        c.line([(x, 97), (x + dx, 97 + dy)], 3, (244, 96, 110))
    for x, y, r in zip(rng.uniform(3, 97, 11), rng.uniform(4, 80, 11), rng.uniform(1.6, 3.8, 11), strict=True):
        c.ellipse(x, y, r, r, None, (214, 248, 255), 1)


def _meadow(c: Canvas, rng: Rng) -> None:
    h = rng.uniform(36, 48)
    c.gradient(0, h + 6, _tint(rng, (104, 190, 248)), (214, 240, 255))
    _cloud(c, rng.uniform(15, 85), rng.uniform(9, 16), 8, (255, 255, 255))
    c.ellipse(rng.uniform(10, 40), h + 22, 55, 26, _tint(rng, (126, 206, 92)))
    c.gradient(h + 6, 100, _tint(rng, (106, 196, 66)), _tint(rng, (62, 152, 44)))
    x = _edge(rng, 12)
    c.rect(x - 2, h - 4, x + 2, h + 12, (120, 78, 44))
    c.ellipse(x, h - 10, 12, 13, _tint(rng, (60, 152, 62)))
    for x, y in zip(rng.uniform(0, 100, 24), rng.uniform(h + 12, 100, 24), strict=True):
        c.line([(x - 1.5, y - 4), (x, y), (x + 1.5, y - 4)], 1, (44, 124, 36))
    petals: tuple[RGB, ...] = ((255, 255, 255), (255, 92, 120), (255, 232, 70), (204, 120, 240))
    for x, y in zip(rng.uniform(0, 100, 22), rng.uniform(h + 10, 98, 22), strict=True):
        c.ellipse(x, y, 2.3, 2.3, petals[rng.integers(len(petals))])
        c.ellipse(x, y, 0.9, 0.9, (255, 190, 30))


def _desert(c: Canvas, rng: Rng) -> None:
    h = rng.uniform(40, 52)
    c.gradient(0, h + 8, _tint(rng, (250, 150, 84)), (255, 226, 160))
    c.ellipse(rng.uniform(15, 85), rng.uniform(12, 20), 9, 9, (255, 246, 206))
    x = rng.uniform(0, 100)
    c.poly([(x - 34, h + 8), (x - 22, h - 12), (x - 6, h - 12), (x + 4, h + 8)], (196, 96, 62))
    c.ellipse(rng.uniform(0, 40), h + 28, 70, 28, _tint(rng, (236, 170, 92)))
    c.ellipse(rng.uniform(70, 100), h + 38, 70, 32, _tint(rng, (222, 146, 70)))
    c.gradient(h + 26, 100, (228, 156, 78), _tint(rng, (204, 126, 54)))
    for y in _steps(h + 32, 100, 8):
        c.line([(x, y + 1.5 * np.sin(x / 8 + y)) for x in range(0, 101, 5)], 1, (188, 112, 48))
    for x, tall in ((rng.uniform(5, 12), rng.uniform(30, 42)), (rng.uniform(88, 95), rng.uniform(24, 38))):
        foot, green = h + rng.uniform(26, 34), _tint(rng, (44, 128, 66))
        c.line([(x, foot), (x, foot - tall)], 6, green)
        c.ellipse(x, foot - tall, 3, 3, green)
        for s, low in ((-1, 0.35), (1, 0.5)):
            c.line(
                [(x, foot - tall * low), (x + 7 * s, foot - tall * low), (x + 7 * s, foot - tall * (low + 0.3))],
                3.6,
                green,
            )


def _forest(c: Canvas, rng: Rng) -> None:
    h = rng.uniform(66, 76)
    c.gradient(0, h, _tint(rng, (30, 74, 46)), _tint(rng, (120, 164, 88)))
    for x in _steps(rng.uniform(-6, 4), 104, 13):
        wide = rng.uniform(1.5, 3)
        c.rect(x - wide, 0, x + wide, h + 3, _tint(rng, (74, 70, 46), 8))
    c.gradient(h, 100, _tint(rng, (84, 92, 42)), _tint(rng, (58, 56, 28)))
    for x in (*rng.uniform(0, 18, 2), *rng.uniform(82, 100, 2), rng.uniform(35, 65)):
        wide, foot = rng.uniform(3.5, 5.5), h + rng.uniform(4, 12)
        c.poly([(x - wide, 0), (x + wide, 0), (x + wide * 1.5, foot), (x - wide * 1.5, foot)], _tint(rng, (84, 54, 32)))
        c.line([(x - wide * 0.4, 0), (x - wide * 0.5, foot)], 1, (122, 84, 52))
    for x in _steps(-2, 104, 8):
        y = rng.uniform(-2, 12)
        c.ellipse(x, y, rng.uniform(8, 12), 11, _tint(rng, (24, 84, 40), 14))
    for x in (*rng.uniform(0, 20, 3), *rng.uniform(80, 100, 3)):
        for lean in (-7, -3, 3, 7):
            c.line([(x, h + 18), (x + lean, h + 6)], 1.6, (70, 148, 56))
    x = _edge(rng, 16)
    c.rect(x - 1.8, 88, x + 1.8, 95, (244, 232, 208))
    c.draw.pieslice([v * c.unit for v in (x - 6, 82, x + 6, 94)], 180, 360, (214, 48, 40))


def _space(c: Canvas, rng: Rng) -> None:
    c.gradient(0, 100, _tint(rng, (10, 6, 30), 5), _tint(rng, (34, 14, 66), 8))
    x, y = rng.uniform(20, 80, 2).tolist()
    c.ellipse(x, y, 44, 26, (40, 16, 74))
    c.ellipse(x, y, 30, 18, (56, 22, 92))
    for sx, sy, r in zip(rng.uniform(0, 100, 60), rng.uniform(0, 100, 60), rng.uniform(0.5, 1.3, 60), strict=True):
        c.ellipse(sx, sy, r, r, (255, 250, 226))
    side = 1 if rng.random() < 0.5 else -1
    x, y, r = rng.uniform(-3, 3) + 50 - 36 * side, rng.uniform(14, 24), rng.uniform(10, 13)
    c.ellipse(x, y, r, r, _tint(rng, (226, 150, 84), 22))
    c.rect(x - r * 0.9, y - 3, x + r * 0.9, y, _tint(rng, (190, 104, 66)))
    c.line([(x - r * 1.6, y + 6), (x + r * 1.6, y - 6)], 2.4, (244, 224, 170))
    x, y, r = rng.uniform(-3, 3) + 50 + 38 * side, rng.uniform(84, 92), rng.uniform(12, 16)
    c.ellipse(x, y, r, r, (196, 198, 208))
    for dx, dy, k in ((-0.4, -0.3, 0.22), (0.35, -0.5, 0.16), (0.1, 0.3, 0.2), (-0.5, 0.4, 0.14)):
        c.ellipse(x + dx * r, y + dy * r, k * r, k * r, (152, 154, 168))


def _clouds(c: Canvas, rng: Rng) -> None:
    c.gradient(0, 100, _tint(rng, (52, 134, 232)), _tint(rng, (164, 214, 252)))
    if rng.random() < 0.4:
        for i, colour in enumerate(((236, 92, 92), (250, 176, 84), (252, 236, 110), (120, 206, 120), (120, 130, 230))):
            c.ellipse(50, 74, 60 - 2.4 * i, 60 - 2.4 * i, None, colour, 2.4)
    for near_x, near_y in ((8, 14), (90, 22), (30, 8), (76, 6), (4, 48), (96, 56)):
        x, y, r = near_x + rng.uniform(-8, 8), near_y + rng.uniform(-5, 5), rng.uniform(7, 11)
        _cloud(c, x, y + 2, r, (206, 226, 246))
        _cloud(c, x, y, r, (255, 255, 255))
    for x in _steps(-4, 108, 14):
        y, r = rng.uniform(84, 94), rng.uniform(11, 15)
        _cloud(c, x, y + 3, r, (214, 230, 248))
        _cloud(c, x, y + 7, r, (255, 255, 255))


def _stage(c: Canvas, rng: Rng) -> None:
    h = rng.uniform(66, 76)
    c.gradient(0, h, _tint(rng, (40, 14, 34), 6), (70, 24, 44))
    c.gradient(h, 100, _tint(rng, (150, 92, 54)), (104, 60, 36))
    for y in _steps(h + 5, 100, 6):
        c.line([(0, y), (100, y)], 0.8, (84, 46, 28))
    lit = c.image.copy()
    beam = Canvas(lit, type(c.draw)(lit), c.unit)
    lamp, foot = rng.uniform(25, 75), rng.uniform(42, 58)
    beam.poly([(lamp - 4, 0), (lamp + 4, 0), (foot + 36, 88), (foot - 36, 88)], (255, 240, 180))
    beam.ellipse(foot, 88, 36, 9, (255, 240, 180))
    c.image.paste(Image.blend(c.image, lit, 0.55))
    red, dark = _tint(rng, (196, 20, 40)), (132, 8, 26)
    wide = rng.uniform(13, 19)
    for s in (0, 1):
        for i in range(4):
            x0, x1 = i * wide / 4, (i + 1) * wide / 4
            left, right = (x0, x1) if s == 0 else (100 - x1, 100 - x0)
            c.rect(left, 0, right, 94 - i, red)
            c.rect(left, 0, left + wide / 9, 94 - i, dark)
    for x in _steps(0, 101, 20):
        c.ellipse(x, 3, 11, 12, red, dark, 1.2)
        c.line([(x - 10, 12), (x, 16), (x + 10, 12)], 1.4, (250, 206, 84))


def _kitchen(c: Canvas, rng: Rng) -> None:
    h = rng.uniform(60, 70)
    tile, joint = _tint(rng, (214, 240, 236), 6), (120, 186, 184)
    c.rect(0, 0, 100, h, tile)
    for x in _steps(rng.uniform(-10, 0), 100, 11):
        c.line([(x, 0), (x, h)], 1.2, joint)
    for y in _steps(rng.uniform(0, 8), h, 11):
        c.line([(0, y), (100, y)], 1.2, joint)
    c.rect(0, 15, 100, 18, (170, 116, 66))
    for x in _steps(rng.uniform(3, 12), 100, 17):
        jar = _tint(rng, (226, 120, 60), 36)
        c.rect(x, 5, x + 8, 15, jar, radius=1.5)
        c.rect(x + 1, 3, x + 7, 5.5, (90, 70, 60))
    x = _edge(rng)
    c.line([(x, 18), (x, 30)], 1.6, (60, 64, 72))
    c.ellipse(x, 37, 8, 8, (112, 118, 130), (70, 74, 84), 2.5)
    c.rect(0, h, 100, 100, (245, 245, 240))
    rows = np.array([0, 0.16, 0.36, 0.64, 1.0]) * (100 - h) + h
    for j in range(4):
        top, low = 1 + 0.22 * j, 1.22 + 0.22 * j
        for i in range(-8, 9, 2):
            a, b = (i + j % 2) * 13.0, (i + j % 2 + 1) * 13.0
            c.poly([(50 + a * top, rows[j]), (50 + b * top, rows[j]), (50 + b * low, rows[j + 1]),
                    (50 + a * low, rows[j + 1])], (54, 60, 72))  # fmt: skip
    c.rect(0, h - 2, 100, h + 1, (90, 150, 150))


PAINTERS: dict[str, Callable[[Canvas, Rng], None]] = {
    "beach": _beach, "snow": _snow, "city": _city, "table": _table, "underwater": _underwater, "meadow": _meadow,
    "desert": _desert, "forest": _forest, "space": _space, "clouds": _clouds, "stage": _stage, "kitchen": _kitchen,
}  # fmt: skip
# Settings without ground on which a toy could cast its shadow.
FLOATING = frozenset({"underwater", "space", "clouds"})


def backdrop(setting: str, side: int, rng: Rng) -> Image.Image:
    """Return a picture of the setting, `side` pixels wide; the random numbers decide its details."""
    canvas = new_canvas("RGB", side)
    PAINTERS[setting](canvas, rng)
    return canvas.image
