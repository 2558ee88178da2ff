"""The queue of training runs: turns, stops, restarts of the server, results."""

import errno
import json
import os
import signal
import time

import pytest
from web_stand_ins import submit, until

from svfit_dreambooth import read_adapter, save_adapter
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms import jobs as jobs_room
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms import queue as room
from svfit_dreambooth.web.rooms.bases import Bases
from svfit_dreambooth.web.rooms.job import changing, read_job
from svfit_dreambooth.web.rooms.jobs import MAX_QUEUED_EACH, Jobs
from svfit_dreambooth.web.rooms.laid_out import add_photos
from svfit_dreambooth.web.rooms.progress import sum_up
from svfit_dreambooth.web.rooms.queue import Queue
from svfit_dreambooth.web.rooms.workspace import Workspace


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A function that puts a repository's model_index.json into an otherwise empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repository):
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        for path in (folder / "refs" / "main", folder / "snapshots" / "abc" / "model_index.json"):
            path.parent.mkdir(parents=True)
            path.write_text("abc")

    return put


def test_runs_wait_for_each_other_and_survive_the_server(workspace, visitor, photo_folder, command):
    server = Jobs(workspace)
    queue = Queue(server)
    first, second = (submit(server, visitor, photo_folder, name) for name in ("first", "second"))
    queue.tend()
    queue.tend()
    assert (server.state(first), server.state(second), server.ahead(second)) == ("running", "queued", 1)
    until(lambda: sum_up(server.run_folder(first)).step == 3)

    restarted = Jobs(workspace)  # knows nothing but the folder

    queue = Queue(restarted)
    queue.tend()
    assert [restarted.state(job) for job in (first, second)] == ["running", "queued"]
    with pytest.raises(SVFitError, match="first is running"):
        restarted.remove(first)
    (workspace.jobs / first.id / "go").touch()
    until(lambda: restarted.state(first) == "finished")
    queue.tend()
    assert restarted.find(visitor, first.id).library_name == "first" and library.names(visitor.library) == ["first"]
    until(lambda: sum_up(restarted.run_folder(second)).step == 3)
    restarted.stop(restarted.find(visitor, second.id))
    until(lambda: restarted.state(restarted.find(visitor, second.id)) == "stopped")


def test_a_stopped_run_goes_on_and_replaces_its_result(workspace, visitor, photo_folder, command):
    server = Jobs(workspace)
    queue = Queue(server)
    job = submit(server, visitor, photo_folder)
    queue.tend()
    until(lambda: sum_up(server.run_folder(job)).step == 3)
    server.stop(job)
    until(lambda: server.state(job) == "stopped")
    queue.tend()
    server.resume(server.find(visitor, job.id))
    assert server.state(server.find(visitor, job.id)) == "queued"
    (workspace.jobs / job.id / "go").touch()
    queue.tend()
    until(lambda: server.state(server.find(visitor, job.id)) == "finished")
    queue.tend()
    state = sum_up(server.run_folder(job))
    assert [step for step, _ in state.losses] == [1, 2, 3, 4, 5, 6] and state.status == "finished"
    assert library.names(visitor.library) == ["dog"]
    (server.run_folder(job) / "progress.jsonl").unlink()  # which is not read every second for ever
    assert server.state(server.find(visitor, job.id)) == "finished"
    assert "--resume_from_checkpoint" not in (workspace.jobs / job.id / "job.yaml").read_text()


