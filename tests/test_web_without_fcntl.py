"""The page where the system has neither fcntl nor fork, as Windows: everything is imported, and a run is driven through."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")

ROOT = Path(__file__).resolve().parents[1]
# what every Python started here runs first, the training command too
ABSENT = """
import os, sys
sys.modules["fcntl"] = None
for name in ("fork", "forkpty", "killpg"):
    delattr(os, name)
"""
IMPORT = """
import importlib, os, pkgutil, sys, time
from pathlib import Path
import svfit_dreambooth

for module in pkgutil.walk_packages(svfit_dreambooth.__path__, "svfit_dreambooth."):
    if "__main__" not in module.name:
        importlib.import_module(module.name)
assert sys.modules["fcntl"] is None and not hasattr(os, "fork")
"""
DRIVE = """
import sys, time
from pathlib import Path

from svfit_dreambooth.web.page import build_page
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms.laid_out import take_bundled
from svfit_dreambooth.web.rooms.workspace import Workspace

workspace = Workspace(Path(sys.argv[1]))
page, app = build_page(workspace)
visitor = workspace.visitor("0" * 32)
take_bundled(visitor.photos, "dog_patch")
options = {
    "pretrained_model_name_or_path": "toybox", "instance_prompt": "a photo of sks dog", "max_train_steps": 100_000,
    "validation_steps": 0, "fixed_loss_examples": 0, "final_pictures": False, "train_batch_size": 1, "learning_rate": 1e-2,
}

def until(state):
    deadline = time.monotonic() + 300
    while app.jobs.state(app.jobs.find(visitor, job.id)) != state:
        app.queue.tend()
        assert time.monotonic() < deadline, (app.jobs.state(job), app.jobs.log(job))
        time.sleep(0.1)

def until_step():
    progress = app.jobs.run_folder(job) / "progress.jsonl"
    steps = progress.read_text().count('"step"') if progress.is_file() else 0
    while not progress.is_file() or progress.read_text().count('"step"') < steps + 3:
        assert app.jobs.state(job) == "running", app.jobs.log(job)
        time.sleep(0.1)

job = app.jobs.submit(visitor, "dog", options)
until("running")
until_step()
assert app.jobs.submit(visitor, "dog", options).id == job.id
app.jobs.stop(job)
until("stopped")
app.jobs.resume(app.jobs.find(visitor, job.id))
until("running")
until_step()
app.jobs.stop(job)
until("stopped")
app.queue.tend()
(name,) = library.names(visitor.library)
assert app.jobs.result(app.jobs.find(visitor, job.id)).stem == name == "dog"
library.rename(visitor.library, "dog", "rex")
library.restore(visitor.library, library.delete(visitor.library, "rex"))
app.jobs.remove(app.jobs.find(visitor, job.id))
"""


@pytest.mark.parametrize("script", [IMPORT, pytest.param(IMPORT + DRIVE, marks=pytest.mark.slow)])
def test_nothing_needs_fcntl_or_fork(script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "home")],
        env={**os.environ, "PYTHONPATH": paths, "GRADIO_TEMP_DIR": str(tmp_path / "home" / "served")},
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-3000:]
