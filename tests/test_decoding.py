"""Picture files: what opens, and how it looks upright, opaque, in eight bits and sRGB."""

import struct
import zlib

import numpy as np
import pytest
from pictures import HEIGHT, WIDTH, as_srgb, difference, display_p3, jpeg_bytes, picture
from PIL import Image, ImageCms, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.photos import decoding
from svfit_dreambooth.photos.decoding import open_photo
from svfit_dreambooth.photos.reading import find_photos


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif", "a.tiff", "no_suffix"])
def test_formats(tmp_path, name):
    kind = {"no_suffix": "PNG"}.get(name)
    picture().save(tmp_path / name, kind)
    (photo,) = find_photos(tmp_path)
    assert photo.path.name == name and photo.size == (WIDTH, HEIGHT) and photo.captions == ()
    assert difference(open_photo(photo.path), picture()) < 40


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    stored = {  # what the camera stores so that the tag's rule gives back the upright picture
        1: lambda p: p,
        2: lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda p: p.transpose(Image.Transpose.ROTATE_180),
        4: lambda p: p.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda p: p.transpose(Image.Transpose.TRANSPOSE),
        6: lambda p: p.transpose(Image.Transpose.ROTATE_90),
        7: lambda p: p.transpose(Image.Transpose.TRANSVERSE),
        8: lambda p: p.transpose(Image.Transpose.ROTATE_270),
    }[orientation](picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif)
    assert difference(open_photo(path), picture()) < 24
    assert find_photos(tmp_path)[0].size == (WIDTH, HEIGHT)


