"""What a run says of itself while it runs: its events, summed up for whoever watches."""

from dataclasses import dataclass, field
from pathlib import Path

from svfit_dreambooth.training.events import End, Measured, Painted, Start, Stepped, WentBack
from svfit_dreambooth.training.journal import RunFolder

RECENT = 20  # steps from which the time that is left is told


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    of: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    fixed_losses: list[tuple[int, float]] = field(default_factory=list)  # the same on noise that never changes
    subjects: list[tuple[int, float]] = field(default_factory=list)  # likeness to the subject
    pictures: list[tuple[int, Path]] = field(default_factory=list)  # contact sheets of the validation prompts
    seconds_a_step: float | None = None  # lately
    seconds: float | None = None  # from start to end; None: not ended, or not in one go
    status: str | None = None  # finished, stopped or failed; None: not ended
    message: str | None = None  # why it ended
    adapter: Path | None = None
    kept_step: int | None = None  # whose values the adapter holds; None: not ended
    sheet: Path | None = None  # photos, the base's answers, the adapter's
    figures: dict[str, dict[str, float | None]] = field(default_factory=dict)  # "base", "adapter" -> measures
    remarks: list[str] = field(default_factory=list)

    @property
    def seconds_left(self) -> float | None:
        return None if self.seconds_a_step is None else self.seconds_a_step * max(self.of - self.step, 0)


def sum_up(folder: Path) -> Progress:
    """The events of a run, of which later ones replace those of the same step: a resumed run goes back a little."""
    state = Progress()
    losses: dict[int, float] = {}
    fixed: dict[int, float] = {}
    subjects: dict[int, float] = {}
    pictures: dict[int, Path] = {}
    seconds: list[float] = []  # that each step took
    clock, began, at_once = 0.0, None, True
    for event in RunFolder(folder).events():
        step = event.step
        if isinstance(event, Start):
            state.of, state.step = event.of, step
            state.status = state.message = state.kept_step = state.seconds = None
            clock, began, at_once = 0.0, event.time, step == 0
            for series in (losses, fixed, subjects, pictures):
                for later in [known for known in series if known > step]:
                    del series[later]  # type: ignore[attr-defined]
        elif isinstance(event, Stepped):
            state.step, state.of = step, event.of or state.of
            _note(losses, step, event.loss)
            if event.seconds is not None:  # since the run was started or went on
                now = event.seconds
                seconds.append(now - clock if now >= clock else now)
                at_once = at_once and now >= clock
                clock = now
        elif isinstance(event, Measured):
            _note(fixed, step, event.fixed_loss)
            _note(subjects, step, event.subject)
        elif isinstance(event, Painted):
            if path := _inside(folder, event.path):
                pictures[step] = path
        elif isinstance(event, WentBack):
            state.remarks.append(f"went back to step {step}: {event.reason}")
        elif isinstance(event, End):
            state.status, state.message, state.kept_step = event.status, event.message, event.kept_step
            if at_once and began is not None and event.time is not None:
                state.seconds = event.time - began
            state.figures = event.figures or {}
            state.adapter, state.sheet = _inside(folder, event.adapter), _inside(folder, event.sheet)
    state.losses, state.fixed_losses, state.subjects, state.pictures = (
        sorted(losses.items()),
        sorted(fixed.items()),
        sorted(subjects.items()),
        sorted(pictures.items()),
    )
    if recent := sorted(seconds[-RECENT:]):
        state.seconds_a_step = recent[len(recent) // 2]
    return state


def _note(series: dict[int, float], step: int, value: float | None) -> None:
    if value is not None:
        series[step] = float(value)


def _inside(folder: Path, name: str | None) -> Path | None:
    """The file `name` of the run's folder, if it is there and nowhere else."""
    if name is None:
        return None
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
