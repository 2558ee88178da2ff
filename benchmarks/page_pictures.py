"""The pictures of the page in docs/: a run, pictures painted with its adapter, the library, and a phone.

    python benchmarks/page_pictures.py [--output_dir docs] [--preset balanced]

Starts the page on a folder of its own, does what a person would do in Chromium, and takes pictures on the way.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 900  # seconds that a run may take
WIDTH, PHONE = 1280, 400
PROMPT = "a photo of sks dog in the snow"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs")
    parser.add_argument("--preset", default="balanced")
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "app.py"), "--data_dir", folder, "--port", str(port)]
        server = subprocess.Popen(command, cwd=ROOT)
        try:
            url = f"http://127.0.0.1:{port}/"
            _wait_for(url)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                context = browser.new_context(viewport={"width": WIDTH, "height": 900})
                context.set_default_timeout(PATIENCE * 1000)
                page = context.new_page()
                page.goto(url)
                _train(page, options.preset)
                _take(page, options.output_dir / "web-train.png")
                _paint(page)
                _take(page, options.output_dir / "web-generate.png")
                page.set_viewport_size({"width": PHONE, "height": 900})
                time.sleep(2)
                _take(page, options.output_dir / "web-phone.png")
                page.set_viewport_size({"width": WIDTH, "height": 900})
                page.get_by_role("tab", name="Adapters").click()
                time.sleep(4)
                _take(page, options.output_dir / "web-adapters.png")
                browser.close()
        finally:
            server.kill()
            server.wait()


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=PATIENCE).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)


def _train(page: Page, preset: str) -> None:
    """Takes the photos of a toy, trains, and waits until the result has been measured and painted."""
    page.get_by_role("tab", name="Train").click()
    page.locator("#take-toy").click()
    page.locator("#thumbs img").first.wait_for()
    page.locator("#preset label", has_text=preset).click()
    page.locator("#start-training").click()
    page.locator("#run-status", has_text="finished").wait_for()
    page.locator("#sheet", has_text="likeness to the subject").wait_for()
    time.sleep(3)


def _paint(page: Page) -> None:
    """Paints with the run's adapter, each picture beside the base's."""
    page.locator("#try-run").click()
    page.get_by_text("Strength of dog_patch").wait_for()
    page.locator("#prompt textarea").fill(PROMPT)
    page.locator("#count input[type=number]").fill("3")
    page.locator("#new-seed input").uncheck()
    page.locator("#seed input").fill("12")
    page.locator("#mode label", has_text="beside the base model").click()
    time.sleep(2)
    page.locator("#generate-button").click()
    page.locator("#generate-status", has_text="6 pictures done").wait_for()
    time.sleep(3)


def _take(page: Page, path: Path) -> None:
    """The whole page as a PNG of few colours, so that the repository stays small."""
    seen = page.viewport_size or {"width": WIDTH, "height": 900}
    page.set_viewport_size({**seen, "height": page.evaluate("document.documentElement.scrollHeight")})
    time.sleep(2)  # bars that stay in sight move to the end
    page.screenshot(path=path)
    page.set_viewport_size(seen)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path}: {small.width}x{small.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
