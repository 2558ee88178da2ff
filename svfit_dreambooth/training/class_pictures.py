"""Prior preservation: pictures of the subject's class, so that not every dog turns into the subject.

They come from a folder, and as far as that holds too few, from the base model itself (Ruiz et al., "DreamBooth", 2022,
arXiv 2208.12242, section 3.3).  What was painted stays in the folder with a note of what made it, and is used again.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.names import spoken
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import write_atomically
from svfit_dreambooth.method.basis import weight_hash
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.painting.picture import save_picture
from svfit_dreambooth.photos.reading import Photo, find_photos, open_photo

logger = logging.getLogger(__name__)

NOTE = "class_pictures.json"
FLAT = 8  # of 255: a picture whose channels all stay within so little shows nothing
PATIENCE = 10  # unusable pictures in a row after which painting more makes no sense


def usable_class_pictures(folder: Path) -> list[Photo]:
    """The pictures of `folder`, sorted by name, without those that show nothing: blacked out or failed.

    A folder that does not exist or holds none gives an empty list.
    """
    if not folder.exists():
        return []
    usable = []
    for photo in find_photos(folder, may_be_empty=True):
        if is_flat(open_photo(photo.path)):
            logger.warning("the class picture %s shows nothing (black or one colour) and is not used.", photo.path.name)
        else:
            usable.append(photo)
    return usable


def is_flat(image: Image.Image) -> bool:
    """Whether an RGB picture is of one colour: blacked out by a content filter, or made of NaN."""
    return all(high - low <= FLAT for low, high in image.getextrema())  # type: ignore[misc, union-attr]


def check_class_pictures(folder: Path, class_prompt: str, base: BaseModel) -> None:
    """Raises SVFitError if `folder` holds pictures that were painted from another prompt or by another base."""
    note = _read_note(folder)
    if not note:
        return
    other = ""
    if note["class_prompt"] != class_prompt:
        other = f"of {note['class_prompt']!r}"
    elif note["base_sha256"] != _hash(base):  # a base by another name may be the same, moved
        other = f"by another base, {spoken(note['base_model'])}"
    if other:
        raise SVFitError(f"class_data_dir {folder} holds pictures painted {other}: name another folder for this run.")


def paint_class_pictures(
    folder: Path,
    base: BaseModel,
    class_prompt: str,
    count: int,
    *,
    seed: int,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> list[Photo]:
    """The first `count` usable pictures of `folder`, painted there by `base` as far as they are missing.

    Pictures take the seeds `seed`, `seed + 1`, ...; one that the base's content filter blacked out, or that came out
    in one colour, is not kept and the next seed takes its place.  A picture that somebody deleted is not painted
    again: another is.  Interrupted painting goes on where it was.  `device`, `dtype`: where the base goes for it, and its
    denoiser's type from then on; None: they stay.  `options`: as for `generation.generate`.
    Raises SVFitError as `check_class_pictures` does, and when nothing usable comes out.
    """
    check_class_pictures(folder, class_prompt, base)
    present = usable_class_pictures(folder)
    missing = count - len(present)
    if missing <= 0:
        return present[:count]
    folder.mkdir(parents=True, exist_ok=True)
    note: dict[str, Any] = {
        "made_by": "svfit-dreambooth",
        "base_model": base.name,
        "base_sha256": _hash(base),
        "class_prompt": class_prompt,
        "pictures": {},
        "unusable_seeds": [],
        "next_seed": seed,
    } | _read_note(folder)
    failures = 0
    bar = tqdm(total=missing, desc="painting class pictures", unit="picture")
    with bar, placed(base, device or base.pipeline.device, dtype):
        while missing > 0:
            own_seed = note["next_seed"]
            (picture,) = generate(base, [class_prompt], seed=own_seed, **options)
            note["next_seed"] += 1
            if picture.filtered or is_flat(picture.image):
                note["unusable_seeds"].append(own_seed)
                failures += 1
            else:
                name = f"class-{own_seed:06d}.png"
                save_picture(picture, folder / name)
                note["pictures"][name] = own_seed
                missing, failures = missing - 1, 0
                bar.update()
            write_atomically(folder / NOTE, json.dumps(note, indent=1, ensure_ascii=False) + "\n")
            if failures == PATIENCE:
                raise SVFitError(
                    f"{PATIENCE} pictures of {class_prompt!r} in a row came out blacked out or in one colour: change "
                    "class_prompt, or put pictures of your own into class_data_dir."
                )
    return usable_class_pictures(folder)[:count]


@contextmanager
def placed(base: BaseModel, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Brings the pipeline of `base` to `device`, its denoiser in `dtype`, in which that computes within.

    The autoencoder and the text encoders stay as they are: photos and captions are encoded with them afterwards.
    """
    with base.opened(base.family.denoiser_name, "vae"):
        denoiser = base.family.denoiser.to(device, dtype)  # before the rest, so that it never lies there in full size
        base.to(device)
        if dtype in (None, torch.float32):
            yield
            return
        denoiser.forward = torch.autocast(device.type, dtype)(denoiser.forward)
        try:
            yield
        finally:
            del denoiser.forward


def class_picture_report(present: Sequence[Photo], count: int, folder: Path) -> str:
    """What there is and what will be painted, in a plain line."""
    line = f"class pictures: {min(len(present), count)} of {count} in {folder}"
    return line if len(present) >= count else f"{line}, the base paints the others"


def _hash(base: BaseModel) -> str:
    """Tells copies and fine-tunes of one name apart, by the weights that every fine-tune moves."""
    name, weight = next(base.family.denoiser.named_parameters())
    return weight_hash(weight if base.stored is None else base.stored.weights(base.family.denoiser_name)[name])


def _read_note(folder: Path) -> dict[str, Any]:
    path = folder / NOTE
    if not path.exists():
        return {}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        lists = isinstance(note["pictures"], dict) and isinstance(note["unusable_seeds"], list)
        if lists and isinstance(note["next_seed"], int) and {"base_model", "base_sha256", "class_prompt"} <= set(note):
            return note
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise SVFitError(f"{path} cannot be read: delete it, or name another class_data_dir.")
