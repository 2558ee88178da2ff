"""Sheets of pictures and the curves of a run."""

from PIL import Image

from svfit_dreambooth.painting.sheets import CELL, contact_sheet
from svfit_dreambooth.training.curves import by_step, plot_run
from svfit_dreambooth.training.journal import append_progress


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


def test_a_step_that_was_made_again_is_drawn_once():
    made = [("step", 1), ("step", 2), ("measure", 2), ("rollback", 1), ("step", 2), ("step", 3)]
    events = [{"event": event, "step": step, "loss": number} for number, (event, step) in enumerate(made)]
    assert [(event["step"], event["loss"]) for event in by_step(events, "step")] == [(1, 0), (2, 4), (3, 5)]
    assert [event["step"] for event in by_step(events, "measure")] == [2]