def test_broken_exif_keeps_the_photo(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_bytes(exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff garbage"))
    assert open_photo(path).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    image.paste((10, 20, 30, 0), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "a.png")
    opened = open_photo(tmp_path / "a.png")
    assert opened.mode == "RGB" and opened.getpixel((1, 1)) == (255, 255, 255) and opened.getpixel((6, 6))[0] < 255


def test_half_transparent(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert open_photo(tmp_path / "a.png").getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize(("mode", "name"), [("L", "a.png"), ("1", "a.png"), ("P", "a.png"), ("CMYK", "a.jpg")])
def test_modes_become_rgb(tmp_path, mode, name):
    picture().convert(mode).save(tmp_path / name)
    opened = open_photo(tmp_path / name)
    assert opened.mode == "RGB" and opened.size == (WIDTH, HEIGHT)
    if mode == "CMYK":
        assert difference(opened, picture()) < 24


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    opened = np.asarray(open_photo(tmp_path / f"a.{suffix}"))
    assert np.array_equal(opened[..., 0], np.round(ramp / 257).astype(np.uint8))


def test_float_tiff(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "a.tiff")
    assert np.asarray(open_photo(tmp_path / "a.tiff")).max() == 255


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animated_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=50, **options)
    assert getattr(Image.open(tmp_path / f"a.{suffix}"), "n_frames", 1) == 3
    assert open_photo(find_photos(tmp_path)[0].path).getpixel((8, 8)) == (255, 0, 0)


def test_phone_pictures_of_several_views(tmp_path):
    views = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black")]
    views[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=views[1:])
    assert open_photo(find_photos(tmp_path)[0].path).getpixel((8, 8)) == (255, 255, 255)


def test_decompression_bomb(tmp_path, monkeypatch, caplog):
    picture().save(tmp_path / "bomb.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(SVFitError, match="more than 1000 pixels"):
        open_photo(tmp_path / "bomb.png")
    assert [photo.path.name for photo in find_photos(tmp_path)] == ["ok.png"]
    assert "bomb.png" in caplog.text


def test_large_but_safe_is_silent(tmp_path, monkeypatch, recwarn):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)
    open_photo(tmp_path / "a.png")
    assert not recwarn.list


def test_postscript_is_not_handed_to_ghostscript(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(SVFitError, match="isn't a picture"):
        open_photo(tmp_path / "a.png")


# ---------------------------------------------------------------- phones' formats


@pytest.mark.parametrize("suffix", ["heic", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_phones_pictures_are_upright_once(tmp_path, orientation, suffix):
    """As in JPEG; a HEIF file turns itself, and its EXIF orientation must not turn it again."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in (f"a.{suffix}", "a.jpg"):
        picture(96, 64).save(tmp_path / name, exif=exif.tobytes(), quality=95)
    ours, jpeg = open_photo(tmp_path / f"a.{suffix}"), open_photo(tmp_path / "a.jpg")
    assert ours.size == jpeg.size == ((96, 64) if orientation < 5 else (64, 96))
    assert difference(ours, jpeg) < 24


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_phones_pictures_under_a_wrong_suffix(tmp_path, kind):
    picture().save(tmp_path / "a.jpg", kind, quality=95)
    picture().save(tmp_path / "b", kind, quality=95)
    assert [photo.size for photo in find_photos(tmp_path)] == [(WIDTH, HEIGHT)] * 2
    assert difference(open_photo(tmp_path / "a.jpg"), picture()) < 24


def test_a_heic_with_transparency_keeps_it(tmp_path):
    image = picture().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 16, HEIGHT))
    image.save(tmp_path / "a.heic", quality=95)
    (photo,) = find_photos(tmp_path)
    assert photo.mask == photo.path
    assert difference(open_photo(photo.path).crop((0, 0, 14, HEIGHT)), Image.new("RGB", (14, HEIGHT), "white")) < 8


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_a_cut_picture_of_a_phone_is_refused(tmp_path, kind):
    picture(200, 100).save(tmp_path / "a.heic", kind)
    content = (tmp_path / "a.heic").read_bytes()
    (tmp_path / "a.heic").write_bytes(content[: len(content) // 2])
    with pytest.raises(SVFitError, match="broken"):
        open_photo(tmp_path / "a.heic")


# ---------------------------------------------------------------- large notes, deep pixels, raw files


def test_a_png_with_a_large_text_and_profile_is_whole(tmp_path):
    """ComfyUI's workflows and printers' profiles are larger than the 1 MB that Pillow allows unasked."""
    info = PngInfo()
    info.add_itxt("workflow", "x" * 3_000_000, zip=True)
    info.add_text("parameters", "y" * 3_000_000, zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture().save(tmp_path / "a.png", pnginfo=info, icc_profile=profile + bytes(2_000_000))
    assert difference(open_photo(tmp_path / "a.png"), picture()) <= 1


def test_a_png_whose_text_swells_without_end_is_refused(tmp_path):
    info = PngInfo()
    info.add_itxt("bomb", "x" * (65 * 2**20), zip=True)
    picture().save(tmp_path / "a.png", pnginfo=info)
    assert (tmp_path / "a.png").stat().st_size < 10**6
    with pytest.raises(SVFitError, match="more text or profiles than is safe"):
        open_photo(tmp_path / "a.png")


@pytest.mark.parametrize(("dtype", "brightest"), [("uint32", 2**32 - 1), ("uint32", 4000), ("int32", 2**31 - 1)])
def test_integers_of_32_bits_go_by_the_brightest(tmp_path, dtype, brightest):
    ramp = np.linspace(0, brightest, 64).astype(dtype).reshape(8, 8)
    Image.fromarray(ramp.view(np.int32)).save(tmp_path / "a.tiff")
    if dtype == "uint32":  # Pillow writes signed ones only: its tag of the sample format is changed
        content, tag = (tmp_path / "a.tiff").read_bytes(), struct.pack("<HHI", 339, 3, 1)
        assert content.count(tag + b"\2") == 1
        (tmp_path / "a.tiff").write_bytes(content.replace(tag + b"\2", tag + b"\1"))
    opened = np.asarray(open_photo(tmp_path / "a.tiff"))[..., 0]
    assert np.array_equal(opened, np.round(ramp.astype(float) * 255 / brightest).astype(np.uint8))


def test_floats_that_are_no_numbers_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(SVFitError, match="holds NaN"):
        open_photo(tmp_path / "a.tiff")


def raw_file(path, tags=None):
    """A TIFF whose first picture is a preview of the second, as cameras write it."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in (tags or {}).items():
        directory[tag] = value
    picture(16, 12).save(path, "TIFF", tiffinfo=directory, save_all=True, append_images=[picture()])


@pytest.mark.parametrize(
    ("name", "tags", "said"),
    [
        ("a.NEF", {}, "a camera's raw file"),
        ("a.tif", {50706: b"\1\4\0\0"}, "a camera's raw file"),
        ("a.tif", {254: 1}, "begins with a preview"),
    ],
)
def test_raw_files_are_skipped_and_named(tmp_path, caplog, name, tags, said):
    raw_file(tmp_path / name, tags)
    picture().save(tmp_path / "good.png")
    assert [photo.path.name for photo in find_photos(tmp_path)] == ["good.png"]
    (record,) = caplog.records
    assert name in record.message and said in record.message


def test_raw_files_of_an_unknown_kind_are_called_so(tmp_path):
    (tmp_path / "a.CR3").write_bytes(b"\0\0\0\x18ftypcrx " + bytes(100))
    with pytest.raises(SVFitError, match="a camera's raw file"):
        open_photo(tmp_path / "a.CR3")


def test_a_plain_tiff_of_several_pages_gives_its_first(tmp_path):
    raw_file(tmp_path / "scan.tif")
    assert open_photo(tmp_path / "scan.tif").size == (16, 12)


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "heic", "avif"])
def test_display_p3_becomes_srgb(tmp_path, suffix):
    picture().save(tmp_path / f"a.{suffix}", icc_profile=display_p3(), quality=100)
    plain, ours = tmp_path / f"plain.{suffix}", open_photo(tmp_path / f"a.{suffix}")
    picture().save(plain, quality=100)
    assert difference(ours, as_srgb(open_photo(plain))) <= 3
    assert difference(ours, open_photo(plain)) > 10


def test_transparency_outlives_the_conversion(tmp_path):
    image = picture().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 10, HEIGHT))
    image.save(tmp_path / "a.png", icc_profile=display_p3())
    opened = open_photo(tmp_path / "a.png", keep_alpha=True)
    assert opened.mode == "RGBA" and opened.getpixel((5, 5))[3] == 0
    assert (
        difference(
            open_photo(tmp_path / "a.png").crop((11, 0, WIDTH, HEIGHT)), as_srgb(picture()).crop((11, 0, WIDTH, HEIGHT))
        )
        <= 3
    )


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_wide_colours_without_a_profile_are_spoken_of(tmp_path, caplog, kind):
    path = tmp_path / "a.heic"
    picture().save(path, kind)
    content = path.read_bytes()
    place = content.find(b"colrnclx") + 8
    assert place > 8 and not find_photos(tmp_path)[0].captions and not caplog.records
    path.write_bytes(content[:place] + b"\0\x0c" + content[place + 2 :])  # the primaries of Display P3
    find_photos(tmp_path)
    assert "'" + str(path) + "' is in wide colours but carries no profile" in caplog.text


def test_adobe_rgb_without_a_profile_is_spoken_of(tmp_path, caplog):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    picture().save(tmp_path / "a.jpg", exif=exif)
    find_photos(tmp_path)
    assert "is in Adobe RGB but carries no profile" in caplog.text


@pytest.mark.parametrize(("primaries", "transfer", "said"), [(12, 13, "wide colours"), (9, 16, "HDR"), (1, 13, None)])
def test_png_that_names_its_colours_in_cicp(tmp_path, caplog, primaries, transfer, said):
    picture().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    data = b"cICP" + bytes([primaries, transfer, 0, 1])
    chunk = struct.pack(">I", 4) + data + struct.pack(">I", zlib.crc32(data))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])  # behind IHDR
    find_photos(tmp_path)
    assert (said is None and not caplog.records) or (said in caplog.text and "taken as sRGB" in caplog.text)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("turned", [False, True])
