"""The page in a real browser: photos to adapter to picture, across reloads and restarts of the server."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from web_stand_ins import empty_library

from svfit_dreambooth.web.rooms.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STRENGTH = ".strength input[type=number]"
PATIENCE = 300  # seconds; most waits end within one, but a busy machine is no failure

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed"),
]


class Server:
    """`python app.py` in a process of its own, on a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.process = None

    def start(self):
        command = [sys.executable, str(ROOT / "app.py"), "--data_dir", str(self.folder), "--port", str(self.port)]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.url, timeout=PATIENCE).close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self):
        """As a power cut would: nothing is tidied up."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from svfit_dreambooth.web.rooms.processes import is_running

    server = Server(tmp_path_factory.mktemp("app"))
    server.start()
    yield server
    server.kill()
    for job in (server.folder / "jobs").glob("[0-9]*/job.json"):  # a failed test may leave a run behind
        pid = json.loads(job.read_text())["pid"]
        if is_running(pid, None, job.with_name("job.yaml")):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(server, browser):
    """Opens the page as a new visitor; the library, which all visitors share, begins empty for every test."""
    contexts = []
    empty_library(Workspace(server.folder))

    def visit(width=1280):
        context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        context.set_default_timeout(PATIENCE * 1000)
        contexts.append(context)
        page = context.new_page()
        page.goto(server.url)
        page.get_by_role("tab", name="Train").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()


def fill(page, id, text):
    page.locator(f"{id} input, {id} textarea").first.fill(str(text))


def says(page, id, text):
    from playwright.sync_api import expect

    expect(page.locator(id)).to_contain_text(text, timeout=PATIENCE * 1000)


def has_value(page, locator, value):
    from playwright.sync_api import expect

    expect(page.locator(locator)).to_have_value(value, timeout=PATIENCE * 1000)


def events(server, name):
    (folder,) = [path.parent for path in server.folder.glob("jobs/[0-9]*/job.json") if name in path.read_text()]
    return [json.loads(line) for line in (folder / "run" / "progress.jsonl").read_text().splitlines()]


def start_run(page, name, steps, pictures_every):
    """`pictures_every`: steps between looks on the way; 0: none, not even at the start."""
    fill(page, "#name", name)
    fill(page, "#train-steps", steps)
    fill(page, "#train-every", pictures_every)
    page.locator("#start-training").click()


def reaches(page, step):
    """Waits for a run that is at `step` or further: the page looks at it only now and then."""
    page.wait_for_function(
        """step => {
            const said = document.querySelector("#run-status").textContent.match(/step ([0-9]+) of/);
            return said && Number(said[1]) >= step;
        }""",
        arg=step,
        timeout=PATIENCE * 1000,
    )


def press(page, run, button):
    page.locator(".run", has_text=run).get_by_role("button", name=button).click()


def look_at(page, run):
    page.locator(".run", has_text=run).locator(".show").click()


def test_train_reload_kill_stop_resume_paint_download(server, visit, tmp_path):
    """Two runs, one in line behind the other; what each shows is looked at while the other works."""
    page = visit()
    page.locator("#take-toy").click()  # while there is nothing to paint with, the page begins on Train
    assert page.url.endswith("#train")
    says(page, "#photo-remarks", "5 photos, 64x64")
    page.locator("#advanced button").first.click()
    fill(page, "#train-painting", 1)
    start_run(page, "long", 10_000, pictures_every=10_000)
    says(page, "#run-status", "long · running")
    start_run(page, "../Bello", 3, pictures_every=0)
    says(page, "#run-status", "Bello · waiting")
    fill(page, "#train-base", "owner/name")
    page.locator("#train-base input").press("Enter")
    page.locator("#preset input[value=faithful]").check()
    says(page, "#run-status", "1 run before it")

    page.reload()
    open_tab(page, "Train")
    says(page, "#photo-remarks", "5 photos, 64x64")
    has_value(page, "#train-base input", "owner/name")
    page.locator("#preset input[value=faithful]:checked").wait_for()
    says(page, "#run-status", "Bello · waiting")
    look_at(page, "long")
    reaches(page, 2)
    says(page, "#look", "Painted at step 0")
    page.locator("#look .enlarge img").click()
    page.locator("#look .enlarged img").click()  # large now, and then not

    server.kill()
    server.start()
    page.goto(server.url)
    open_tab(page, "Train")
    look_at(page, "long")
    press(page, "long", "Stop and keep")
    says(page, "#run-status", "long · stopped")
    stopped = events(server, "long")[-1]
    assert (stopped["event"], stopped["status"]) == ("end", "stopped") and stopped["step"] >= 2
    press(page, "long", "Resume")
    says(page, "#run-status", "long · waiting")

    look_at(page, "Bello")
    says(page, "#run-status", "Bello · finished")
    page.locator("#curve svg").wait_for()
    page.locator("#sheet .enlarge img").wait_for()
    says(page, "#sheet", "likeness to the subject")
    page.locator("#try-run").click()
    page.get_by_text("Strength of Bello").wait_for()
    has_value(page, "#prompt textarea", "a photo of sks dog")
    paint_one(page)
    download(page, tmp_path / "picture.png", "Bello at 1")
    assert settings_of(tmp_path / "picture.png")["adapters"] == {"Bello": 1.0}

    open_tab(page, "Train")
    look_at(page, "long")
    reaches(page, stopped["step"] + 1)
    press(page, "long", "Stop and keep")
    says(page, "#run-status", "long · stopped")
    steps = [event["step"] for event in events(server, "long") if event["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > stopped["step"]  # none was done twice

    press(page, "long", "Remove")
    page.get_by_text("The run of long was removed").wait_for()
    says(page, "#run-status", "Bello · finished")
    page.locator("#undo-remove-run").click()
    says(page, "#run-status", "long · stopped")


def paint_one(page):
    page.locator("#count input[type=number]").fill("1")
    fill(page, "#steps", 2)
    page.locator("#prompt textarea").press("Control+Enter")
    says(page, "#generate-status", "1 picture done")


def download(page, path, expected):
    page.locator("#gallery .thumbnail-lg").first.click()
    says(page, "#settings", expected)
    with page.expect_download() as download:
        page.locator("#download").click()
    download.value.save_as(path)


def settings_of(path):
    return json.loads(Image.open(path).text["svfit"])


@pytest.fixture(scope="module")
def adapter_path(tmp_path_factory):
    """An adapter of toybox with values drawn at random."""
    import torch

    from svfit_dreambooth import Adapter, save_adapter
    from svfit_dreambooth.bases.families import find_projections
    from svfit_dreambooth.bases.opening import open_base_model
    from svfit_dreambooth.method.basis import fingerprint

    base = open_base_model()
    weights = {
        f"unet.{name}": layer.weight.detach() for name, (_, _, layer) in find_projections(base.pipeline.unet).items()
    }
    torch.manual_seed(0)
    shifts = {name: torch.randn(min(weight.shape)) for name, weight in weights.items()}
    adapter = Adapter(shifts, base.name, fingerprint(weights), "a photo of sks dog", architecture=base.architecture)
    return save_adapter(adapter, tmp_path_factory.mktemp("adapter") / "Rex.safetensors")


def test_import_paint_reuse_change_strength_rename_delete_undo(server, visit, adapter_path, tmp_path):
    page = visit()
    open_tab(page, "Adapters")
    (tmp_path / "evil.safetensors").write_bytes(b"\x80\x04\x95" + bytes(64))
    for path in (tmp_path / "evil.safetensors", adapter_path):
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Import adapter files").click()
        chooser.value.set_files(path)
        if path != adapter_path:
            page.locator(".toast-body", has_text="is a pickle (.pt, .bin, .ckpt)").wait_for()
    rex = page.locator(".card", has=page.locator("h3", has_text="Rex"))
    rex.get_by_role("button", name="Use").click()
    page.get_by_text("Strength of Rex").wait_for()
    has_value(page, "#prompt textarea", "a photo of sks dog")
    paint_one(page)
    download(page, tmp_path / "first.png", "Rex at 1")
    settings = settings_of(tmp_path / "first.png")
    assert settings["adapters"] == {"Rex": 1.0}
    assert str(settings["seed"]) == page.locator("#seed input").input_value()

    page.locator(STRENGTH).fill("1.25")
    page.locator("#reuse").click()
    has_value(page, STRENGTH, "1")
    page.wait_for_function("!document.querySelector('#new-seed input').checked")
    page.locator(STRENGTH).fill("0.5")
    page.locator("#generate-button").click()
    says(page, "#settings", "Select a picture")
    says(page, "#generate-status", "1 picture done")
    download(page, tmp_path / "second.png", "Rex at 0.5")
    assert settings_of(tmp_path / "second.png") == {**settings, "adapters": {"Rex": 0.5}}
    assert Image.open(tmp_path / "first.png").tobytes() != Image.open(tmp_path / "second.png").tobytes()

    open_tab(page, "Adapters")
    rex.get_by_role("button", name="Rename").click()
    rex.get_by_label("New name").fill("../Mia")
    rex.get_by_role("button", name="Save").click()
    rex.wait_for(state="detached")
    mia = page.locator(".card", has=page.locator("h3", has_text="Mia"))
    mia.get_by_role("button", name="Delete").click()
    page.get_by_text("Mia was deleted.").wait_for()
    mia.wait_for(state="detached")
    page.locator("#undo").click()
    mia.wait_for()


# what lies under a bar that stays in sight, of all that can have the focus, when it has it
UNDER_THE_BAR = """() => {
    const seen = (part) => part.getClientRects().length > 0;
    const bars = [...document.querySelectorAll(".in-sight")].filter(seen);
    const fields = [...document.querySelectorAll("input, textarea, button, [tabindex='0']")].filter(
        (field) => seen(field) && !field.disabled && !field.closest(".in-sight"));
    return fields.filter((field) => {
        field.focus();
        const own = field.getBoundingClientRect();
        return document.activeElement === field && bars.map((bar) => bar.getBoundingClientRect()).some(
            (bar) => own.bottom > bar.top + 1 && own.top < bar.bottom - 1);
    }).map((field) => field.outerHTML.slice(0, 200));
}"""


def test_visitors_see_no_photos_of_others_and_phones_have_room(visit, tmp_path):
    Image.new("RGB", (90, 80), "red").save(tmp_path / "mine.png")
    (tmp_path / "text.png").write_text("<script>alert(1)</script>")
    mine = visit()
    open_tab(mine, "Train")
    mine.locator("#photos input[type=file]").set_input_files([tmp_path / "mine.png", tmp_path / "text.png"])
    says(mine, "#photo-remarks", "1 photo, 90x80 pixels")
    mine.locator(".toast-body", has_text="text.png' isn't a picture").wait_for()
    theirs = visit(width=400)
    open_tab(theirs, "Train")
    theirs.locator("#take-toy").wait_for()
    theirs.wait_for_timeout(1000)
    assert "pixels" not in theirs.locator("#photo-remarks").inner_text()
    for name in ("Train", "Adapters", "Generate"):
        open_tab(theirs, name)
        for folded in theirs.locator("#advanced button, #more-settings button").all():
            if folded.is_visible():
                folded.click()
        assert theirs.evaluate("document.documentElement.scrollWidth") <= 400
        assert theirs.evaluate(UNDER_THE_BAR) == []
    mine.reload()
    open_tab(mine, "Train")
    says(mine, "#photo-remarks", "1 photo, 90x80 pixels")


@pytest.mark.parametrize("path", ["/etc/passwd", "{folder}/secret", "{folder}/server.log", "{root}/README.md"])
def test_no_file_is_served_by_its_path(server, path):
    path = path.format(folder=server.folder, root=ROOT)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{server.url}gradio_api/file={urllib.parse.quote(path)}", timeout=PATIENCE)
    assert refusal.value.code == 403
