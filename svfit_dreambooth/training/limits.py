"""What an option may be: said where it is declared, checked by one function."""

import math
import os
import types
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from svfit_dreambooth.errors import SVFitError

HUGE = 10**9  # more steps, pixels or pictures than any run could have


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    path: bool = False,
) -> Any:
    """A dataclass field with one line of help and the range of its values; `path`: "~" in it is the home folder."""
    limits = {"least": least, "above": above, "most": most, "below": below}
    return field(default=default, metadata={"help": help, "limits": limits, "path": path})


def plain_type(annotation: Any) -> tuple[Any, bool]:
    """The type of an option without its "or None" and its words, and whether None may be given."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = get_args(annotation)
        return kinds[0], type(None) in kinds
    return annotation, False


def words_of(annotation: Any) -> tuple[str, ...]:
    """The words that an option takes in place of a number: "auto" of `float | Literal["auto"]`."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return ()
    return tuple(word for kind in get_args(annotation)[1:] if get_origin(kind) is Literal for word in get_args(kind))


def checked(name: str, annotation: Any, metadata: Mapping[str, Any], default: Any, value: Any) -> Any:
    """`value` as the option `name` holds it.

    Raises SVFitError for one of another type, outside of its choices or of its range, infinite or not a number.
    """
    kind, may_be_none = plain_type(annotation)
    if value is None:
        if may_be_none or default is None:
            return None
        raise SVFitError(f"{name} is None, but must be {kind_words(annotation)}.", name)
    if isinstance(value, str) and value in words_of(annotation):
        return value
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise SVFitError(f"{name} is {value!r}, but must be {kind_words(annotation)}.", name)
        return value
    if kind is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        return _text(name, str(Path(value).expanduser()) if metadata["path"] and _starts_at_home(value) else value)
    if get_origin(kind) is list:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise SVFitError(f"{name} is {value!r}, but must be a list of texts.", name)
        return [_text(name, each) for each in value]
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise SVFitError(f"{name} is {value!r}, but must be {kind_words(annotation)}.", name)
    if kind is not bool:
        _check_range(name, kind, metadata["limits"], value)
    return value


def _starts_at_home(value: Any) -> bool:
    return isinstance(value, str) and (value == "~" or value.startswith(("~/", "~\\")))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SVFitError(f"{name} is {value!r}, but must be a text.", name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise SVFitError(f"{name} is {value!a}, which is no Unicode text: write or name it anew.", name) from None
    if "\0" in value:
        raise SVFitError(f"{name} is {value!a}, and no text has a zero byte: leave it out.", name)
    return value


def _check_range(name: str, kind: type, limits: Mapping[str, float | None], value: Any) -> None:
    least, above, most, below = (limits[key] for key in ("least", "above", "most", "below"))
    if most is None and below is None and kind is int:
        most = HUGE
    finite = kind is int or math.isfinite(value)
    if (
        finite
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    ):
        return
    words = [
        f"{least:,} or more" if least is not None else "",
        f"above {above}" if above is not None else "",
        f"at most {most:,}" if most is not None and (least is None or value > least or above is not None) else "",
        f"below {below}" if below is not None else "",
    ]
    text = " and ".join(word for word in words if word) or "a finite number"
    shown = repr(value) if kind is float or abs(value) < 10**100 else f"a number of {value.bit_length()} bits"
    raise SVFitError(f"{name} is {shown}: it must be {text}.", name)


def kind_words(annotation: Any) -> str:
    """What values of an option are, for people."""
    kind, _ = plain_type(annotation)
    if get_origin(kind) is Literal:
        *others, last = (str(choice) for choice in get_args(kind))
        return f"{', '.join(others)} or {last}"
    text = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a text")
    return " or ".join([text, *words_of(annotation)])