def test_very_large_pictures_are_read_at_half_their_sides(tmp_path, monkeypatch, caplog, name, turned):
    image = Image.new("RGB", (64, 32), (200, 30, 30))
    image.paste((30, 30, 200), (32, 0, 64, 32))
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6  # turn clockwise to see it upright
    image.save(tmp_path / name, exif=exif)
    monkeypatch.setattr(decoding, "MOST_PIXELS", 64 * 32 - 1)
    (photo,) = find_photos(tmp_path)
    assert photo.size == ((16, 32) if turned else (32, 16))
    assert "pixels and is read at half its sides" in caplog.text
    read = open_photo(photo.path)
    assert read.size == photo.size
    ends = [read.getpixel(place) for place in ([(8, 4), (8, 28)] if turned else [(4, 8), (28, 8)])]
    assert [max(range(3), key=colour.__getitem__) for colour in ends] == [0, 2]


def test_very_large_pictures_keep_transparency_palettes_and_sixteen_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MOST_PIXELS", 100)
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (8, 0, 16, 16))
    clear.save(tmp_path / "clear.png")
    few = Image.new("P", (16, 16), 1)
    few.putpalette([0, 0, 0, 0, 200, 0])
    few.save(tmp_path / "few.png")
    Image.fromarray(np.full((16, 16), 65535, np.uint16)).save(tmp_path / "deep.png")
    alpha = open_photo(tmp_path / "clear.png", keep_alpha=True)
    assert alpha.size == (8, 8) and alpha.getpixel((1, 1)) == (255, 0, 0, 255) and alpha.getpixel((6, 1))[3] == 0
    assert open_photo(tmp_path / "few.png").getpixel((3, 3)) == (0, 200, 0)
    assert open_photo(tmp_path / "deep.png").getpixel((3, 3)) == (255, 255, 255)
    assert open_photo(tmp_path / "deep.png").size == (8, 8)
