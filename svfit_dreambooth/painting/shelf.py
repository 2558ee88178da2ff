"""The adapters that are in memory: read from their files once as long as memory allows, and at rest on a pipeline.

Beside the base and its directions are held at most `most_bytes` of adapters, in float32: those that
are loaded, and those that were read to be checked and wait for their turn.  Where more are asked for, those that were
used longest ago make room; they are read again when they are needed again.
"""

from collections.abc import Sequence
from pathlib import Path

from svfit_dreambooth.adapter.file import Adapter, read_adapter
from svfit_dreambooth.adapter.source import find_adapter
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import size_text
from svfit_dreambooth.painting.loading import load_adapter, unload_adapter
from svfit_dreambooth.painting.matching import check_adapter

MOST_BYTES = 256_000_000  # about 450 of Stable Diffusion 1.5 at full rank


class AdapterFiles:
    """Adapters by the names of their files or repositories; those that fit into `most_bytes` are read once."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.waiting: dict[str, Adapter] = {}  # read, and not loaded yet
        self.bytes = 0  # held by those
        self.read: set[str] = set()  # that were once

    def look(self, name: str) -> Adapter:
        """The adapter `name`, which waits for its turn if there is room."""
        adapter = self.waiting.get(name)
        if adapter is None:
            adapter = read_adapter(find_adapter(name))
            self.read.add(name)
            if self.bytes + size_of(adapter) <= self.most_bytes:
                self.waiting[name] = adapter
                self.bytes += size_of(adapter)
        return adapter

    def take(self, name: str) -> Adapter:
        """The adapter `name`, for whoever holds it from now on."""
        adapter = self.waiting.pop(name, None)
        if adapter is None:
            return read_adapter(find_adapter(name))
        self.bytes -= size_of(adapter)
        return adapter

    def drop(self) -> None:
        """Lets go of the one that was read last."""
        _, adapter = self.waiting.popitem()
        self.bytes -= size_of(adapter)


class Shelf:
    """The adapters at rest on a pipeline; those used longest ago make room for new ones."""

    def __init__(
        self,
        model: BaseModel,
        most_bytes: int = MOST_BYTES,
        *,
        files: AdapterFiles | None = None,
        allow_other_base: bool = False,
        basis_cache_dir: str | Path | None = None,
    ) -> None:
        """`most_bytes`: of all that wait in `files` and are loaded; the base and its directions come on top of that."""
        self.model = model
        self.most_bytes = most_bytes
        self.files = files or AdapterFiles(most_bytes)
        self.sizes: dict[str, int] = {}  # name of a loaded one -> bytes, the one used longest ago first
        self.allow_other_base = allow_other_base
        self.basis_cache_dir = basis_cache_dir
        self.known_hashes: dict[str, str] = {}  # the base's weights stay as they are

    @property
    def bytes(self) -> int:
        """Held in all."""
        return sum(self.sizes.values()) + self.files.bytes

    def check(self, name: str) -> None:
        """Raises SVFitError for an adapter of another base than this."""
        check_adapter(
            self.model.pipeline,
            self.files.look(name),
            name,
            allow_other_base=self.allow_other_base,
            known_hashes=self.known_hashes,
        )

    def bring(self, names: Sequence[str]) -> None:
        """Loads those of the adapters `names` that are not here.  Raises SVFitError where they are more than may be."""
        for name in names:
            if name in self.sizes:
                self.sizes[name] = self.sizes.pop(name)
        missing = {name: self.files.take(name) for name in names if name not in self.sizes}
        sizes = {name: size_of(adapter) for name, adapter in missing.items()}
        needed = sum(sizes.values()) + sum(size for name, size in self.sizes.items() if name in names)
        if needed > self.most_bytes:
            raise SVFitError(
                f"the {len(names)} adapters of one batch hold {size_text(needed)}, and {size_text(self.most_bytes)} are "
                "allowed for adapters: allow more, or paint fewer pictures at once with batch_size.",
            )
        self._make_room(sum(sizes.values()), names)
        for name, adapter in missing.items():
            load_adapter(
                self.model.pipeline,
                adapter,
                0.0,
                name,
                allow_other_base=self.allow_other_base,
                basis_cache_dir=self.basis_cache_dir,
                known_hashes=self.known_hashes,
            )
            self.sizes[name] = sizes[name]

    def _make_room(self, size: int, needed: Sequence[str]) -> None:
        """Until `size` bytes more may be held: unloads others than those `needed`, then drops those that wait."""
        for name in [name for name in self.sizes if name not in needed]:
            if self.bytes + size <= self.most_bytes:
                return
            unload_adapter(self.model.pipeline, name)
            del self.sizes[name]
        while self.files.waiting and self.bytes + size > self.most_bytes:
            self.files.drop()


def size_of(adapter: Adapter) -> int:
    """Bytes of all values of an adapter."""
    tensors = [*adapter.shifts.values(), *adapter.word_deltas().values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
