"""Sheets of pictures."""

from PIL import Image

from svfit_dreambooth.painting.sheets import CELL, contact_sheet


def test_contact_sheet_holds_every_picture_and_fits_long_captions():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (300, 400), "blue")
    sheet = contact_sheet([("one", [red, blue, red]), ("zwei ü", [blue])], captions=["short", "very long " * 30])
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert colours[(255, 0, 0)] == 2 * CELL * CELL and colours[(0, 0, 255)] == 2 * CELL * CELL
