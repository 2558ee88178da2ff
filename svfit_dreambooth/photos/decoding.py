"""One picture file to upright sRGB pixels.  What it is, its content says, not its name."""

import math
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image, ImageOps, PngImagePlugin

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.photos.profiles import to_srgb

# What Pillow may try, by content.  Not everything it knows: opening EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "HEIF", "AVIF")
PICTURE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".heic", ".heif", ".hif", ".avif"),
}
# Raw files of cameras are TIFF as a rule, and what opens as their first picture is a small preview.
RAW_SUFFIXES = {
    *(".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".raw", ".rwl"),
    *(".pef", ".srw", ".3fr", ".fff", ".iiq", ".erf", ".kdc", ".dcr", ".mrw", ".mos", ".x3f", ".gpr"),
}
NEW_SUBFILE_TYPE, SAMPLE_FORMAT, DNG_VERSION = 254, 339, 50706  # tags of TIFF and of Adobe's DNG
MOST_PIXELS = 48_000_000  # what phones take at best; larger pictures are read at half their sides

pillow_heif.register_heif_opener()
# Pillow stops at texts and profiles of 1 MB in a PNG, which editors and printers' profiles exceed, and calls the
# picture broken.  These bounds still hold off what would swell to gigabytes.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 64 * 2**20)
PngImagePlugin.MAX_TEXT_MEMORY = max(PngImagePlugin.MAX_TEXT_MEMORY, 256 * 2**20)


@dataclass
class Decoded:
    """A picture file as pixels."""

    colours: Image.Image  # "RGB", upright, in sRGB
    alpha: Image.Image | None  # "L" of the same size; None: opaque everywhere
    remarks: list[str]  # what a person should know of how it was read, in plain sentences

    def on_white(self) -> Image.Image:
        """Opaque; what is transparent becomes white."""
        if self.alpha is None:
            return self.colours
        return Image.alpha_composite(Image.new("RGBA", self.colours.size, "white"), self.with_alpha()).convert("RGB")

    def with_alpha(self) -> Image.Image:
        """RGBA, or RGB where it is opaque everywhere."""
        if self.alpha is None:
            return self.colours
        return Image.merge("RGBA", (*self.colours.split(), self.alpha))


def open_photo(path: str | Path, keep_alpha: bool = False) -> Image.Image:
    """An RGB picture: upright (EXIF), in sRGB, transparency laid on white, of several the first.

    16-bit values are scaled to 8; those of 32 bits, which have no agreed white, by the brightest of them.
    One of more than `MOST_PIXELS` is read at half its sides.  `keep_alpha`: one that isn't opaque everywhere stays RGBA.
    Raises SVFitError for a file that isn't a picture, is broken or cut short, is a camera's raw file, or has more
    pixels than is safe to open (twice PIL.Image.MAX_IMAGE_PIXELS, 179 million).
    """
    decoded = decode(Path(path))
    return decoded.with_alpha() if keep_alpha else decoded.on_white()


def decode(path: Path) -> Decoded:
    """The picture in `path`.  Raises SVFitError as `open_photo` does."""
    if not path.is_file():
        raise SVFitError(f"'{path}' isn't a file: check the path of the photo.")
    Image.init()  # all plugins: with `formats` given, Pillow doesn't look for those it hasn't loaded yet
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # phones do take 100-megapixel photos
            warnings.filterwarnings("ignore", "Corrupt EXIF data")
            with Image.open(path, formats=FORMATS) as image:
                _check_not_raw(image, path)
                image.verify()  # checksums, where the format has them
            with Image.open(path, formats=FORMATS) as image:
                size = image.size
                if too_large(size):
                    image.draft(None, (size[0] // 2, size[1] // 2))  # JPEG is then never whole in memory
                image.load()
                return _decoded(image, path, size)
    except SVFitError:
        raise
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise SVFitError(f"'{path}' has more than {limit} pixels, too many to open safely: scale it down.") from None
    except Image.UnidentifiedImageError:
        if path.suffix.lower() in RAW_SUFFIXES:
            raise _raw_error(path) from None
        raise SVFitError(
            f"'{path}' isn't a picture of a known kind, or is broken: save it as JPEG, PNG or WebP."
        ) from None
    except MemoryError:
        raise SVFitError(f"'{path}' doesn't fit into memory: scale it down.") from None
    except Exception as error:  # noqa: BLE001 - decoders meet broken files with every kind of exception
        if "MAX_TEXT" in str(error):
            raise SVFitError(f"'{path}' carries more text or profiles than is safe to read: save it anew.") from None
        reason = " ".join(str(error).split())
        raise SVFitError(f"'{path}' is broken or cut short ({reason}): copy it again or remove it.") from None


def too_large(size: tuple[int, int]) -> bool:
    """Whether a picture of `size` is read at half its sides."""
    return math.prod(size) > MOST_PIXELS


def _decoded(image: Image.Image, path: Path, size: tuple[int, int]) -> Decoded:
    """`size`: of the picture in the file, which may be read smaller already."""
    remarks = []
    profile = image.info.get("icc_profile")
    signed = getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, (1,))[0] == 2
    if not profile and (spoken_of := _unread_colours(image, path)):
        remarks.append(f"'{path}' is in {spoken_of} but carries no profile: its colours are taken as sRGB.")
    try:
        ImageOps.exif_transpose(image, in_place=True)  # HEIF files turn themselves: pillow-heif then calls the tag 1
    except Exception as error:  # noqa: BLE001 - the picture is whole, only its notes aren't
        remarks.append(f"'{path}' has unreadable EXIF data ({error}): its orientation is taken as it is.")
    if too_large(size):
        image = _halved(image) if image.size in (size, size[::-1]) else image
        remarks.append(
            f"'{path}' has {size[0]}x{size[1]} pixels and is read at half its sides: nothing is trained so large."
        )
    alpha = None
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        alpha = with_alpha.getchannel("A")
        alpha = None if alpha.getextrema()[0] == 255 else alpha
        image = image.convert("L") if image.mode in ("LA", "La") else with_alpha.convert("RGB")
    colours, unread = to_srgb(_eight_bits(image, signed), profile)
    if unread:
        remarks.append(f"The colour profile of '{path}' {unread}: its colours are taken as sRGB.")
    return Decoded(colours, alpha, remarks)


def _halved(image: Image.Image) -> Image.Image:
    """With half the sides, each pixel the mean of four; before anything else is done, which would take more memory."""
    if image.mode in ("P", "1"):  # numbers of colours have no mean
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode.startswith("I;16"):
        return image.resize((image.width // 2, image.height // 2), Image.Resampling.NEAREST)
    return image.reduce(2)


def _eight_bits(image: Image.Image, signed: bool) -> Image.Image:
    """Pillow's own conversion of integers and floats would clip instead of scaling."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "I" and not signed:
        values = values.astype(np.int32).view(np.uint32)  # Pillow reads unsigned ones as signed
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    top = 65535.0 if image.mode.startswith("I;16") else max(float(values.max()), 1.0)
    return Image.fromarray(np.clip(values * (255 / top), 0, 255).round().astype(np.uint8))


def _check_not_raw(image: Image.Image, path: Path) -> None:
    """Raises SVFitError for a TIFF whose first picture is the preview of another."""
    if image.format != "TIFF":
        return
    tags = image.tag_v2  # type: ignore[attr-defined]
    with open(path, "rb") as file:
        canon = file.read(10)[8:] == b"CR"
    if canon or DNG_VERSION in tags or path.suffix.lower() in RAW_SUFFIXES:
        raise _raw_error(path)
    if tags.get(NEW_SUBFILE_TYPE, 0) & 1:
        raise SVFitError(f"'{path}' begins with a preview of another picture: save that picture as JPEG or PNG.")


def _raw_error(path: Path) -> SVFitError:
    return SVFitError(f"'{path}' is a camera's raw file, which has to be developed: save it as JPEG or PNG.")


def _unread_colours(image: Image.Image, path: Path) -> str:
    """The kind of colours that a file names in another way than by a profile, where they aren't sRGB; "" else."""
    if image.format in ("HEIF", "AVIF"):
        with open(path, "rb") as file:
            head = file.read(2**16)
        place = head.find(b"colrnclx")
        if 0 <= place <= len(head) - 12:
            primaries, transfer = struct.unpack_from(">HH", head, place + 8)  # ITU-T H.273
            if transfer in (16, 18):
                return "HDR colours"
            if primaries not in (1, 2):  # BT.709, which are sRGB's, and "unspecified"
                return "wide colours"
    elif image.format == "PNG":
        primaries, transfer = _coding_of_png(path)
        if transfer in (16, 18):
            return "HDR colours"
        if primaries not in (1, 2):
            return "wide colours"
    elif image.format in ("JPEG", "MPO", "TIFF"):
        try:
            return "Adobe RGB" if image.getexif().get_ifd(0xA005).get(1) == "R03" else ""  # as the DCF standard says it
        except Exception:  # noqa: BLE001 - unreadable EXIF data is spoken of elsewhere
            return ""
    return ""


def _coding_of_png(path: Path) -> tuple[int, int]:
    """Primaries and transfer function by ITU-T H.273 from the chunk cICP, which stands before the pixels; 2: unspecified."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"cICP" and length == 4:
                primaries, transfer, *_ = file.read(4)
                return primaries, transfer
            if kind == b"IDAT":
                break
            file.seek(length + 4, 1)
    return 2, 2
