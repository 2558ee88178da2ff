"""The adapters that are on the open base: exchanged as orders need them, known by their files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Loaded:
    """Which files are on a base, under which names of its pipeline."""

    def __init__(self) -> None:
        self.names: dict[tuple[str, int, int], str] = {}  # (path, time, size) of a file -> its name on the pipeline
        self._lenient: set[str] = set()  # those names whose base was not to be the adapter's own
        self.trained_on: Any = None  # the base that they were trained on, where it is another one

    def clear(self) -> None:
        """Nothing is on a base that was just opened."""
        self.names.clear()
        self._lenient.clear()
        self.trained_on = None

    def directions_of(self, model: Any, trained_on: Any) -> None:
        """From now on the adapters are those of the base `trained_on`; None: of `model`, which carries them."""
        if trained_on is not self.trained_on:
            for key in list(self.names):
                self._unload(model, key)
            self.trained_on = trained_on

    def exchange(self, model: Any, adapters: Sequence[tuple[Path, Any]], any_base: bool) -> list[str]:
        """Puts exactly `adapters`, (file, what was read from it) each, on the base, at rest; returns their names there."""
        from svfit_dreambooth.painting.loading import load_adapter

        keys = [_key(path) for path, _ in adapters]
        for key in [key for key in self.names if self.names[key] in self._lenient and not any_base]:
            self._unload(model, key)  # what was let on then is looked at again
        # newcomers come before others leave, so that the directions stay in the layers
        leaving = {key: name for key, name in self.names.items() if key not in keys}
        for key, (path, adapter) in zip(keys, adapters, strict=True):
            if key in self.names:
                continue
            name, number = path.stem, 1
            while name in leaving.values() and number == 1:
                old = next(old for old, taken in leaving.items() if taken == name)
                self._unload(model, old)
                del leaving[old]
            while name in self.names.values():
                number += 1
                name = f"{path.stem}-{number}"
            load_adapter(model.pipeline, adapter, 0.0, name, allow_other_base=any_base, trained_on=self.trained_on)
            self.names[key] = name
            if any_base:
                self._lenient.add(name)
        for key in leaving:
            self._unload(model, key)
        return [self.names[key] for key in keys]

    def _unload(self, model: Any, key: tuple[str, int, int]) -> None:
        from svfit_dreambooth.painting.loading import unload_adapter

        unload_adapter(model.pipeline, self.names[key])
        self._lenient.discard(self.names.pop(key))


def _key(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size
