"""The adapter file: read, checked, written, described."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`read_adapter`, which copies of comfyui/svfit_loader.py that people have import from here."""
    if name == "read_adapter":
        from svfit_dreambooth.adapter.file import read_adapter

        return read_adapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
