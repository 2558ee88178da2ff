"""The folder of a run: lock, diary, and what an earlier run left."""

import os
import signal
import time

import pytest

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import write_atomically
from svfit_dreambooth.training.events import End, Painted, Start, Stepped
from svfit_dreambooth.training.journal import RunFolder


def test_the_lock_dies_with_its_process(tmp_path):
    child = os.fork()
    if child == 0:
        with RunFolder(tmp_path).locked():
            (tmp_path / "locked").touch()
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "locked").exists():
        time.sleep(0.01)
    with pytest.raises(SVFitError, match="another run is writing into"), RunFolder(tmp_path).locked():
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with RunFolder(tmp_path).locked():
        pass


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SVFitError, match="cannot be written"), RunFolder(tmp_path / "file" / "run").locked():
        pass


def test_progress_survives_a_line_cut_short(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.events() == [] and folder.adapter_name is None
    folder.note(Stepped(1, 5, loss=0.5))
    folder.note(Start(adapter_name="ünïcode"))
    with open(folder.progress, "a") as lines:
        lines.write('{"event": "step", "st')
    assert folder.events() == [Stepped(1, 5, loss=0.5), Start(adapter_name="ünïcode")]
    assert folder.adapter == tmp_path / "ünïcode.safetensors"


def test_rewinding_takes_back_later_events_pictures_and_the_end(tmp_path):
    folder = RunFolder(tmp_path)
    folder.looks.mkdir()
    (folder.looks / "step_mine.png").touch()
    for step in (1, 2, 3):
        folder.note(Stepped(step))
        folder.look(step).touch()
        folder.look_adapter(step).touch()
    folder.note(Painted(3, "validation/step_000003.png"))
    folder.note(End(step=2))
    folder.rewind(2)
    assert folder.events() == [Stepped(1), Stepped(2)]
    assert {path.name for path in folder.looks.iterdir()} == {
        "step_000001.png", "step_000002.png", "step_mine.png", "step_000001.safetensors", "step_000002.safetensors",
    }  # fmt: skip


def test_what_killed_runs_left_half_written_is_taken_away(tmp_path):
    left = [tmp_path / ".svfit-0123.tmp", tmp_path / "checkpoints" / ".svfit-4567.tmp", tmp_path / ".reserve"]
    (tmp_path / "checkpoints").mkdir()
    for path in (*left, tmp_path / "mine.tmp"):
        path.touch()
    with RunFolder(tmp_path).locked():
        assert not any(path.exists() for path in left[:2]) and (tmp_path / "mine.tmp").exists()
    assert not left[2].exists()


def test_a_full_disk_is_emptied_of_what_can_be_made_again_and_of_nothing_else(tmp_path):
    folder = RunFolder(tmp_path, "dog")
    for path in (folder.checkpoints, folder.looks):
        path.mkdir()
    mine = [folder.checkpoints / "mine", folder.looks / "mine.png", tmp_path / "photo.png", folder.progress]
    own = [folder.checkpoints / f"step-00000{step}.safetensors" for step in (1, 2, 3)]
    looks = [folder.look(1), folder.look_adapter(1), folder.looks_sheet]
    for number, path in enumerate([*mine, *own, folder.reserve, *looks]):
        path.touch()
        os.utime(path, (number, number))
    freed = []
    while folder.make_room():
        freed.append([path for path in (folder.reserve, *own, *looks) if path.exists()])
    assert freed == [[*own, *looks], [own[-1], *looks], [own[-1]]]  # the reserve goes first
    assert all(path.exists() for path in mine)


def test_an_earlier_run_is_moved_whole(tmp_path):
    assert RunFolder(tmp_path, "cat").set_aside() is None
    for number in (1, 2):
        dog = RunFolder(tmp_path, "dog")
        dog.note(Start(adapter_name="dog"))
        for path in (dog.adapter, dog.lora("kohya"), dog.sheet):
            path.write_bytes(bytes([number]))
        dog.checkpoints.mkdir()
        target = RunFolder(tmp_path, "cat").set_aside()
        assert target == tmp_path / "earlier" / f"00{number}"
        assert (target / "dog.safetensors").read_bytes() == bytes([number]) and (target / "checkpoints").is_dir()
        assert [path.name for path in tmp_path.iterdir()] == ["earlier"]


def test_what_no_run_made_stays_where_it_is(tmp_path):
    mine = ["base.safetensors", "holiday.png", "checkpoints"]
    (tmp_path / "checkpoints").mkdir()
    for name in (*mine[:2], "dog.safetensors", "config.yaml"):
        (tmp_path / name).write_text("mine")
    folder = RunFolder(tmp_path, "dog")
    target = folder.set_aside()  # no run was here, but this one would replace two of them
    assert sorted(path.name for path in target.iterdir()) == ["config.yaml", "dog.safetensors"]
    assert all((tmp_path / name).exists() for name in mine)
    folder.note(Start(adapter_name="../dog"))
    folder.set_aside()
    assert all((tmp_path / name).exists() for name in mine[:2])


def test_a_file_that_is_still_read_is_copied(tmp_path):
    path = tmp_path / "dog.safetensors"
    path.write_text("the first")
    target = RunFolder(tmp_path, "dog").set_aside(keep=path)
    assert path.read_text() == (target / path.name).read_text() == "the first"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "new" / "file.txt", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("svfit_dreambooth.files.os.fsync", full)
    with pytest.raises(SVFitError, match=r"file.txt' can't be written \(No space left on device\)"):
        write_atomically(path, b"new")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
