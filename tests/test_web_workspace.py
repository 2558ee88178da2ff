"""The page's folder: visitors, names of files, and what the web server hands out."""

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from web_stand_ins import until

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms import workspace as workspace_files
from svfit_dreambooth.web.rooms.jobs import Jobs
from svfit_dreambooth.web.rooms.queue import Queue
from svfit_dreambooth.web.rooms.workspace import Workspace, serve


@pytest.mark.parametrize("word", ["", "../../etc", "0" * 31, "G" * 32, "0" * 32 + "/.."])
def test_a_visitor_is_never_a_path(workspace, word):
    with pytest.raises(SVFitError, match="no valid visitor"):
        workspace.visitor(word)


def test_served_files_have_names_that_nobody_guesses(workspace, tmp_path):
    file = tmp_path / "dog.png"
    file.write_bytes(b"picture")
    served = serve(workspace, file)
    assert served == serve(workspace, file) and Path(served).read_bytes() == b"picture"
    other = Workspace(tmp_path / "other")
    assert os.path.relpath(served, workspace.served) != os.path.relpath(serve(other, file), other.served)
    assert (workspace.folder / "secret").stat().st_mode & 0o077 == 0


def test_what_nobody_asks_for_is_served_no_longer(workspace, tmp_path, monkeypatch):
    files = [tmp_path / "old.png", tmp_path / "asked.png"]
    for file in files:
        file.write_bytes(b"picture")
    old, asked = (Path(serve(workspace, file)) for file in files)
    made = workspace_files.place_to_serve(workspace, "lora.safetensors")
    made.write_bytes(b"weights")
    (workspace.served / "half an upload").touch()
    Queue(Jobs(workspace)).tend()
    assert old.exists() and asked.exists() and made.exists()
    until(lambda: serve(workspace, files[1]) and asked.stat().st_ctime > made.stat().st_ctime)
    last = asked.stat().st_ctime + workspace_files.SERVED_SECONDS
    monkeypatch.setattr(workspace_files, "time", SimpleNamespace(time=lambda: last))
    Queue(Jobs(workspace)).tend()
    assert asked.exists() and list(workspace.served.iterdir()) == [asked.parent]
    assert all(file.exists() for file in files) and Path(serve(workspace, files[0])).exists()
    (workspace.served / "half an upload").touch()
    last = time.time() + workspace_files.SERVED_SECONDS + 1
    Queue(Jobs(workspace)).tend()
    assert list(workspace.served.iterdir()) == []


def test_a_disk_without_links_serves_and_imports(workspace, tmp_path, dog_adapter, monkeypatch):
    def link(source, target, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    served = serve(workspace, dog_adapter)
    assert Path(served).read_bytes() == dog_adapter.read_bytes() and served == serve(workspace, dog_adapter)
    word = (workspace.folder / "secret").read_text()
    assert len(word) == 64 and (workspace.folder / "secret").stat().st_mode & 0o077 == 0
    folder = tmp_path / "adapters"
    assert [library.add(folder, dog_adapter) for _ in range(2)] == ["dog", "dog-2"]
    assert (folder / "dog-2.safetensors").read_bytes() == dog_adapter.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["dog-2.safetensors", "dog.safetensors"]
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    assert not workspace_files.place(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old" and not (tmp_path / "new").exists()
