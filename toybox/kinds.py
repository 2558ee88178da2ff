"""Stickers: one toy drawn upright on a transparent square, from the shapes of its kind and its unnamed traits.

A sticker is first drawn with role numbers instead of colours, so that a pattern can be laid over exactly the
parts that carry the body colour, whatever was drawn on top of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from toybox.canvas import RGB, Canvas, Point

PAINTS: dict[str, RGB] = {
    "red": (222, 34, 38),
    "orange": (255, 137, 14),
    "yellow": (255, 221, 38),
    "green": (44, 168, 62),
    "blue": (36, 92, 226),
    "purple": (136, 52, 190),
    "pink": (255, 142, 190),
    "brown": (122, 72, 36),
    "white": (246, 246, 242),
    "black": (32, 32, 38),
    "cyan": (70, 214, 226),
}

# The three body roles come first and in the same order as their patterned twins, eleven further on.
BODY, SHADE, LIGHT, LINE, BLACK, WHITE, METAL, GLASS, WORN, WORN_DARK, GOLD = range(1, 12)
TWIN = 11


@dataclass(frozen=True)
class Anchors:
    """Where a kind carries its eyes (and their radius), what is worn on top, the scarf, and the foot of a flag."""

    eyes: tuple[Point, ...]
    eye_radius: float
    top: Point
    neck: tuple[Point, Point]
    back: Point


def _dog(c: Canvas) -> Anchors:
    c.limb([(20, 56), (11, 46), (10, 34)], 10, BODY, LINE)
    for x in (38, 58):
        c.limb([(x, 66), (x + 1, 86)], 12, SHADE, LINE)
    for x in (26, 68):
        c.limb([(x, 66), (x, 87)], 13, BODY, LINE)
    c.ellipse(46, 62, 32, 17, BODY, LINE)
    c.ellipse(68, 42, 19, 19, BODY, LINE)
    c.ellipse(83, 48, 12, 9, BODY, LINE)
    c.ellipse(92, 44, 4, 4, BLACK)
    c.line([(78, 53), (88, 54)], 2, LINE)
    c.poly([(54, 27), (45, 32), (42, 54), (49, 60), (57, 48)], SHADE, LINE)
    return Anchors(((66, 38), (79, 37)), 5.5, (68, 25), ((49, 55), (72, 62)), (30, 50))


def _cat(c: Canvas) -> Anchors:
    c.limb([(64, 86), (82, 84), (89, 72), (86, 58), (91, 50)], 10, BODY, LINE)
    c.ellipse(48, 72, 23, 20, BODY, LINE)
    for s in (-1, 1):
        c.ellipse(48 + 11 * s, 89, 10, 5, LIGHT, LINE)
        c.poly([(48 + 25 * s, 42), (48 + 25 * s, 14), (48 + 6 * s, 28)], BODY, LINE)
        c.poly([(48 + 21 * s, 34), (48 + 21 * s, 22), (48 + 13 * s, 29)], SHADE)
    c.ellipse(48, 44, 26, 20, BODY, LINE)
    for s in (-1, 1):
        c.line([(48 + 15 * s, 52), (48 + 33 * s, 48)], 1.6, LINE)
        c.line([(48 + 15 * s, 55), (48 + 33 * s, 57)], 1.6, LINE)
    c.poly([(44, 50), (52, 50), (48, 55)], BLACK)
    c.line([(42, 59), (48, 56), (54, 59)], 2, LINE)
    return Anchors(((37, 43), (59, 43)), 6, (48, 26), ((30, 64), (66, 64)), (27, 42))


def _duck(c: Canvas) -> Anchors:
    c.poly([(6, 48), (30, 58), (22, 80), (10, 68)], BODY, LINE)
    c.ellipse(46, 71, 38, 20, BODY, LINE)
    c.poly([(76, 37), (95, 42), (93, 48), (76, 52)], GOLD, LINE)
    c.ellipse(64, 42, 18, 18, BODY, LINE)
    c.rect(52, 54, 72, 64, BODY)
    c.ellipse(38, 71, 19, 11, SHADE, LINE)
    return Anchors(((69, 38),), 6.5, (63, 26), ((49, 60), (80, 59)), (30, 58))


def _fish(c: Canvas) -> Anchors:
    c.poly([(36, 42), (48, 24), (72, 38)], SHADE, LINE)
    c.poly([(44, 76), (46, 92), (64, 76)], SHADE, LINE)
    c.poly([(28, 57), (6, 34), (13, 57), (6, 82)], BODY, LINE)
    c.ellipse(57, 58, 36, 25, BODY, LINE)
    c.poly([(46, 56), (32, 64), (48, 68)], SHADE, LINE)
    c.line([(82, 69), (88, 66)], 2.4, BLACK)
    return Anchors(((76, 51),), 7.5, (60, 34), ((63, 36), (62, 80)), (36, 44))


def _butterfly(c: Canvas) -> Anchors:
    for s in (-1, 1):
        c.ellipse(50 + 18 * s, 74, 17, 16, LIGHT, LINE)
        c.poly(
            [
                (50 + 3 * s, 50),
                (50 + 14 * s, 30),
                (50 + 34 * s, 22),
                (50 + 43 * s, 30),
                (50 + 41 * s, 50),
                (50 + 30 * s, 64),
                (50 + 10 * s, 64),
            ],
            BODY,
            LINE,
        )
        c.line([(50 + 3 * s, 28), (50 + 10 * s, 14)], 2, LINE)
        c.ellipse(50 + 10 * s, 14, 2.5, 2.5, LINE)
    c.limb([(50, 46), (50, 86)], 11, SHADE, LINE)
    c.ellipse(50, 36, 13, 13, BODY, LINE)
    return Anchors(((44.5, 36), (55.5, 36)), 5, (50, 25), ((40, 50), (60, 50)), (29, 44))


def _car(c: Canvas) -> Anchors:
    c.poly([(20, 56), (30, 29), (66, 29), (82, 56)], BODY, LINE)
    c.poly([(35, 51), (38, 38), (60, 38), (67, 51)], GLASS, LINE)
    c.rect(5, 50, 95, 83, BODY, LINE, radius=9)
    for x in (5, 87):
        c.rect(x, 71, x + 7, 76, METAL, LINE, radius=2)
    c.ellipse(88, 60, 4.5, 4.5, GOLD, LINE)
    for x in (27, 73):
        c.ellipse(x, 82, 9, 9, BLACK)
        c.ellipse(x, 82, 3.5, 3.5, METAL)
    return Anchors(((43.5, 45), (56.5, 45)), 5.5, (48, 30), ((80, 54), (79, 75)), (24, 51))


def _boat(c: Canvas) -> Anchors:
    c.rect(46, 24, 50, 66, METAL, LINE, width=1)
    c.poly([(53, 27), (53, 60), (88, 60)], BODY, LINE)
    c.poly([(43, 30), (43, 60), (14, 60)], LIGHT, LINE)
    c.poly([(6, 64), (94, 64), (80, 90), (22, 90)], BODY, LINE)
    c.line([(8, 65), (92, 65)], 3, LINE)
    return Anchors(((60, 76), (76, 76)), 6, (48, 26), ((36, 63), (62, 63)), (24, 65))


def _rocket(c: Canvas) -> Anchors:
    c.poly([(40, 80), (45, 93), (50, 88), (55, 93), (60, 80)], GOLD)
    for s in (-1, 1):
        c.poly([(50 + 14 * s, 54), (50 + 36 * s, 74), (50 + 36 * s, 88), (50 + 14 * s, 80)], SHADE, LINE)
    c.poly([(50, 20), (61, 31), (69, 46), (71, 62), (66, 82), (34, 82), (29, 62), (31, 46), (39, 31)], BODY, LINE)
    c.ellipse(50, 49, 13, 10, GLASS, LINE)
    return Anchors(((44.5, 49), (55.5, 49)), 4.5, (50, 24), ((32, 68), (68, 68)), (30, 54))


def _robot(c: Canvas) -> Anchors:
    for s in (-1, 1):
        c.limb([(50 + 24 * s, 62), (50 + 37 * s, 66), (50 + 38 * s, 78)], 9, SHADE, LINE)
        c.ellipse(50 + 38 * s, 80, 6, 6, SHADE, LINE)
        c.rect(50 + 13 * s - 8, 80, 50 + 13 * s + 8, 93, SHADE, LINE, radius=2)
        c.rect(50 + 28 * s - 4, 36, 50 + 28 * s + 4, 46, METAL, LINE, radius=1)
    c.rect(43, 52, 57, 60, METAL, LINE)
    c.line([(50, 28), (50, 18)], 2.5, LINE)
    c.ellipse(50, 16, 4, 4, GOLD, LINE)
    c.rect(23, 26, 77, 54, BODY, LINE, radius=5)
    c.rect(24, 58, 76, 84, BODY, LINE, radius=4)
    c.rect(40, 47.5, 60, 50, BLACK)
    for x in (40, 50, 60):
        c.ellipse(x, 78, 2.5, 2.5, BLACK)
    return Anchors(((38, 38), (62, 38)), 7, (50, 27), ((29, 58), (71, 58)), (28, 44))


def _teapot(c: Canvas) -> Anchors:
    c.limb([(26, 50), (12, 46), (8, 58), (12, 72), (28, 78)], 9, BODY, LINE)
    c.poly([(68, 60), (80, 54), (86, 36), (96, 38), (90, 60), (72, 80)], BODY, LINE)
    c.rect(34, 84, 64, 91, SHADE, LINE, radius=2)
    c.ellipse(49, 64, 29, 24, BODY, LINE)
    c.ellipse(49, 42, 19, 7, SHADE, LINE)
    c.ellipse(49, 33, 5.5, 5, SHADE, LINE)
    c.line([(44, 75), (49, 77), (54, 75)], 2, LINE)
    return Anchors(((40, 65), (58, 65)), 6, (49, 32), ((30, 49), (68, 49)), (32, 48))


def _mug(c: Canvas) -> Anchors:
    c.limb([(66, 46), (84, 46), (90, 54), (90, 66), (82, 74), (66, 76)], 11, BODY, LINE)
    c.rect(16, 33, 70, 91, BODY, LINE, radius=8)
    c.ellipse(43, 34, 27, 8, LIGHT, LINE)
    c.ellipse(43, 35, 21, 5, BLACK)
    c.line([(37, 72), (43, 75), (49, 72)], 2, LINE)
    return Anchors(((33, 59), (53, 59)), 6.5, (43, 30), ((20, 45), (66, 45)), (27, 42))


def _lamp(c: Canvas) -> Anchors:
    c.rect(46, 58, 54, 84, METAL, LINE)
    c.poly([(26, 92), (74, 92), (64, 81), (36, 81)], BODY, LINE)
    c.line([(66, 60), (66, 72)], 1.6, LINE)
    c.ellipse(66, 73, 2.5, 2.5, GOLD, LINE, width=1)
    c.poly([(34, 24), (66, 24), (86, 63), (14, 63)], BODY, LINE)
    return Anchors(((41, 46), (59, 46)), 6.5, (50, 26), ((40, 69), (60, 69)), (28, 52))


SHAPES: dict[str, Callable[[Canvas], Anchors]] = {
    "dog": _dog,
    "cat": _cat,
    "duck": _duck,
    "fish": _fish,
    "butterfly": _butterfly,
    "car": _car,
    "boat": _boat,
    "rocket": _rocket,
    "robot": _robot,
    "teapot": _teapot,
    "mug": _mug,
    "lamp": _lamp,
}
