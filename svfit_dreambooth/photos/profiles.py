"""Colour profiles: base models know sRGB, phones take photos in Display P3."""

import io

from PIL import Image, ImageCms

SRGB = ImageCms.createProfile("sRGB")
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # ICC's colour space of a profile -> Pillow's mode


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """`image` without an alpha channel as RGB in sRGB; `profile`: its ICC profile, None: it is sRGB already.

    Relative colorimetric with black point compensation.  The second part says why a profile was not applied, "" else.
    """
    if image.mode == "LAB":
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    elif not profile:
        return image.convert("RGB"), ""
    else:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        except (OSError, ImageCms.PyCMSError) as error:
            return image.convert("RGB"), f"can't be read ({error})"
    space = source.profile.xcolor_space.strip()
    own = {"L": "L", "1": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(image.mode, "RGB")
    mode = MODES.get(space, "")
    if mode != own and (mode, own) != ("RGB", "L"):  # grey values are RGB values too
        return image.convert("RGB"), f"is for {space} values, which the picture doesn't have"
    try:
        converted = ImageCms.profileToProfile(
            image.convert(mode),
            source,
            SRGB,
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError as error:
        return image.convert("RGB"), f"can't be applied ({error})"
    assert converted is not None  # only with inPlace is there nothing to give back
    return converted, ""
