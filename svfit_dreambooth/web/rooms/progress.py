"""What a run says of itself while it runs: its events, summed up for whoever watches."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svfit_dreambooth.training.journal import read_progress

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
    for event in read_progress(folder):
        kind, step = event.get("event"), int(event.get("step") or 0)
        if kind == "start":
            state.of, state.step = int(event.get("of") or 0), step
            state.status = state.message = state.kept_step = state.seconds = None
            clock, began, at_once = 0.0, event.get("time"), step == 0
            for series in (losses, fixed, subjects, pictures):
                for later in [known for known in series if known > step]:
                    del series[later]  # type: ignore[attr-defined]
        elif kind == "step":
            state.step, state.of = step, int(event.get("of") or state.of)
            _note(losses, step, event.get("loss"))
            now = event.get("seconds")  # since the run was started or went on
            if isinstance(now, int | float):
                seconds.append(now - clock if now >= clock else now)
                at_once = at_once and now >= clock
                clock = now
        elif kind == "measure":
            _note(fixed, step, event.get("fixed_loss"))
            _note(subjects, step, event.get("subject"))
        elif kind == "pictures":
            if path := _inside(folder, event.get("path")):
                pictures[step] = path
        elif kind == "rollback":
            state.remarks.append(f"went back to step {step}: {event.get('reason')}")
        elif kind == "end":
            state.status, state.message = event.get("status"), event.get("message")
            state.kept_step = event.get("kept_step") if isinstance(event.get("kept_step"), int) else None
            if at_once and all(isinstance(when, int | float) for when in (began, event.get("time"))):
                state.seconds = event["time"] - began
            state.figures = event.get("figures") or {}
            state.adapter, state.sheet = _inside(folder, event.get("adapter")), _inside(folder, event.get("sheet"))
    state.losses, state.fixed_losses, state.subjects, state.pictures = (
        sorted(losses.items()),
        sorted(fixed.items()),
        sorted(subjects.items()),
        sorted(pictures.items()),
    )
    if recent := sorted(seconds[-RECENT:]):
        state.seconds_a_step = recent[len(recent) // 2]
    return state


def _note(series: dict[int, float], step: int, value: Any) -> None:
    if isinstance(value, int | float):
        series[step] = float(value)


def _inside(folder: Path, name: Any) -> Path | None:
    """The file `name` of the run's folder, if it is there and nowhere else."""
    if not isinstance(name, str):
        return None
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
