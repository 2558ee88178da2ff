"""What stands behind the page, without a browser: uploads, library, queue, and the base that paints."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from svfit_dreambooth import TrainConfig, read_adapter, save_adapter, train
from svfit_dreambooth.adapter import file as adapter
from svfit_dreambooth.adapter.describe import annotate_adapter
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.generate import free_path, save_picture
from svfit_dreambooth.training.journal import read_progress
from svfit_dreambooth.web.rooms import jobs, library, pictures
from svfit_dreambooth.web.rooms import launch as process
from svfit_dreambooth.web.rooms import studio as web_studio
from svfit_dreambooth.web.rooms import workspace as workspace_files
from svfit_dreambooth.web.rooms.bases import Bases
from svfit_dreambooth.web.rooms.jobs import Jobs
from svfit_dreambooth.web.rooms.laid_out import add_photos
from svfit_dreambooth.web.rooms.progress import sum_up
from svfit_dreambooth.web.rooms.studio import AS_TRAINED, Order, Studio, working_dtype
from svfit_dreambooth.web.rooms.workspace import Workspace, file_name, serve

SIZE = {"num_inference_steps": 2, "width": 16, "height": 16}


@pytest.fixture(scope="module")
def adapter_path(tiny_base, photo_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(
        pretrained_model_name_or_path=str(tiny_base), instance_data_dir=str(photo_folder), output_dir=str(folder),
        instance_prompt="a photo of sks dog", max_train_steps=4, resolution=16, learning_rate=0.5,
        fixed_loss_examples=0, final_pictures=False, adapter_name="dog",
    )  # fmt: skip
    return train(config).adapter_path


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "home")


@pytest.fixture
def visitor(workspace):
    return workspace.visitor("0" * 32)


# ---------------------------------------------------------------- uploads


@pytest.mark.parametrize("word", ["", "../../etc", "0" * 31, "G" * 32, "0" * 32 + "/.."])
def test_a_visitor_is_never_a_path(workspace, word):
    with pytest.raises(SVFitError, match="no valid visitor"):
        workspace.visitor(word)


@pytest.mark.parametrize(
    ("text", "name"),
    [("my dog", "my-dog"), ("../../etc/passwd", "etc-passwd"), (".hidden", "hidden"), ("Höhle", "Höhle")],
)
def test_names_are_names_of_files(text, name):
    assert file_name(text) == name
    with pytest.raises(SVFitError, match="no letters or digits"):
        file_name("../..")


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
    Jobs(workspace).tend()
    assert old.exists() and asked.exists() and made.exists()
    until(lambda: serve(workspace, files[1]) and asked.stat().st_ctime > made.stat().st_ctime)
    last = asked.stat().st_ctime + workspace_files.SERVED_SECONDS
    monkeypatch.setattr(workspace_files, "time", SimpleNamespace(time=lambda: last))
    Jobs(workspace).tend()
    assert asked.exists() and list(workspace.served.iterdir()) == [asked.parent]
    assert all(file.exists() for file in files) and Path(serve(workspace, files[0])).exists()
    (workspace.served / "half an upload").touch()
    last = time.time() + workspace_files.SERVED_SECONDS + 1
    Jobs(workspace).tend()
    assert list(workspace.served.iterdir()) == []


def test_a_disk_without_links_serves_and_imports(workspace, tmp_path, adapter_path, monkeypatch):
    def link(source, target, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    served = serve(workspace, adapter_path)
    assert Path(served).read_bytes() == adapter_path.read_bytes() and served == serve(workspace, adapter_path)
    word = (workspace.folder / "secret").read_text()
    assert len(word) == 64 and (workspace.folder / "secret").stat().st_mode & 0o077 == 0
    folder = tmp_path / "adapters"
    assert [library.add(folder, adapter_path) for _ in range(2)] == ["dog", "dog-2"]
    assert (folder / "dog-2.safetensors").read_bytes() == adapter_path.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["dog-2.safetensors", "dog.safetensors"]
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    assert not workspace_files.place(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old" and not (tmp_path / "new").exists()


# ---------------------------------------------------------------- library


def test_library_renames_deletes_and_brings_back(tmp_path, adapter_path):
    folder = tmp_path / "adapters"
    assert library.add(folder, adapter_path) == "dog"
    assert library.add(folder, adapter_path) == "dog-2"
    Image.new("RGB", (4, 4)).save(folder / "dog.png")
    assert library.rename(folder, "dog", "Bello!") == "Bello"
    assert (folder / "Bello.png").is_file() and sorted(library.names(folder)) == ["Bello", "dog-2"]
    with pytest.raises(SVFitError, match="an adapter called 'bello' already"):
        library.rename(folder, "dog-2", "bello")
    content = (folder / "Bello.safetensors").read_bytes()
    token = library.delete(folder, "Bello")
    assert library.names(folder) == ["dog-2"]
    assert library.restore(folder, token) == "Bello"
    assert (folder / "Bello.safetensors").read_bytes() == content and (folder / "Bello.png").is_file()
    with pytest.raises(SVFitError, match="gone for good"):
        library.restore(folder, token)


def test_the_picture_in_a_file_stands_for_it(tmp_path, adapter_path):
    folder, red = tmp_path / "adapters", Image.new("RGB", (8, 8), "red")
    source = Path(shutil.copy(adapter_path, tmp_path / "rex.safetensors"))
    annotate_adapter(source, thumbnail=red)
    library.add(folder, source)
    shown = Image.open(library.entry(folder, "rex").picture)
    assert np.abs(np.asarray(shown, int) - np.asarray(red, int)).max() <= 3  # it went through JPEG
    blue = tmp_path / "blue.png"
    Image.new("RGB", (8, 8), "blue").save(blue)
    library.set_picture(folder, "rex", blue)
    library.replace(folder, "rex", source)
    assert Image.open(folder / "rex.png").getpixel((0, 0)) == (0, 0, 255)  # a person chose it
    adapter = read_adapter(source)
    for text in ("data:image/png;base64,iVBORw0KGgo=", "data:text/html;base64,PGI+", "https://example.org/a.png"):
        adapter.metadata["modelspec.thumbnail"] = text
        name = library.add(folder, save_adapter(adapter, tmp_path / "other.safetensors"))
        assert library.entry(folder, name).picture is None


@pytest.mark.parametrize("name", ["../dog", "/etc/passwd", "dog.safetensors", "", ".deleted"])
def test_library_names_are_looked_up(tmp_path, adapter_path, name):
    library.add(tmp_path / "adapters", adapter_path)
    with pytest.raises(SVFitError, match="no adapter called"):
        library.find(tmp_path / "adapters", name)


def test_library_refuses_what_is_no_adapter(tmp_path, adapter_path):
    folder = tmp_path / "adapters"
    pickle = tmp_path / "dog.safetensors"
    pickle.write_bytes(b"\x80\x04\x95" + bytes(100))
    with pytest.raises(SVFitError, match="^'dog.safetensors' is a pickle") as refusal:
        library.add(folder, pickle)
    assert str(tmp_path) not in str(refusal.value)
    assert library.names(folder) == []
    library.add(folder, adapter_path)
    (folder / "broken.safetensors").write_bytes(b"no")
    found, ((name, sentence),) = library.entries(folder)
    assert [entry.name for entry in found] == ["dog"] and found[0].instance_prompt == "a photo of sks dog"
    assert name == "broken" and "broken.safetensors" in sentence and str(tmp_path) not in sentence


def test_one_strange_file_hides_no_other_and_can_go(tmp_path, adapter_path, monkeypatch):
    folder, describe = tmp_path / "adapters", adapter.describe_adapter
    for name in ("dog", "strange"):
        library.add(folder, adapter_path, name=name)

    def describe_adapter(read, path):
        if Path(path).stem == "strange":
            raise IndexError("list index out of range")
        return describe(read, path)

    monkeypatch.setattr(adapter, "describe_adapter", describe_adapter)
    found, ((name, sentence),) = library.entries(folder)
    assert [entry.name for entry in found] == ["dog"]
    assert name == "strange" and sentence.startswith("strange.safetensors cannot be read as an adapter (IndexError")
    (folder / "strange.safetensors").write_bytes(b"no adapter at all")
    token = library.delete(folder, name)
    assert library.entries(folder)[1] == []
    assert library.restore(folder, token) == "strange"
    assert (folder / "strange.safetensors").read_bytes() == b"no adapter at all"


# ---------------------------------------------------------------- the queue


@pytest.fixture
def command(tmp_path, monkeypatch, adapter_path):
    """A stand-in for the training command that keeps its contract and takes no time."""
    script = tmp_path / "command.py"
    script.write_text(textwrap.dedent(f"""
        import json, pathlib, shutil, signal, sys, time, yaml
        options = yaml.safe_load(open(sys.argv[2]))
        out = pathlib.Path(options["output_dir"])
        if options["instance_prompt"] == "bad":
            print("error: these words do not work: use others."); sys.exit(2)
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        def note(**event):
            with open(out / "progress.jsonl", "a") as file: file.write(json.dumps(event) + chr(10))
        first = 3 if "--resume_from_checkpoint" in sys.argv else 0
        import os
        note(event="start", step=first, of=6, offline=os.environ.get("HF_HUB_OFFLINE"))
        go = out.parent / "go"
        for step in range(first + 1, 7):
            note(event="step", step=step, of=6, loss=1 / step, seconds=0.5)
            while step == 3 and not go.exists() and not asked: time.sleep(0.02)
            if asked: break
        shutil.copy({str(adapter_path)!r}, out / (options["adapter_name"] + ".safetensors"))
        note(event="end", step=step, status="stopped" if asked else "finished", adapter=options["adapter_name"] + ".safetensors")
    """))  # fmt: skip
    monkeypatch.setattr(process, "COMMAND", script)
    return script


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def submit(queue, visitor, photo_folder, name="dog", **options):
    add_photos(visitor.photos, sorted(photo_folder.glob("*.png"))[:1])
    options = {"pretrained_model_name_or_path": "toybox", "instance_prompt": "a photo of sks dog", **options}
    return queue.submit(visitor, name, options)


def test_runs_wait_for_each_other_and_survive_the_server(workspace, visitor, photo_folder, command):
    server = Jobs(workspace)
    first, second = (submit(server, visitor, photo_folder, name) for name in ("first", "second"))
    server.tend()
    server.tend()
    assert (server.state(first), server.state(second), server.ahead(second)) == ("running", "queued", 1)
    until(lambda: sum_up(server.run_folder(first)).step == 3)

    restarted = Jobs(workspace)  # knows nothing but the folder
    restarted.tend()
    assert [restarted.state(job) for job in (first, second)] == ["running", "queued"]
    with pytest.raises(SVFitError, match="first is running"):
        restarted.remove(first)
    (workspace.jobs / first.id / "go").touch()
    until(lambda: restarted.state(first) == "finished")
    restarted.tend()
    assert restarted.find(visitor, first.id).library_name == "first" and library.names(visitor.library) == ["first"]
    until(lambda: sum_up(restarted.run_folder(second)).step == 3)
    restarted.stop(restarted.find(visitor, second.id))
    until(lambda: restarted.state(restarted.find(visitor, second.id)) == "stopped")


def test_a_stopped_run_goes_on_and_replaces_its_result(workspace, visitor, photo_folder, command):
    server = Jobs(workspace)
    job = submit(server, visitor, photo_folder)
    server.tend()
    until(lambda: sum_up(server.run_folder(job)).step == 3)
    server.stop(job)
    until(lambda: server.state(job) == "stopped")
    server.tend()
    server.resume(server.find(visitor, job.id))
    assert server.state(server.find(visitor, job.id)) == "queued"
    (workspace.jobs / job.id / "go").touch()
    server.tend()
    until(lambda: server.state(server.find(visitor, job.id)) == "finished")
    server.tend()
    state = sum_up(server.run_folder(job))
    assert [step for step, _ in state.losses] == [1, 2, 3, 4, 5, 6] and state.status == "finished"
    assert library.names(visitor.library) == ["dog"]
    (server.run_folder(job) / "progress.jsonl").unlink()  # which is not read every second for ever
    assert server.state(server.find(visitor, job.id)) == "finished"
    assert "--resume_from_checkpoint" not in (workspace.jobs / job.id / "job.yaml").read_text()


def test_a_run_that_goes_on_leaves_alone_what_has_taken_its_name(
    workspace, visitor, photo_folder, command, adapter_path, tmp_path
):
    server = Jobs(workspace)
    job = submit(server, visitor, photo_folder)
    server.tend()
    until(lambda: sum_up(server.run_folder(job)).step == 3)
    server.stop(job)
    until(lambda: server.tend() or server.find(visitor, job.id).library_name == "dog")
    assert server.result(server.find(visitor, job.id)) == visitor.library / "dog.safetensors"
    library.rename(visitor.library, "dog", "Bello")
    other = read_adapter(adapter_path)
    other.title = "somebody else's"
    library.add(visitor.library, save_adapter(other, tmp_path / "dog.safetensors"))
    assert server.result(server.find(visitor, job.id)) is None
    theirs = (visitor.library / "dog.safetensors").read_bytes()
    server.resume(server.find(visitor, job.id))
    (workspace.jobs / job.id / "go").touch()
    until(lambda: server.tend() or server.find(visitor, job.id).library_name == "dog-2")
    assert (visitor.library / "dog.safetensors").read_bytes() == theirs
    assert server.result(server.find(visitor, job.id)) == visitor.library / "dog-2.safetensors"


def test_a_killed_run_is_told_from_a_failed_one(workspace, visitor, photo_folder, command):
    server = Jobs(workspace)
    killed = submit(server, visitor, photo_folder)
    server.tend()
    until(lambda: sum_up(server.run_folder(killed)).step == 3)
    os.kill(server.find(visitor, killed.id).pid, signal.SIGKILL)
    until(lambda: server.state(server.find(visitor, killed.id)) == "cut off")
    failed = submit(server, visitor, photo_folder, instance_prompt="bad")
    until(lambda: server.tend() or server.state(server.find(visitor, failed.id)) == "failed")
    assert server.complaint(failed) == "these words do not work: use others."


def test_a_full_disk_stops_no_other_run_and_loses_nothing(
    workspace, visitor, photo_folder, command, monkeypatch, capsys
):
    server, place = Jobs(workspace), library.place
    jobs_ = [submit(server, visitor, photo_folder, name) for name in ("full", "other")]
    for job in jobs_:
        (workspace.jobs / job.id / "go").touch()

    def full(temporary, target):
        if target.stem == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        return place(temporary, target)

    monkeypatch.setattr(library, "place", full)
    until(lambda: server.tend() or server.find(visitor, jobs_[1].id).library_name == "other")
    assert server.state(jobs_[0]) == "finished" and server.find(visitor, jobs_[0].id).library_name is None
    assert capsys.readouterr().err.count("No space left") == 1  # not every second
    monkeypatch.setattr(library, "place", place)
    server._rests.clear()  # a minute later
    server.tend()
    assert server.find(visitor, jobs_[0].id).library_name == "full"
    assert sorted(library.names(visitor.library)) == ["full", "other"]


def test_strangers_see_neither_runs_nor_results(tmp_path, photo_folder, command):
    workspace = Workspace(tmp_path / "home", shared=False)
    mine, theirs = workspace.visitor("a" * 32), workspace.visitor("b" * 32)
    server = Jobs(workspace)
    job = submit(server, mine, photo_folder)
    (workspace.jobs / job.id / "go").touch()
    until(lambda: server.tend() or server.find(mine, job.id).library_name == "dog")
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


def test_trash_of_all_visitors_is_emptied_every_day(tmp_path, adapter_path, monkeypatch):
    workspace = Workspace(tmp_path / "home", shared=False)
    folders = [workspace.visitor(letter * 32).library for letter in "ab"] + [workspace.folder / "adapters"]
    server = Jobs(workspace)

    def delete(days):
        for folder in folders:
            library.add(folder, adapter_path)
            token = library.delete(folder, "dog")
            os.utime(folder / ".deleted" / token, (time.time() - days * 24 * 3600,) * 2)

    def left():
        return [len(list((folder / ".deleted").iterdir())) for folder in folders]

    delete(31)
    delete(29)
    server.tend()
    assert left() == [1, 1, 1]
    delete(31)
    server.tend()
    assert left() == [2, 2, 2]  # not every second
    tomorrow = time.monotonic() + 24 * 3600
    monkeypatch.setattr(jobs.time, "monotonic", lambda: tomorrow)
    server.tend()
    assert left() == [1, 1, 1]


def test_what_no_run_could_use_is_refused_before_it_waits(workspace, visitor, photo_folder):
    server = Jobs(workspace)
    with pytest.raises(SVFitError, match="no photos yet"):
        server.submit(visitor, "dog", {"instance_prompt": "a photo of sks dog"})
    with pytest.raises(SVFitError, match="rank is 'many'"):
        submit(server, visitor, photo_folder, rank="many")
    assert server.listed(visitor) == [] and not list(workspace.jobs.glob("[0-9]*"))


# ---------------------------------------------------------------- the base that paints


def paint(studio, order, cancelled=None, on_told=None):
    told = []

    def tell(event):
        told.append(event)
        if on_told is not None:
            on_told(event)

    studio.paint(order, tell, cancelled or threading.Event())
    return told, [event.picture for event in told if event.kind == "picture"]


def pixels(picture):
    return np.asarray(picture.image, dtype=int)


def test_adapters_are_exchanged_on_an_open_base(workspace, tiny_base, adapter_path, tmp_path):
    studio = Studio(Bases(workspace.models, (str(tiny_base),)))
    other = shutil.copy(adapter_path, tmp_path / "mug.safetensors")
    order = {"prompt": "a photo of sks dog", "base": tiny_base.name, "seed": 3, **SIZE}
    told, (bare,) = paint(studio, Order(**order))
    assert [event.kind for event in told] == ["opening", "loading", "step", "step", "picture"]
    told, (weak, full) = paint(studio, Order(**order, adapters=[(adapter_path, 1.0)], factors=(0.0, 1.0)))
    assert "opening" not in [event.kind for event in told]
    assert np.array_equal(pixels(bare), pixels(weak)) and not np.array_equal(pixels(bare), pixels(full))
    _, (both,) = paint(studio, Order(**order, adapters=[(Path(other), 1.0), (adapter_path, -1.0)]))
    assert both.settings["adapters"] == {"dog": -1.0, "mug": 1.0} or both.settings["adapters"] == {
        "mug": 1.0,
        "dog": -1.0,
    }
    assert np.abs(pixels(both) - pixels(bare)).max() <= 1
    _, (again,) = paint(studio, Order(**order, adapters=[(adapter_path, 1.0)]))
    assert np.array_equal(pixels(again), pixels(full)) and again.settings["adapters"] == {"dog": 1.0}


def test_painting_stops_within_a_step(workspace, tiny_base):
    studio, cancelled = Studio(Bases(workspace.models, (str(tiny_base),))), threading.Event()

    def stop(event):
        if event.kind == "step" and (event.number, event.step) == (1, 1):
            cancelled.set()

    order = Order("a dog", tiny_base.name, num_images=3, **SIZE)
    told, painted = paint(studio, order, cancelled, stop)
    assert len(painted) == 1 and (told[-1].kind, told[-1].number, told[-1].step) == ("step", 1, 1)


def test_a_related_base_is_allowed_only_while_it_is_asked_for(workspace, tiny_base, tiny_base_v, adapter_path):
    studio = Studio(Bases(workspace.models, (str(tiny_base), str(tiny_base_v))))
    order = Order("a dog", tiny_base_v.name, [(adapter_path, 1.0)], **SIZE)
    _, lenient = paint(studio, dataclasses.replace(order, allow_other_base=True))
    with pytest.raises(SVFitError, match="base"):
        paint(studio, order)
    _, again = paint(studio, dataclasses.replace(order, allow_other_base=True))
    assert np.array_equal(pixels(lenient[0]), pixels(again[0]))
    own = dataclasses.replace(order, base=tiny_base.name)
    for allowed in (True, False, False):
        assert len(paint(studio, dataclasses.replace(own, allow_other_base=allowed))[1]) == 1


def test_a_base_on_a_gpu_makes_room_for_runs_and_after_a_while(workspace, tiny_base, monkeypatch):
    studio, order = Studio(Bases(workspace.models, (str(tiny_base),))), Order("a dog", tiny_base.name, **SIZE)
    paint(studio, order)
    studio.make_room()
    assert studio._model is not None  # on the CPU it stays
    monkeypatch.setattr(web_studio, "on_gpu", lambda model: model is not None)
    weights = studio._model.pipeline.unet.conv_in
    studio.make_room()
    assert studio._model is None and weights.weight.device.type == "meta"

    def ask(event):
        if event.kind == "step":
            studio.make_room()

    told, painted = paint(studio, order, on_told=ask)
    assert told[0].kind == "opening" and len(painted) == 1 and studio._model is None
    monkeypatch.setattr(web_studio, "IDLE", 0.05)
    paint(studio, order)
    until(lambda: studio._model is None)
    until(lambda: not studio._lock.locked())
    assert (working_dtype("cuda"), working_dtype("cpu")) == ("float16", "float32")


def test_a_run_asks_for_room_before_it_starts(workspace, visitor, photo_folder, command, monkeypatch):
    asked = []
    monkeypatch.setattr(jobs, "devices", lambda: ["3", "5"])
    server = Jobs(workspace, make_room=lambda: asked.append(server.find(visitor, job.id).started))
    job = submit(server, visitor, photo_folder)
    server.tend()
    other = submit(server, visitor, photo_folder)  # on the other device
    server.tend()
    assert asked == [0] and server.state(other) == "running"
    for each in (job, other):
        server.stop(each)
        until(lambda each=each: server.state(each) == "stopped")


@pytest.mark.parametrize("name", ["/etc", "../tiny-kl", "toybox/weights", ".", "", "a b"])
def test_no_path_from_a_browser_is_opened(workspace, name, monkeypatch):
    monkeypatch.chdir(process.COMMAND.parent)  # where toybox/weights is a model folder
    with pytest.raises(SVFitError, match="no base model that is offered here"):
        Bases(workspace.models).resolve(name, typed=True)


def test_a_name_in_a_file_opens_nothing_new(workspace, tiny_base, adapter_path, tmp_path):
    adapter = read_adapter(adapter_path)
    for name, sentence in (("someone/model", "not downloaded unasked"), ("tiny-kl", "not offered here")):
        adapter.base_model = name
        path = save_adapter(adapter, tmp_path / "stranger.safetensors")
        with pytest.raises(SVFitError, match=sentence):
            paint(Studio(Bases(workspace.models)), Order("a dog", AS_TRAINED, [(path, 1.0)], **SIZE))
    (workspace.models).mkdir(parents=True)
    (workspace.models / "tiny-kl").symlink_to(tiny_base)
    _, painted = paint(Studio(Bases(workspace.models)), Order("a dog", AS_TRAINED, [(path, 1.0)], **SIZE))
    assert len(painted) == 1


@pytest.mark.parametrize("place", ["folder.v1", "link", "link.safetensors", "model.v2.safetensors", "."])
def test_a_base_has_one_name_on_the_page_and_in_adapters(tmp_path, tiny_base, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, tmp_path / "folder.v1")
    (tmp_path / "link").symlink_to("folder.v1")
    (tmp_path / "model.v2.safetensors").touch()
    (tmp_path / "link.safetensors").symlink_to("model.v2.safetensors")
    if place == ".":
        monkeypatch.chdir(tmp_path / "folder.v1")
    recorded = {"link.safetensors": "model.v2", "model.v2.safetensors": "model.v2", ".": "folder.v1"}.get(place, place)
    if Path(place).is_dir():
        assert open_base_model(place).name == recorded
    offered = Bases(tmp_path / "none", (place,))
    assert offered.names()[1:] == [recorded] and offered.resolve(recorded, typed=False)[0] == place
    if place != ".":
        found = Path(Bases(tmp_path).resolve(recorded, typed=False)[0])
        assert found.samefile(place) and found.is_dir() == Path(place).is_dir()


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


def test_a_stranger_downloads_nothing_by_training(workspace, visitor, photo_folder, hub_cache, command, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    bases = Bases(workspace.models, ("owner/offered",), download=False)
    assert bases.resolve_for_run("owner/offered") == ("owner/offered", None)
    assert Bases(workspace.models).resolve_for_run("stranger/model@v1") == ("stranger/model", "v1")
    for name in ("stranger/model", "stranger/model@v1", "a--b/c"):
        with pytest.raises(SVFitError, match=f"^{name} is not on this disk, and downloads are off here"):
            bases.resolve_for_run(name)
    hub_cache("stranger/model")
    assert bases.resolve_for_run("stranger/model") == ("stranger/model", None)
    server = Jobs(workspace, bases.offline)
    for base, offline in (("stranger/model", "1"), ("owner/offered", None), ("toybox", None)):
        job = submit(server, visitor, photo_folder, pretrained_model_name_or_path=base)
        (workspace.jobs / job.id / "go").touch()
        until(lambda job=job: server.tend() or server.state(job) == "finished")
        assert read_progress(server.run_folder(job))[0]["offline"] == offline


# ---------------------------------------------------------------- settings in pictures


def test_settings_are_read_back_and_others_refused(workspace, tiny_base, tmp_path):
    _, (picture,) = paint(
        Studio(Bases(workspace.models, (str(tiny_base),))), Order("a <b>dog</b>", tiny_base.name, **SIZE)
    )
    path = save_picture(picture, free_path(tmp_path, "dog"))
    assert pictures.read_settings(path) == picture.settings
    Image.open(path).save(tmp_path / "bare.png")
    with pytest.raises(SVFitError, match="bare.png holds no settings"):
        pictures.read_settings(tmp_path / "bare.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SVFitError, match="^text.png is not a readable PNG file: choose"):
        pictures.read_settings(tmp_path / "text.png")
    with pytest.raises(SVFitError, match="not there any more"):
        pictures.find(tmp_path, "../secret")


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
