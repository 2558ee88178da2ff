"""From a scene to a picture: backdrop and sticker are put together in one of three styles."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter

from toybox.backdrops import FLOATING, backdrop
from toybox.traits import sticker, sticker_paints

if TYPE_CHECKING:
    from toybox.world import Scene

# A sticker leaves room around the toy for what it wears, so it is larger than the toy by this factor.
STICKER_MARGIN = 1.2
PIXEL_ART_SIDE = 32


def place_sticker(scene: Scene, size: int) -> Image.Image:
    """Return the toy at its place in the picture: RGBA, `size` pixels wide, transparent around the toy."""
    fine = 2 * size
    toy = sticker(scene.individual, 4 * size).reduce(2)
    zoom = scene.size * STICKER_MARGIN
    cos, sin = math.cos(math.radians(scene.tilt)) / zoom, math.sin(math.radians(scene.tilt)) / zoom
    cx, cy = scene.x * fine, scene.y * fine
    row_x = (cos, sin, fine / 2 - cos * cx - sin * cy)
    row_y = (-sin, cos, fine / 2 + sin * cx - cos * cy)
    if scene.flip:
        row_x = (-row_x[0], -row_x[1], fine - row_x[2])
    moved = toy.transform((fine, fine), Image.Transform.AFFINE, (*row_x, *row_y), Image.Resampling.BILINEAR)
    return moved.reduce(2)


def _split(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return colour (0..255) and coverage (0..1) of an RGBA image as float arrays."""
    pixels = np.asarray(image, dtype=np.float32)
    return pixels[..., :3], pixels[..., 3:] / 255


@lru_cache(maxsize=8)
def _vignette(size: int) -> np.ndarray:
    ticks = np.linspace(-1, 1, size, dtype=np.float32)
    return (1 - 0.09 * (ticks[None, :] ** 2 + ticks[:, None] ** 2))[..., None]


@lru_cache(maxsize=8)
def _hatching(size: int) -> np.ndarray:
    """Return pencil strokes between -1 and 1, slightly bent so that they look drawn by hand."""
    ticks = np.arange(size, dtype=np.float32) * (64 / size)
    x, y = ticks[None, :], ticks[:, None]
    return np.sin((x + y + 1.2 * np.sin(y / 7)) * (2 * np.pi / 3.4))


def _shadow(scene: Scene, cover: np.ndarray) -> np.ndarray:
    """Return how dark the ground is below the toy: a soft ellipse at the foot of its silhouette."""
    size = len(cover)
    rows = np.flatnonzero(cover[..., 0].max(axis=1) > 0.5)
    foot = rows[-1] if len(rows) else size
    columns = np.flatnonzero(cover[..., 0].max(axis=0) > 0.5)
    centre = columns.mean() - 0.05 * size * scene.light
    half = 0.55 * len(columns)
    ticks = np.arange(size, dtype=np.float32)
    far = ((ticks[None, :] - centre) / half) ** 2 + ((ticks[:, None] - foot) / (0.16 * half + 1)) ** 2
    return 0.5 * np.exp(-(far**1.5))[..., None]


def _relief(scene: Scene, toy: Image.Image) -> np.ndarray:
    """Return brightness factors that make the flat sticker look round and lit from the side of the light."""
    size = toy.width
    coverage = toy.getchannel("A")
    height = np.zeros((size, size), np.float32)
    for radius, weight in ((0.02, 0.6), (0.06, 2.2)):
        height += weight * np.asarray(coverage.filter(ImageFilter.GaussianBlur(radius * size)), np.float32) / 255
    down, right = np.gradient(height)
    lit = (down + right * scene.light) * (size / 64)
    return np.clip(1 + 0.75 * lit, 0.55, 1.28)[..., None]


def _compose(behind: np.ndarray, colour: np.ndarray, cover: np.ndarray) -> np.ndarray:
    return behind + (colour - behind) * cover


