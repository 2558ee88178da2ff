"""What happens in a run, as lines that are read back."""

import json

import pytest

from svfit_dreambooth.training.events import (
    End,
    Measured,
    Painted,
    Phase,
    Saved,
    Start,
    Stepped,
    WentBack,
    from_line,
    to_line,
)

EVENTS = [
    Start(100.0, 0, 8, "dog \udcff", "toybox", 624),
    Phase("painting class pictures", 101.5),
    Stepped(1, 8, 0.5, 0.05, prior_loss=None, seconds=2.25),
    Measured(2, fixed_loss=0.5, subject=0.75),
    Painted(2, "validation/step_000002.png"),
    Saved(2, "checkpoints/step-000002.safetensors"),
    WentBack(2, "the loss is nan at step 3", 0.025),
    End("finished", 107.0, 8, None, 6, "dog.safetensors", "dog.png", {"base": {"subject": 0.5, "drift": None}}),
]


@pytest.mark.parametrize("event", EVENTS, ids=[event.name for event in EVENTS])
def test_events_read_back_as_they_were_written(event):
    line = to_line(event)
    assert from_line(line) == event and json.loads(line)["event"] == event.name and "\n" not in line
    line.encode("utf-8")  # also where a name holds what is no text
    assert from_line(json.dumps({**json.loads(line), "of a later version": 1})) == event


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "{}",
        '{"event": ["step"]}',
        '{"event": "unheard of", "step": 1}',
        '{"event": "step"}',
        '{"event": "step", "step": "1"}',
        '{"event": "step", "step": true}',
        '{"event": "end", "figures": {"base": 3}}',
        '{"event": "step", "step": 1, "lo',
    ],
)
def test_lines_that_are_no_event_are_none(line):
    assert from_line(line) is None
