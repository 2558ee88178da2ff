"""The curves of a run."""

from PIL import Image

from svfit_dreambooth.training.curves import by_step, plot_run
from svfit_dreambooth.training.events import Measured, Stepped, WentBack
from svfit_dreambooth.training.journal import RunFolder


def colours(path):
    with Image.open(path) as picture:
        return {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}


def test_curves_show_losses_measures_and_returns(tmp_path):
    folder = RunFolder(tmp_path)
    assert plot_run(folder) is None  # nothing has happened yet
    for step in range(1, 21):
        folder.note(Stepped(step, 20, loss=1 / step))
    red = (0xD6, 0x27, 0x28)  # matplotlib's, of a return to an earlier step
    with Image.open(plot_run(folder)) as picture:
        right = picture.convert("RGB").crop((picture.width * 2 // 3, 0, picture.width, picture.height))
    assert right.getcolors() == [(right.width * right.height, (255, 255, 255))]  # nothing was measured
    assert red not in colours(folder.curve)
    folder.note(WentBack(10, "the loss is nan"))
    folder.note(Measured(10, fixed_loss=0.4, subject=0.3, drift=0.1))
    folder.note(Measured(20, fixed_loss=0.3, subject=0.5, drift=0.2))
    assert red in colours(plot_run(folder))
    with Image.open(folder.curve) as picture:
        right = picture.convert("RGB").crop((picture.width * 2 // 3, 0, picture.width, picture.height))
    assert len(right.getcolors(1 << 20)) > 20


def test_a_step_that_was_made_again_is_drawn_once():
    events = [
        Stepped(1, loss=0.0),
        Stepped(2, loss=1.0),
        Measured(2, subject=2.0),
        WentBack(1, "the loss is nan"),
        Stepped(2, loss=4.0),
        Stepped(3, loss=5.0),
    ]
    assert [(event.step, event.loss) for event in by_step(events, Stepped)] == [(1, 0.0), (2, 4.0), (3, 5.0)]
    assert [event.step for event in by_step(events, Measured)] == [2]
