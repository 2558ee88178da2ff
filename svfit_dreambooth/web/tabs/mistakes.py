"""How a mistake is told, and what a field of a form holds."""

import functools
import html
import inspect
import math
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from svfit_dreambooth.errors import SVFitError


def told(error: Exception, *, markup: bool = True) -> gr.Error:
    """A mistake as a toast in plain words; what a file or a person wrote is shown as text, never as markup.

    `markup`: it is for the page, which reads toasts as markup, rather than for a program.
    """
    return gr.Error(
        html.escape(str(error)) if markup else str(error), duration=12, print_exception=False, title="That did not work"
    )


def plainly(handler: Callable[..., Any], *, markup: bool = True) -> Callable[..., Any]:
    """`handler`, with whatever goes wrong as a toast: SVFitError in its own words, a full disk or memory in ours.

    `markup`: as in `told`.
    """
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def generator(*args: Any, **kwargs: Any) -> Any:
            with _told(markup):
                yield from handler(*args, **kwargs)

        return generator

    @functools.wraps(handler)
    def function(*args: Any, **kwargs: Any) -> Any:
        with _told(markup):
            return handler(*args, **kwargs)

    return function


@contextmanager
def _told(markup: bool) -> Iterator[None]:
    try:
        yield
    except (SVFitError, gr.Error) as error:
        raise (told(error, markup=markup) if isinstance(error, SVFitError) else error) from None
    except OSError as error:
        traceback.print_exc()
        why = error.strerror or str(error)
        sentence = f"a file could not be read or written ({why}): see whether the disk is full or the folder is gone."
        raise told(SVFitError(sentence), markup=markup) from error
    except Exception as error:  # nobody should look at a page that says nothing
        traceback.print_exc()
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            sentence = "the memory is full: ask for smaller pictures, or wait until a run is over."
        else:
            sentence = f"something went wrong that nobody foresaw ({type(error).__name__}); the server's log says more."
        raise told(SVFitError(sentence), markup=markup) from error


for_programs = functools.partial(plainly, markup=False)


def number(name: str, text: str | int | None) -> int | float | None:
    """What a field of the form holds; None where it was left empty.  Raises SVFitError for anything but a number."""
    text = "" if text is None else str(text).strip()
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is None:
        return None
    if not math.isfinite(value):
        raise SVFitError(f"“{name}” is {text[:40]!r}: write a number, or leave it empty.")
    return int(value) if value == int(value) and name != "Learning rate" else value


def numbers(name: str, text: str) -> list[int | float]:
    """What a field holds that takes several, divided by commas, semicolons or spaces.

    Raises SVFitError for anything but numbers, and for a decimal comma, which would be two of them.
    """
    if any(re.fullmatch(r"-?0,\d+", word) for word in re.split(r"[\s;]+", text)):
        raise SVFitError(
            f"“{name}” is {text[:40]!r}: write 0.5 for a half, and a space behind the comma for two numbers."
        )
    return [value for word in re.split(r"[\s,;]+", text) if (value := number(name, word)) is not None]


def whole(name: str, text: str | int | None) -> int | None:
    """The same for a number without fraction."""
    value = number(name, text)
    if value is not None and value != int(value):
        raise SVFitError(f"“{name}” is {text!r}: write a whole number, or leave it empty.")
    return None if value is None else int(value)
