"""What happens in a run, each kind of event declared once: the loop notes them, page, hub and plots read them.

`progress.jsonl` has one JSON object a line, the event's name first; programs of other people follow a run by reading it.
"""

import json
import types
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, TypeAlias, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Start:
    """A run began, at its first step."""

    name: ClassVar[str] = "start"
    time: float | None = None  # seconds since 1970
    step: int = 0
    of: int = 0  # optimizer steps that it is to make
    adapter_name: str = ""
    base_model: str = ""
    values: int = 0  # singular values that it trains


@dataclass(frozen=True)
class Phase:
    """The run turns to something that may take long; what it was before is done."""

    name: ClassVar[str] = "phase"
    doing: str  # in plain words
    time: float | None = None
    step: int = 0


@dataclass(frozen=True)
class Stepped:
    """An optimizer step is made."""

    name: ClassVar[str] = "step"
    step: int
    of: int = 0
    loss: float | None = None  # mean over the step's examples
    learning_rate: float = 0.0
    prior_loss: float | None = None  # the part of the class pictures; None without prior preservation
    seconds: float | None = None  # since the run was started or went on
    base_loss: float | None = None  # squared distance from the base's answers; None without keep_base


@dataclass(frozen=True)
class Measured:
    """The run was measured at a look; None: no network was given for it."""

    name: ClassVar[str] = "measure"
    step: int
    fixed_loss: float | None = None  # loss on noise and timesteps that never change
    subject: float | None = None  # likeness to the photos, mean cosine of features
    prompt: float | None = None  # fit of the pictures to their prompts, mean cosine
    drift: float | None = None  # change of pictures that have nothing to do with the subject, 0 is none


@dataclass(frozen=True)
class Painted:
    """A look's pictures lie in the run's folder."""

    name: ClassVar[str] = "pictures"
    step: int
    path: str  # within the folder


@dataclass(frozen=True)
class Saved:
    """A checkpoint lies in the run's folder."""

    name: ClassVar[str] = "checkpoint"
    step: int
    path: str  # within the folder


@dataclass(frozen=True)
class WentBack:
    """Numbers were bad: the run went back to `step`."""

    name: ClassVar[str] = "rollback"
    step: int
    reason: str
    learning_rate: float = 0.0  # from here on


@dataclass(frozen=True)
class End:
    """The run ended; its adapter, if it has one, is written."""

    name: ClassVar[str] = "end"
    status: str = "finished"  # or stopped, or failed
    time: float | None = None
    step: int = 0
    message: str | None = None  # why it failed
    kept_step: int | None = None  # whose values the adapter holds
    adapter: str | None = None  # file in the folder
    sheet: str | None = None  # the picture at the end, in the folder
    figures: dict[str, dict[str, float | None]] | None = None  # "base", "adapter", ... -> measure -> value


Event: TypeAlias = Start | Phase | Stepped | Measured | Painted | Saved | WentBack | End
KINDS: dict[str, type[Any]] = {kind.name: kind for kind in get_args(Event)}


def to_line(event: Event) -> str:
    """The event as a line of JSON, without what is None."""
    values = {name: value for name, value in asdict(event).items() if value is not None}
    return json.dumps({"event": event.name, **values})


def from_line(line: str) -> Event | None:
    """The event of a line; None for one that was cut short, is of an unknown kind, or holds other types."""
    try:
        values = json.loads(line)
        kind = KINDS[values["event"]]
    except (ValueError, KeyError, TypeError):
        return None
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for each in fields(kind):
        value = values.get(each.name)
        if value is None:
            if each.default is MISSING:
                return None
            continue
        if not _is_of(value, hints[each.name]):
            return None
        found[each.name] = value
    return kind(**found)


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is_of(value, each) for each in get_args(kind))
    if get_origin(kind) is dict:
        key, of = get_args(kind)
        return isinstance(value, dict) and all(_is_of(k, key) and _is_of(v, of) for k, v in value.items())
    if kind is type(None):
        return value is None
    numbers = (int, float) if kind is float else kind
    return isinstance(value, numbers) and not isinstance(value, bool)
