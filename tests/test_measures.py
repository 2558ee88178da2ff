"""Names of the measures, and the one table of them."""

import dataclasses

from svfit_dreambooth.evaluation.measures import MEASURES, as_text, in_words, number, table
from svfit_dreambooth.evaluation.protocol import Scores


def test_every_score_has_its_words():
    assert list(MEASURES) and set(MEASURES) == {field.name for field in dataclasses.fields(Scores)}


def test_numbers_that_were_not_measured_are_empty():
    values = [0.1234, 1, None, float("nan"), float("inf"), "0.5", -0.25]
    assert [number(value) for value in values] == ["0.123", "1.000", "", "", "", "", "-0.250"]


def test_a_table_has_the_measures_that_any_row_has():
    head, rows = table([("base", {"drift": 0.0, "loss": 3.0}), ("dog", {"subject": 0.5, "drift": 0.25, "right": None})])
    assert head == ["", "subject", "drift"]
    assert rows == [["base", "", "0.000"], ["dog", "0.500", "0.250"]]
    assert in_words(head) == ["", "likeness to the subject", "change of unrelated pictures"]


def test_text_for_a_terminal_stands_in_columns_and_says_what_they_are():
    first, base, dog, *legend = as_text(
        table([("base", {"drift": 0.0}), ("my long dog", {"drift": 0.25, "right": 1.0})])
    )
    assert len(first) == len(base) == len(dog) and dog.index("0.250") + 5 == first.index("drift") + 5
    assert [line.split(":")[0] for line in legend] == ["right", "drift"]


def test_shares_are_told_in_percent():
    assert table([("adapter", {"subject": 0.5, "right": 6 / 7})])[1] == [["adapter", "0.500", "85.7%"]]
