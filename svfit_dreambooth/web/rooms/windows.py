"""What training sees of a photo: the windows that it cuts out, at the size at which it reads them."""

from pathlib import Path

from PIL import Image

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms.bases import Bases
from svfit_dreambooth.web.rooms.libraries import libraries

MULTIPLE = 64  # pixels, of the sides at which a base trains that is not on this disk yet, as Stable Diffusion has it
SHOWN = 512  # pixels of the longest side of what is shown


def training_windows(
    path: Path, bases: Bases, base: str, resolution: int | None, seed: int
) -> list[tuple[Image.Image, str]]:
    """The windows of the photo `path` that a run on `base` would cut out, with a caption each; what its mask leaves out is grey.

    `resolution`: pixels; None: the base's own.  Raises SVFitError for a resolution that does not fit the base.
    """
    libraries()
    from svfit_dreambooth.bases.outline import outline_base_model
    from svfit_dreambooth.photos.crops import crop_boxes, photo_seed, training_size
    from svfit_dreambooth.training.config import TrainConfig

    multiple, required, own = MULTIPLE, 1, SHOWN
    if bases.is_here(base) and not Path(place := bases.resolve(base, typed=True)[0]).is_file():
        model = outline_base_model(place, revision=bases.resolve(base, typed=True)[1].get("revision"))
        multiple, required, own = model.family.size_multiple, model.family.required_multiple, model.resolution
    config = TrainConfig(resolution=resolution, seed=seed)
    side = config.resolution or own
    if side % required:
        raise SVFitError(f"resolution {side} is not a multiple of {required}, which this base needs.", "resolution")
    with Image.open(path) as photo:
        photo.load()
    shape = training_size(photo.size, side, multiple)
    whole = Image.new("RGB", photo.size, "#777777")
    whole.paste(photo, mask=photo.getchannel("A") if photo.mode == "RGBA" else None)
    boxes = crop_boxes(
        photo.size, shape, config.center_crop, config.crops_per_photo, photo_seed(config.seed, path.name)
    )
    boxes = list(dict.fromkeys(boxes))
    kept = (boxes[0][2] - boxes[0][0]) * (boxes[0][3] - boxes[0][1]) / (photo.width * photo.height)
    scale = min(1.0, SHOWN / max(shape))
    size = (max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale)))
    caption = f"{shape[0]} × {shape[1]} pixels" + (f", {kept:.0%} of the photo" if kept < 0.995 else ", all of it")
    return [(whole.resize(shape, Image.Resampling.LANCZOS, box=box).resize(size), caption) for box in boxes]
