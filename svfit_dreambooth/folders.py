"""Where things are kept on this computer: data that people made, and what can be computed again."""

import os
from pathlib import Path

import platformdirs


def data_dir() -> Path:
    """What the page keeps: $SVFIT_HOME, else the user's data folder.

    Where an earlier version has kept it elsewhere (below ~/.local/share, also on macOS and Windows), it stays there.
    """
    earlier = _xdg("XDG_DATA_HOME", ".local/share") / "svfit-dreambooth"
    return _chosen("SVFIT_HOME", platformdirs.user_data_path("svfit-dreambooth", appauthor=False), earlier)


def cache_dir() -> Path:
    """What can be computed again: $SVFIT_CACHE, else below the user's cache folder; an earlier one stays in use."""
    earlier = _xdg("XDG_CACHE_HOME", ".cache") / "svfit_dreambooth"
    return _chosen("SVFIT_CACHE", platformdirs.user_cache_path("svfit_dreambooth", appauthor=False), earlier)


def _xdg(variable: str, folder: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / folder)


def _chosen(variable: str, usual: Path, earlier: Path) -> Path:
    if own := os.environ.get(variable):
        return Path(own).expanduser()
    return earlier if earlier.is_dir() and not usual.is_dir() else usual
