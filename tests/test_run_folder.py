"""The folder of a run: lock, diary, and what an earlier run left."""

import os
import signal
import time

import pytest

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import write_atomically
from svfit_dreambooth.training.journal import append_progress, lock_run, read_progress, rewind_progress, set_aside


def test_the_lock_dies_with_its_process(tmp_path):
    child = os.fork()
    if child == 0:
        with lock_run(tmp_path):
            (tmp_path / "locked").touch()
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "locked").exists():
        time.sleep(0.01)
    with pytest.raises(SVFitError, match="another run is writing into"), lock_run(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with lock_run(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SVFitError, match="cannot be written"), lock_run(tmp_path / "file" / "run"):
        pass


def test_progress_survives_a_line_cut_short(tmp_path):
    assert read_progress(tmp_path) == []
    append_progress(tmp_path, "step", step=1, loss=0.5)
    append_progress(tmp_path, "note", text="ünïcode")
    with open(tmp_path / "progress.jsonl", "a") as lines:
        lines.write('{"event": "step", "st')
    assert read_progress(tmp_path) == [{"event": "step", "step": 1, "loss": 0.5}, {"event": "note", "text": "ünïcode"}]


def test_rewinding_takes_back_later_events_and_the_end(tmp_path):
    for step in (1, 2, 3):
        append_progress(tmp_path, "step", step=step)
    append_progress(tmp_path, "end", step=2)
    rewind_progress(tmp_path, 2)
    assert [event["step"] for event in read_progress(tmp_path)] == [1, 2]


def test_an_earlier_run_is_moved_whole(tmp_path):
    assert set_aside(tmp_path, "cat") is None
    for number in (1, 2):
        append_progress(tmp_path, "start", step=0, adapter_name="dog")
        for name in ("dog.safetensors", "dog-kohya.safetensors", "dog.png"):
            (tmp_path / name).write_bytes(bytes([number]))
        (tmp_path / "checkpoints").mkdir()
        target = set_aside(tmp_path, "cat")
        assert target == tmp_path / "earlier" / f"00{number}"
        assert (target / "dog.safetensors").read_bytes() == bytes([number]) and (target / "checkpoints").is_dir()
        assert [path.name for path in tmp_path.iterdir()] == ["earlier"]


def test_what_no_run_made_stays_where_it_is(tmp_path):
    mine = ["base.safetensors", "holiday.png", "checkpoints"]
    (tmp_path / "checkpoints").mkdir()
    for name in (*mine[:2], "dog.safetensors", "config.yaml"):
        (tmp_path / name).write_text("mine")
    target = set_aside(tmp_path, "dog")  # no run was here, but this one would replace two of them
    assert sorted(path.name for path in target.iterdir()) == ["config.yaml", "dog.safetensors"]
    assert all((tmp_path / name).exists() for name in mine)
    append_progress(tmp_path, "start", step=0, adapter_name="../dog")
    set_aside(tmp_path, "dog")
    assert all((tmp_path / name).exists() for name in mine[:2])


def test_a_file_that_is_still_read_is_copied(tmp_path):
    path = tmp_path / "dog.safetensors"
    path.write_text("the first")
    target = set_aside(tmp_path, "dog", keep=path)
    assert path.read_text() == (target / path.name).read_text() == "the first"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "new" / "file.txt", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("svfit_dreambooth.files.os.fsync", full)
    with pytest.raises(SVFitError, match=r"file.txt' can't be written \(No space left on device\)"):
        write_atomically(path, b"new")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