def test_a_run_finds_its_adapter_under_a_new_name_and_leaves_alone_what_has_taken_the_old_one(
    workspace, visitor, photo_folder, command, dog_adapter, tmp_path
):
    server = Jobs(workspace)
    queue = Queue(server)
    job = submit(server, visitor, photo_folder)
    queue.tend()
    until(lambda: sum_up(server.run_folder(job)).step == 3)
    server.stop(job)
    until(lambda: queue.tend() or server.find(visitor, job.id).library_name == "dog")
    assert server.result(server.find(visitor, job.id)) == visitor.library / "dog.safetensors"
    library.rename(visitor.library, "dog", "Bello")
    other = read_adapter(dog_adapter)
    other.title = "somebody else's"
    library.add(visitor.library, save_adapter(other, tmp_path / "dog.safetensors"))
    assert server.result(server.find(visitor, job.id)) == visitor.library / "Bello.safetensors"
    theirs = (visitor.library / "dog.safetensors").read_bytes()
    server.resume(server.find(visitor, job.id))
    (workspace.jobs / job.id / "go").touch()
    until(lambda: queue.tend() or server.find(visitor, job.id).filed == 2)
    assert (visitor.library / "dog.safetensors").read_bytes() == theirs
    assert server.result(server.find(visitor, job.id)) == visitor.library / "Bello.safetensors"
    library.delete(visitor.library, "Bello")
    assert server.result(server.find(visitor, job.id)) is None


def test_a_killed_run_is_told_from_a_failed_one(workspace, visitor, photo_folder, command):
    server = Jobs(workspace)
    queue = Queue(server)
    killed = submit(server, visitor, photo_folder)
    queue.tend()
    until(lambda: sum_up(server.run_folder(killed)).step == 3)
    os.kill(server.find(visitor, killed.id).pid, signal.SIGKILL)
    until(lambda: server.state(server.find(visitor, killed.id)) == "cut off")
    failed = submit(server, visitor, photo_folder, instance_prompt="bad")
    until(lambda: queue.tend() or server.state(server.find(visitor, failed.id)) == "failed")
    assert server.complaint(failed) == "these words do not work: use others."


def test_a_full_disk_stops_no_other_run_and_loses_nothing(
    workspace, visitor, photo_folder, command, monkeypatch, capsys
):
    server, place = Jobs(workspace), library.place
    queue = Queue(server)
    jobs_ = [submit(server, visitor, photo_folder, name) for name in ("full", "other")]
    for job in jobs_:
        (workspace.jobs / job.id / "go").touch()

    def full(temporary, target):
        if target.stem == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        return place(temporary, target)

    monkeypatch.setattr(library, "place", full)
    until(lambda: queue.tend() or server.find(visitor, jobs_[1].id).library_name == "other")
    assert server.state(jobs_[0]) == "finished" and server.find(visitor, jobs_[0].id).library_name is None
    assert capsys.readouterr().err.count("No space left") == 1  # not every second
    monkeypatch.setattr(library, "place", place)
    queue._rests.clear()  # a minute later
    queue.tend()
    assert server.find(visitor, jobs_[0].id).library_name == "full"
    assert sorted(library.names(visitor.library)) == ["full", "other"]


def test_strangers_see_neither_runs_nor_results(tmp_path, photo_folder, command):
    workspace = Workspace(tmp_path / "home", shared=False)
    mine, theirs = workspace.visitor("a" * 32), workspace.visitor("b" * 32)
    server = Jobs(workspace)
    queue = Queue(server)
    job = submit(server, mine, photo_folder)
    (workspace.jobs / job.id / "go").touch()
    until(lambda: queue.tend() or server.find(mine, job.id).library_name == "dog")
    assert (
        server.listed(theirs) == [] and library.names(theirs.library) == [] and library.names(mine.library) == ["dog"]
    )
    with pytest.raises(SVFitError, match="no such run"):
        server.find(theirs, job.id)