def _photo(scene: Scene, ground: Image.Image, toy: Image.Image, rng: np.random.Generator) -> np.ndarray:
    colour, cover = _split(toy)
    behind = np.asarray(ground.filter(ImageFilter.GaussianBlur(0.5 * toy.width / 64)), dtype=np.float32)
    if scene.setting not in FLOATING:
        behind = behind * (1 - _shadow(scene, cover))
    picture = _compose(behind, colour * _relief(scene, toy), cover)
    side = np.linspace(-0.07, 0.07, toy.width, dtype=np.float32)[None, :, None] * scene.light
    warmth = 1 + np.array((0.03, 0, -0.03), np.float32) * scene.light
    picture = picture * (_vignette(toy.width) + side) * warmth
    return picture + 2.5 * rng.standard_normal(picture.shape, dtype=np.float32)


def _edges(picture: np.ndarray) -> np.ndarray:
    """Return how strongly brightness changes at every pixel, 0..1."""
    grey = picture @ np.array((0.3, 0.55, 0.15), np.float32)
    change = np.zeros_like(grey)
    change[:, 1:] += np.abs(np.diff(grey, axis=1))
    change[1:] += np.abs(np.diff(grey, axis=0))
    return np.clip(change / 90 - 0.12, 0, 1)[..., None]


def _sketch(scene: Scene, ground: Image.Image, toy: Image.Image, rng: np.random.Generator) -> np.ndarray:
    del scene
    colour, cover = _split(toy)
    behind = np.asarray(ground, dtype=np.float32)
    scenery = _compose(behind, colour, cover)
    paper = np.array((252, 248, 236), np.float32)
    # Pigment lies thinner on the scenery than on the toy; strokes show on the toy less, for the sake of its face.
    pigment = (0.6 + 0.3 * cover) * (0.88 + (0.14 - 0.06 * cover) * _hatching(toy.width)[..., None])
    picture = paper + (scenery - paper) * pigment
    lines = np.maximum(_edges(behind) * (1 - cover) * 0.7, _edges(255 * (1 - cover) * np.ones(3, np.float32)))
    picture = picture + (np.array((58, 56, 64), np.float32) - picture) * (0.8 * lines)
    return picture + 4 * rng.standard_normal((*picture.shape[:2], 1), dtype=np.float32)


def _pixel_art(scene: Scene, ground: Image.Image, toy: Image.Image, rng: np.random.Generator) -> np.ndarray:
    del rng
    small = (PIXEL_ART_SIDE, PIXEL_ART_SIDE)
    behind = ground.resize(small, Image.Resampling.BOX).quantize(12, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    colour, cover = _split(toy.resize(small, Image.Resampling.BOX))
    # Only the toy's own paints, unmixed, keep its small parts crisp on so few blocks.
    paints = np.array(sticker_paints(scene.individual), dtype=np.float32)
    nearest = np.square(colour[:, :, None] - paints).sum(axis=-1).argmin(axis=-1)
    picture = _compose(np.asarray(behind.convert("RGB"), dtype=np.float32), paints[nearest], cover > 0.45)
    scale = toy.width // PIXEL_ART_SIDE
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


PAINT_STYLES: dict[str, Callable[[Scene, Image.Image, Image.Image, np.random.Generator], np.ndarray]] = {
    "photo": _photo,
    "pencil sketch": _sketch,
    "pixel art": _pixel_art,
}


def paint(scene: Scene, size: int) -> Image.Image:
    """Return the picture of the scene; the same scene and size always give the same picture."""
    if size <= 0 or size % 64:
        raise ValueError(f"size must be a positive multiple of 64, not {size}")
    rng = np.random.default_rng(scene.seed)
    ground = backdrop(scene.setting, 4 * size, rng).reduce(4)
    picture = PAINT_STYLES[scene.style](scene, ground, place_sticker(scene, size), rng)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
