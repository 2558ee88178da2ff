"""The slow imports: one thread at a time, whoever comes first."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from svfit_dreambooth import web

HEAVY = ("bases.opening", "painting.", "sharing.", "training.estimate", "training.plan")
# called within `Studio.paint` or after `resolve_for_run` alone, which import them
LATER = ("rooms/studio.py", "rooms/together.py", "rooms/loaded.py", "rooms/pictures.py")


@pytest.mark.slow
def test_threads_that_come_at_once_all_get_what_they_import():
    script = """
import threading, traceback
from svfit_dreambooth.web.rooms.libraries import libraries
failed = []
def come():
    try:
        libraries()
        from diffusers import DiffusionPipeline
        from transformers import CLIPTextModel
    except Exception:
        failed.append(traceback.format_exc())
threads = [threading.Thread(target=come) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("".join(failed))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "", done.stdout


def test_handlers_ask_for_the_libraries_before_they_import_what_rests_on_them():
    folder = Path(web.__file__).parent
    for path in folder.rglob("*.py"):
        if path.relative_to(folder).as_posix() in LATER:
            continue
        for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
            asked = False
            for node in function.body:
                asked |= isinstance(node, ast.Expr) and ast.unparse(node) == "libraries()"
                names = [node.module.removeprefix("svfit_dreambooth.")] if isinstance(node, ast.ImportFrom) else []
                assert asked or not any(name.startswith(HEAVY) for name in names), (path.name, function.name)
