"""What a run says of itself while it runs: its events, summed up for whoever watches."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from svfit_dreambooth.training.events import End, Measured, Painted, Phase, Start, Stepped, WentBack
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
    doing: str | None = None  # the phase that it is in, in plain words
    seconds_a_step: float | None = None  # lately
    looks: list[int] = field(default_factory=list)  # steps at which it was measured or painted
    seconds_a_look: float | None = None  # None: there was none after a step yet
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
        """For the steps, the looks between them and the one at the end; None before the first step."""
        if self.seconds_a_step is None:
            return None
        steps = self.seconds_a_step * max(self.of - self.step, 0)
        return steps + (self.seconds_a_look or 0.0) * (self._looks_left + bool(self.looks))

    @property
    def knows_looks(self) -> bool:
        """Does `seconds_left` count the looks, if there are any?"""
        return not self.looks or self.seconds_a_look is not None

    @property
    def _looks_left(self) -> int:
        """Between now and the last step, at the distance of those that were."""
        apart = min((later - one for one, later in zip(self.looks, self.looks[1:], strict=False)), default=0)
        return max(self.of - 1 - self.looks[-1], 0) // apart if apart else 0


def sum_up(folder: Path) -> Progress:
    """The events of a run, of which later ones replace those of the same step: a resumed run goes back a little."""
    state = Progress()
    losses: dict[int, float] = {}
    fixed: dict[int, float] = {}
    subjects: dict[int, float] = {}
    pictures: dict[int, Path] = {}
    seconds: list[float] = []  # that each step took, those after a look apart
    after_looks: list[float] = []  # the same of these
    clock, began, at_once = 0.0, None, True
    for event in RunFolder(folder).events():
        step = event.step
        if isinstance(event, Start):
            state.of, state.step = event.of, step
            state.status = state.message = state.kept_step = state.seconds = state.doing = None
            state.looks = [look for look in state.looks if look <= step]
            clock, began, at_once = 0.0, event.time, step == 0
            for series in (losses, fixed, subjects, pictures):
                for later in [known for known in series if known > step]:
                    del series[later]  # type: ignore[attr-defined]
        if isinstance(event, Measured | Painted) and event.step not in state.looks:
            state.looks.append(event.step)
        if isinstance(event, Stepped):
            state.doing = None
            state.step, state.of = step, event.of or state.of
            _note(losses, step, event.loss)
            if event.seconds is not None:  # since the run was started or went on
                now = event.seconds
                took = now - clock if now >= clock else now
                (after_looks if step > 1 and step - 1 in state.looks else seconds).append(took)
                at_once = at_once and now >= clock
                clock = now
        elif isinstance(event, Phase):
            state.doing = event.doing
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
    if recent := seconds[-RECENT:]:
        state.seconds_a_step = median(recent)
        if after_looks:
            state.seconds_a_look = max(median(after_looks[-RECENT:]) - state.seconds_a_step, 0.0)
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
