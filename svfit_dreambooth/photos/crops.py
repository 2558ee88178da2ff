"""Windows of a photo as the base model sees them: their shape, place, mirror images, and what masks them.

Everything about a photo's windows follows from the photo, its name and the seed: other photos in the folder don't
matter.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svfit_dreambooth.errors import SVFitError

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the upright photo
Size = tuple[int, int]  # width, height

LONGEST = 2  # times the shorter side: panoramas are cropped to that, bases know nothing longer


@dataclass
class Crops:
    """The windows of one photo, ordered (window, mirror image)."""

    pixel_values: Tensor  # (variants, 3, h, w), in [-1, 1]
    mask: Tensor | None  # (variants, 1, h, w), 1 where the subject is and 0 where it isn't; None: no mask
    time_ids: Tensor  # (variants, 6): the photo's height and width, the window's top and left, its height and width


@lru_cache
def training_size(size: Size, resolution: int, multiple: int) -> Size:
    """The width and height at which to train on a photo of `size`, so that little of it is cut off.

    Both are multiples of `multiple` (or the resolution itself), their product is at most that of the square of
    `resolution` pixels, so that no photo costs more memory than a square one.  Of these the one is taken for which
    (share of the photo that stays)^2 * (share of the square's pixels that are used) is largest: a head counts for
    more than sharpness.
    """
    sides = {resolution, *range(multiple, LONGEST * resolution + 1, multiple)}
    candidates = [
        (width, height)
        for width in sides
        for height in sides
        if width * height <= resolution**2 and max(width, height) <= LONGEST * min(width, height)
    ]
    ratio = size[0] / size[1]

    def merit(candidate: Size) -> tuple[float, Size]:
        own = candidate[0] / candidate[1]
        kept, used = min(own / ratio, ratio / own), candidate[0] * candidate[1] / resolution**2
        return round(kept**2 * used, 9), candidate

    return max(candidates, key=merit)


def crop_boxes(size: Size, shape: Size, center_crop: bool, count: int, seed: int) -> list[Box]:
    """The largest windows of a photo of `size` with the proportions of `shape`, to be scaled to it.

    center_crop: one, in the middle, whatever `count`.  Otherwise `count` of them along the side that is too long,
    placed uniformly at random, fixed by `seed`.
    """
    if count < 1:
        raise SVFitError(f"{count} crops a photo can't be taken: ask for 1 or more.")
    scale = min(size[0] / shape[0], size[1] / shape[1])
    width, height = (max(1, min(round(s * scale), limit)) for s, limit in zip(shape, size, strict=True))
    slack_x, slack_y = size[0] - width, size[1] - height  # at most one is above rounding
    slack = max(slack_x, slack_y)
    random = np.random.default_rng(seed % 2**64)
    offsets = [slack // 2] if center_crop else random.integers(0, slack, size=count, endpoint=True).tolist()
    corners = [(offset, slack_y // 2) if slack_x > slack_y else (slack_x // 2, offset) for offset in offsets]
    return [(left, top, left + width, top + height) for left, top in corners]


def photo_seed(seed: int, index: int | str) -> int:
    """What fixes the windows of the photo `index` in a run of that seed."""
    return zlib.crc32(f"{seed} {index}".encode(errors="surrogatepass"))


def crop_photo(
    image: Image.Image,
    shape: Size,
    mask: Image.Image | None = None,
    center_crop: bool = False,
    random_flip: bool = False,
    crops: int = 1,
    seed: int = 0,
    index: int | str = 0,
) -> Crops:
    """Up to `crops` windows of an RGB photo at `shape` (width, height), each followed by its mirror if `random_flip`.

    mask: of the photo's size and mode "L", bright where the subject is.
    index: tells photos apart, so that equal sizes don't get equal windows; give the file's name and the result
    doesn't depend on which other photos there are.
    The time ids are what SDXL is told of a window (Podell et al., 2023, arXiv 2307.01952): its place is measured in
    the photo as scaled for training.
    Raises SVFitError for a shape or a number of crops below 1.
    """
    if min(shape) < 1:
        raise SVFitError(f"The resolution {shape[0]}x{shape[1]} isn't possible: it is in pixels, such as 512x512.")
    pixel_values: list[Tensor] = []
    masks: list[Tensor] = []
    time_ids: list[Tensor] = []
    boxes = crop_boxes(image.size, shape, center_crop, crops, photo_seed(seed, index))
    for box in boxes if len(set(boxes)) > 1 else boxes[:1]:  # a photo that fits has only one window
        window = image.resize(shape, Image.Resampling.LANCZOS, box=box)
        pixel_values += _mirrored(as_pixel_values(window), random_flip)
        if mask is not None:
            values = np.array(mask.resize(shape, Image.Resampling.BOX, box=box), dtype=np.float32)
            masks += _mirrored(torch.from_numpy(values)[None] / 255, random_flip)  # (1, h, w), 0..1
        scale = shape[0] / (box[2] - box[0])
        for left in (box[0], image.width - box[2]) if random_flip else (box[0],):
            place = (round(box[1] * scale), round(left * scale))
            time_ids.append(torch.tensor([image.height, image.width, *place, shape[1], shape[0]], dtype=torch.float32))
    return Crops(torch.stack(pixel_values), torch.stack(masks) if masks else None, torch.stack(time_ids))


def as_pixel_values(image: Image.Image) -> Tensor:
    """The colours of `image`, (3, h, w), in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def _mirrored(window: Tensor, flip: bool) -> Iterator[Tensor]:
    yield window
    if flip:
        yield window.flip(-1)