def test_a_removed_run_comes_back_to_its_owner(tmp_path, photo_folder, command):
    workspace = Workspace(tmp_path / "home", shared=False)
    mine, theirs = workspace.visitor("a" * 32), workspace.visitor("b" * 32)
    server = Jobs(workspace)
    job = submit(server, mine, photo_folder)
    before = sorted(path.name for path in (workspace.jobs / job.id).rglob("*"))
    server.remove(job)
    assert server.listed(mine) == []
    for visitor, id in ((theirs, job.id), (mine, "../home"), (mine, "")):
        with pytest.raises(SVFitError, match="gone for good"):
            server.restore(visitor, id)
    server.restore(mine, job.id)
    assert server.state(server.find(mine, job.id)) == "queued"
    assert sorted(path.name for path in (workspace.jobs / job.id).rglob("*")) == before
    server.remove(job)
    server.empty_trash()
    server.restore(mine, job.id)  # it was kept
    server.remove(job)
    os.utime(workspace.jobs / ".deleted" / job.id, (0, 0))
    server.empty_trash()
    with pytest.raises(SVFitError, match="gone for good"):
        server.restore(mine, job.id)


def test_trash_of_all_visitors_is_emptied_every_day(tmp_path, dog_adapter, monkeypatch):
    workspace = Workspace(tmp_path / "home", shared=False)
    folders = [workspace.visitor(letter * 32).library for letter in "ab"] + [workspace.folder / "adapters"]
    server = Jobs(workspace)
    queue = Queue(server)

    def delete(days):
        for folder in folders:
            library.add(folder, dog_adapter)
            token = library.delete(folder, "dog")
            os.utime(folder / ".deleted" / token, (time.time() - days * 24 * 3600,) * 2)

    def left():
        return [len(list((folder / ".deleted").iterdir())) for folder in folders]

    delete(31)
    delete(29)
    queue.tend()
    assert left() == [1, 1, 1]
    delete(31)
    queue.tend()
    assert left() == [2, 2, 2]  # not every second
    tomorrow = time.monotonic() + 24 * 3600
    monkeypatch.setattr(room.time, "monotonic", lambda: tomorrow)
    queue.tend()
    assert left() == [1, 1, 1]


def test_what_no_run_could_use_is_refused_before_it_waits(workspace, visitor, photo_folder):
    server = Jobs(workspace)
    with pytest.raises(SVFitError, match="no photos yet"):
        server.submit(visitor, "dog", {"instance_prompt": "a photo of sks dog"})
    with pytest.raises(SVFitError, match="rank is 'many'"):
        submit(server, visitor, photo_folder, rank="many")
    assert server.listed(visitor) == [] and not list(workspace.jobs.glob("[0-9]*"))


def test_a_run_asks_for_room_before_it_starts(workspace, visitor, photo_folder, command, monkeypatch):
    asked = []
    monkeypatch.setattr(room, "devices", lambda: ["3", "5"])
    server = Jobs(workspace)
    queue = Queue(server, make_room=lambda: asked.append(server.find(visitor, job.id).started))
    job = submit(server, visitor, photo_folder)
    queue.tend()
    other = submit(server, visitor, photo_folder)  # on the other device
    queue.tend()
    assert asked == [0] and server.state(other) == "running"
    for each in (job, other):
        server.stop(each)
        until(lambda each=each: server.state(each) == "stopped")


