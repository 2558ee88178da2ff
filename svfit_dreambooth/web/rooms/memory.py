"""What a visitor had filled in, so that a page that is opened again looks as it did: `form.json` in the visitor's folder."""

import json
import threading
from pathlib import Path
from typing import Any

from svfit_dreambooth.files import write_atomically

FORM = "form.json"
MAX_TEXT = 4000  # characters that are remembered of a field
_writing = threading.Lock()


def remembered(folder: Path) -> dict[str, Any]:
    """Field -> value: text, number or truth; nothing else, whatever the file holds."""
    try:
        form = json.loads((folder / FORM).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: value for name, value in form.items() if _is_plain(value)} if isinstance(form, dict) else {}


def remember(folder: Path, values: dict[str, Any]) -> None:
    """Keeps these; the other fields stay as they were."""
    new = {name: value[:MAX_TEXT] if isinstance(value, str) else value for name, value in values.items()}
    with _writing:
        form = remembered(folder) | {name: value for name, value in new.items() if _is_plain(value)}
        write_atomically(folder / FORM, json.dumps(form))


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
