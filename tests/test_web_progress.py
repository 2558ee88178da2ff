"""How far a run is, told from its events."""

import json

from svfit_dreambooth.web.rooms.progress import sum_up


def test_progress_of_a_resumed_run_reads_as_one(tmp_path):
    events = [
        {"event": "start", "step": 0, "of": 4},
        {"event": "step", "step": 1, "of": 4, "loss": 0.5, "seconds": 2.0},
        {"event": "step", "step": 2, "of": 4, "loss": 0.4, "seconds": 4.0},
        {"event": "pictures", "step": 2, "path": "../../etc/passwd"},
        {"event": "start", "step": 1, "of": 4, "resumed": True},
        {"event": "step", "step": 2, "of": 4, "loss": 0.3, "seconds": 2.0},
        {"event": "unheard of", "step": 2},
    ]
    end = {"event": "end", "step": 4, "status": "finished", "kept_step": 3, "time": 160.0}
    (tmp_path / "progress.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"event": "st')
    state = sum_up(tmp_path)
    assert state.losses == [(1, 0.5), (2, 0.3)] and (state.step, state.of) == (2, 4)
    assert state.seconds_a_step == 2.0 and state.seconds_left == 4.0 and state.pictures == [] and state.status is None
    (tmp_path / "progress.jsonl").write_text("\n".join(map(json.dumps, [*events, end])))
    assert sum_up(tmp_path).kept_step == 3 and state.kept_step is None
    assert sum_up(tmp_path).seconds is None  # not in one go
    at_once = [{"event": "start", "step": 0, "of": 2, "time": 100.0}, *events[1:3], end]
    (tmp_path / "progress.jsonl").write_text("\n".join(map(json.dumps, at_once)))
    assert sum_up(tmp_path).seconds == 60.0
    resumed = [at_once[0], events[1], {**events[2], "seconds": 1.0}, end]  # a run that goes on counts from 0 again
    (tmp_path / "progress.jsonl").write_text("\n".join(map(json.dumps, resumed)))
    assert sum_up(tmp_path).seconds is None


def test_time_left_counts_looks_and_the_end_and_phases_are_named(tmp_path):
    def told(*events):
        (tmp_path / "progress.jsonl").write_text("\n".join(map(json.dumps, events)))
        return sum_up(tmp_path)

    def step(number, seconds):
        return {"event": "step", "step": number, "of": 10, "loss": 0.5, "seconds": seconds}

    def look(number):
        return {"event": "measure", "step": number, "fixed_loss": 0.4}

    start = {"event": "start", "step": 0, "of": 10, "time": 0.0}
    phase = {"event": "phase", "doing": "decomposing the base", "step": 0}
    assert told(start, phase).doing == "decomposing the base" and told(start, phase).seconds_left is None
    first = [start, phase, look(0), step(1, 1.0), step(2, 2.0)]
    state = told(*first)
    assert state.doing is None and state.seconds_left == 8.0 and not state.knows_looks
    state = told(*first, step(3, 3.0), look(3), step(4, 24.0), step(5, 25.0))  # the look took 20 s
    assert state.knows_looks and (state.seconds_a_step, state.seconds_a_look) == (1.0, 20.0)
    assert state.seconds_left == 5 * 1.0 + (2 + 1) * 20.0  # looks at 6 and 9, and one at the end
    assert told(*first, {"event": "phase", "doing": "painting the result", "step": 10}).doing == "painting the result"
