"""Weights that are read each time they are asked for, so that those of a large base never lie in memory together."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor


class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each read anew by its function."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.readers = dict(readers)

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def chosen(weights: Mapping[str, Tensor], names: Iterable[str]) -> Mapping[str, Tensor]:
    """Those of `weights`; none is read."""
    return Lazy({name: lambda name=name: weights[name] for name in names})  # type: ignore[misc]


def joined(*several: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """All of them, whose names differ; none is read."""
    return Lazy({name: lambda name=name, own=own: own[name] for own in several for name in own})  # type: ignore[misc]