def test_a_stranger_downloads_nothing_by_training(workspace, visitor, photo_folder, hub_cache, command, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, repository, revision, timeout: None)
    bases = Bases(workspace.models, ("owner/offered",), download=False)
    assert bases.resolve_for_run("owner/offered") == ("owner/offered", None)
    assert Bases(workspace.models).resolve_for_run("stranger/model@v1") == ("stranger/model", "v1")
    for name in ("stranger/model", "stranger/model@v1", "a--b/c"):
        with pytest.raises(SVFitError, match=f"^{name} is not on this disk, and downloads are off here"):
            bases.resolve_for_run(name)
    hub_cache("stranger/model")
    assert bases.resolve_for_run("stranger/model") == ("stranger/model", None)
    server = Jobs(workspace)
    queue = Queue(server, bases.offline)
    for base, offline in (("stranger/model", "1"), ("owner/offered", None), ("toybox", None)):
        job = submit(server, visitor, photo_folder, pretrained_model_name_or_path=base)
        (workspace.jobs / job.id / "go").touch()
        until(lambda job=job: queue.tend() or server.state(job) == "finished")
        lines = (server.run_folder(job) / "progress.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["offline"] == offline


def test_a_run_that_is_asked_for_again_is_the_same_run(workspace, visitor, photo_folder, command):
    from concurrent.futures import ThreadPoolExecutor

    server = Jobs(workspace)
    queue = Queue(server)
    job = submit(server, visitor, photo_folder)
    options = {"pretrained_model_name_or_path": "toybox", "instance_prompt": "a photo of sks dog"}
    with ThreadPoolExecutor(6) as clicks:
        ids = {again.id for again in clicks.map(lambda _: server.submit(visitor, "dog", options), range(6))}
    assert ids == {job.id} and len(server.listed(visitor)) == 1
    queue.tend()
    assert server.submit(visitor, "dog", options).id == job.id  # it runs
    others = [server.submit(visitor, *ask).id for ask in (("mug", options), ("dog", options | {"seed": 1}))]
    add_photos(visitor.photos, sorted(photo_folder.glob("*.png"))[1:2])
    others.append(server.submit(visitor, "dog", options).id)
    assert len({job.id, *others}) == 4
    (workspace.jobs / job.id / "go").touch()
    until(lambda: server.state(server.find(visitor, job.id)) == "finished")
    assert server.submit(visitor, "dog", options).id == others[-1]


def test_runs_of_many_take_turns_and_limits_meet_a_person(tmp_path, photo_folder, command, monkeypatch):
    workspace = Workspace(tmp_path / "home", shared=False)
    cookies = [workspace.visitor(letter * 32, "one network") for letter in "abc"]
    other = workspace.visitor("d" * 32, "another network")
    server = Jobs(workspace)
    queue = Queue(server)
    mine = [submit(server, cookies[i % 3], photo_folder, f"mine-{i}") for i in range(MAX_QUEUED_EACH)]
    with pytest.raises(SVFitError, match=f"{MAX_QUEUED_EACH} of your runs are waiting already"):
        submit(server, cookies[2], photo_folder, "one more")
    theirs = [submit(server, other, photo_folder, f"theirs-{i}") for i in range(2)]
    assert [job.name for job in server.in_turn()][:4] == ["mine-0", "theirs-0", "mine-1", "theirs-1"]
    assert [server.ahead(job) for job in theirs] == [1, 3]
    started = []
    for _ in range(4):
        queue.tend()
        (job,) = [job for job in server.all() if server.is_alive(job)]
        started.append(job.name)
        (workspace.jobs / job.id / "go").touch()
        until(lambda job=job: not server.is_alive(read_job(workspace.jobs / job.id)))
    assert started == ["mine-0", "theirs-0", "mine-1", "theirs-1"]
    monkeypatch.setattr(jobs_room, "MAX_QUEUED_ALL", len(mine) - 2)
    with pytest.raises(SVFitError, match="3 runs are waiting already: try again"):
        submit(server, other, photo_folder, "too many")


def test_a_run_of_a_server_that_went_down_at_the_wrong_moment_is_found_again(workspace, visitor, photo_folder, command):
    server = Jobs(workspace)
    queue = Queue(server)
    job = submit(server, visitor, photo_folder)
    queue.tend()
    pid = server.find(visitor, job.id).pid
    with changing(workspace.jobs / job.id) as now:
        now.pid, now.process_created, now.started = None, None, 0
    assert server.state(job) == "queued"
    Queue(server).tend()
    assert server.state(job) == "running" and server.find(visitor, job.id).pid == pid
    with changing(workspace.jobs / job.id) as now:
        now.process_created -= 3600  # the clock was set
    assert server.state(job) == "running"
    server.stop(job)
    until(lambda: server.state(job) == "stopped")
