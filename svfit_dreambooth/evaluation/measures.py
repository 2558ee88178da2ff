"""The measures of adapters: their names, and what tables, plots, cards and the page call them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Named(NamedTuple):
    """What a measure is called where there is room for a few words, and what it is."""

    words: str
    meaning: str
    is_share: bool = False  # shown in percent


MEASURES = {
    "subject": Named(
        "likeness to the subject", "mean cosine with photos of it, or with a bundled subject's renderings"
    ),
    "right": Named("prompts followed", "share of the pictures that show everything the prompt names", True),
    "prompt": Named("fit to the prompts", "mean cosine of each picture with its prompt"),
    "drift": Named("change of unrelated pictures", "1 less their mean cosine with the base's own, 0 is none"),
    "preservation": Named(
        "likeness of the class to the subject", "mean cosine of pictures of its class, best as low as the base's"
    ),
    "diversity": Named("difference of pictures of one prompt", "1 less their mean cosine, 0 is none"),
}
FIXED_LOSS = Named("loss on fixed noise", "mean squared error on noises and timesteps that the seed fixes")

Table = tuple[list[str], list[list[str]]]  # head, rows; the first of each is what the row is called


def number(value: Any, is_share: bool = False) -> str:
    """A measured value for people, a share in percent; "" where nothing was measured."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return f"{value:.1%}" if is_share else f"{value:.3f}"


def table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """The measures that any of `rows`, (what it is called, measure -> value), has, by their names."""
    names = [name for name in MEASURES if any(number(values.get(name)) for _, values in rows)]
    return ["", *names], [
        [label, *(number(values.get(name), MEASURES[name].is_share) for name in names)] for label, values in rows
    ]


def in_words(head: Sequence[str]) -> list[str]:
    """The head of a `table` with words instead of names."""
    return [MEASURES[name].words if name in MEASURES else name for name in head]


def as_text(table: Table) -> list[str]:
    """The lines of a `table` for a terminal, and below it what its measures are."""
    head, rows = table
    width = max(len(row[0]) for row in rows) + 2
    lines = [f"{first:{width}}" + "".join(f"{cell:>14}" for cell in others) for first, *others in [head, *rows]]
    return lines + [f"{name}: {MEASURES[name].words}: {MEASURES[name].meaning}" for name in head[1:]]
