"""What a person gets who installs the package: a wheel that works where no checkout is."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300  # seconds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, the folder where it is installed, and the environment of a program that finds the package there alone."""
    folder = tmp_path_factory.mktemp("wheel")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:  # from a copy: building leaves folders behind
        if not name.startswith(("docs/", "benchmarks/", "tests/")) and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "source")]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SVFIT_HOME")}
    return wheel, target, {**own, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}


def test_the_wheel_has_the_package_and_toybox_with_its_files(installed):
    wheel, _, _ = installed
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {"svfit_dreambooth", "toybox"} <= tops and len(tops) == 3  # the third is the wheel's own notes
    for folder in ("weights", "subjects"):
        kept = [path for path in (ROOT / "toybox" / folder).rglob("*") if path.is_file()]
        assert kept and all(path.relative_to(ROOT).as_posix() in names for path in kept)


@pytest.mark.parametrize("command", ["svfit", "svfit-train", "svfit-web"])
def test_commands_answer(installed, tmp_path, command):
    _, target, environment = installed
    asked = [sys.executable, str(target / "bin" / command), "--help"]
    said = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0 and "usage" in said.stdout, said.stderr


def test_a_run_and_a_picture_by_the_commands(installed, tmp_path):
    _, target, environment = installed
    train = [
        sys.executable, str(target / "bin" / "svfit-train"), "--output_dir", "run", "--max_train_steps", "2",
        "--validation_steps", "0", "--adapter_name", "toy",
    ]  # fmt: skip
    subprocess.run(train, cwd=tmp_path, env=environment, check=True, timeout=PATIENCE)
    paint = [
        sys.executable, str(target / "bin" / "svfit"), "generate", "--adapter", "run/toy.safetensors",
        "--prompt", "a photo of sks dog", "--num_images", "1", "--num_inference_steps", "1", "--output_dir", "pictures",
    ]  # fmt: skip
    subprocess.run(paint, cwd=tmp_path, env=environment, check=True, timeout=PATIENCE)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


def test_the_page_trains(installed, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from gradio_client import Client, handle_file

    _, target, environment = installed
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script, home = target / "bin" / "svfit-web", tmp_path / "home"
    command = [sys.executable, str(script), "--port", str(port), "--data_dir", str(home)]
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    url, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + PATIENCE
    try:
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(url, timeout=PATIENCE).close()
                break
            except OSError:
                time.sleep(0.2)
        client = Client(url, verbose=False, download_files=str(tmp_path / "downloads"))
        photos = [handle_file(path) for path in sorted((target / "toybox" / "subjects" / "dog_patch").glob("*.png"))]
        id = client.predict(photos, "rex", "sks", "dog", "toybox", "fast", 2, api_name="/train")
        while (state := client.predict(id, api_name="/run_state"))["adapter"] is None:
            log = home / "jobs" / id / "log.txt"
            assert state["state"] in ("queued", "running", "finished") and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        assert (state["adapter"], state["step"]) == ("rex", 2)
        assert [entry["name"] for entry in client.predict(api_name="/list_adapters")] == ["rex"]
    finally:
        server.kill()
        server.wait()
