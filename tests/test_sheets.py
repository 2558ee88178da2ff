"""Sheets of pictures and the curves of a run."""

from PIL import Image

from svfit_dreambooth.run_folder import append_progress
from svfit_dreambooth.sheets import CELL, contact_sheet, plot_run


def test_contact_sheet_holds_every_picture_and_fits_long_captions():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (300, 400), "blue")
    sheet = contact_sheet([("one", [red, blue, red]), ("zwei ü", [blue])], captions=["short", "very long " * 30])
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert colours[(255, 0, 0)] == 2 * CELL * CELL and colours[(0, 0, 255)] == 2 * CELL * CELL


def test_curves_are_drawn_from_the_diary(tmp_path):
    assert plot_run(tmp_path, tmp_path / "curve.png") is None  # nothing has happened yet
    for step in range(1, 21):
        append_progress(tmp_path, "step", step=step, loss=1 / step)
    plain = plot_run(tmp_path, tmp_path / "plain.png").read_bytes()
    append_progress(tmp_path, "measure", step=10, fixed_loss=0.4, subject=0.3, drift=0.1)
    append_progress(tmp_path, "measure", step=20, fixed_loss=0.3, subject=0.5, drift=0.2)
    path = plot_run(tmp_path, tmp_path / "curve.png")
    assert path.read_bytes() != plain
    with Image.open(path) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert len(colours) > 20
