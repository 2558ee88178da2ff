"""What the tests of the page share: a workspace, a visitor, an adapter, and a stand-in for the training command."""

import shutil
import textwrap
import threading
import time

import pytest

from svfit_dreambooth import TrainConfig, train
from svfit_dreambooth.web.rooms import launch as process
from svfit_dreambooth.web.rooms.laid_out import add_photos
from svfit_dreambooth.web.rooms.workspace import Workspace, library_of


@pytest.fixture(scope="session")
def dog_adapter(tiny_base, photo_folder, tmp_path_factory):
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


@pytest.fixture
def home(tmp_path, tiny_base, monkeypatch):
    """What stands behind the page of a computer of one's own."""
    return _behind(Workspace(tmp_path / "own"), tiny_base, monkeypatch)


@pytest.fixture
def public(tmp_path, tiny_base, monkeypatch):
    """What stands behind a page for strangers, which downloads nothing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return _behind(Workspace(tmp_path / "public", shared=False), tiny_base, monkeypatch, download=False)


def _behind(workspace, base, monkeypatch, **options):
    from svfit_dreambooth.web.page import build_page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(workspace.served))
    return build_page(workspace, (), (str(base),), **options)[1]


def empty_library(workspace):
    """Takes the adapters out of the library of a page that several tests share."""
    shutil.rmtree(library_of(workspace, ""), ignore_errors=True)


class Request:
    """What a handler sees of a browser."""

    username, session_hash, client = None, "a session", None

    def __init__(self, word):
        self.cookies = {"svfit_visitor": word}


@pytest.fixture
def command(tmp_path, monkeypatch, dog_adapter):
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
        shutil.copy({str(dog_adapter)!r}, out / (options["adapter_name"] + ".safetensors"))
        note(event="end", step=step, status="stopped" if asked else "finished", adapter=options["adapter_name"] + ".safetensors")
    """))  # fmt: skip
    monkeypatch.setattr(process, "COMMAND", (str(script),))
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


def paint(studio, order, cancelled=None, on_told=None):
    told = []

    def tell(event):
        told.append(event)
        if on_told is not None:
            on_told(event)

    studio.paint(order, tell, cancelled or threading.Event())
    return told, [event.picture for event in told if event.kind == "picture"]
