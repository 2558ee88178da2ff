"""Small pictures that tests tell apart."""

import io
import struct

import numpy as np
from PIL import Image, ImageCms

WIDTH, HEIGHT = 48, 32


def picture(width=WIDTH, height=HEIGHT, seed=0):
    """Smooth, without any symmetry: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 30 + seed)], axis=-1).astype(np.uint8))


def jpeg_bytes(image=None, **options):
    buffer = io.BytesIO()
    (image or picture()).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def difference(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max()


# Red, green and blue of Display P3 as XYZ under the light of profiles, D50; its curve and white are those of sRGB.
P3_COLORANTS = {
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
}
P3_TO_SRGB = np.array(
    [[1.22494, -0.22494, 0.0], [-0.04206, 1.04206, 0.0], [-0.01964, -0.07864, 1.09828]]
)  # linear light


def display_p3():
    """An ICC profile: that of sRGB with other colorants."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", profile, 128)
    for entry in range(132, 132 + 12 * count, 12):
        tag, offset, _ = struct.unpack_from(">4sII", profile, entry)
        if tag in P3_COLORANTS:
            struct.pack_into(">3i", profile, offset + 8, *(round(value * 65536) for value in P3_COLORANTS[tag]))
    return bytes(profile)


def as_srgb(image):
    """Display P3 values as sRGB, by the published matrix."""
    values = np.asarray(image, dtype=float) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ P3_TO_SRGB.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return Image.fromarray((encoded * 255).round().astype(np.uint8))
