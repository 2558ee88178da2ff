"""Memory counted by running a network on PyTorch's fake tensors, which have shapes but no numbers."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Living(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _free(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def kept_for_backward(model: nn.Module, redone: tuple[type[nn.Module], ...], checkpointing: bool) -> Iterator[Any]:
    """Within it, what `model` keeps for its backward pass is added up; yields a function that tells how much.

    With checkpointing, a block of the kinds `redone` keeps its input alone, and the largest block's own tensors live while it is redone.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # holds them, so that no storage is counted twice or reused
    seen: set[int] = set()
    held: list[Tensor] = []  # the same for the inputs of blocks
    received: set[int] = set()
    outside = 0
    blocks: list[tuple[int, int]] = []  # bytes of input, bytes kept within
    inside: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        nonlocal outside
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(tensor)
            if inside:
                inside[-1] += storage.nbytes()
            else:
                outside += storage.nbytes()
        return tensor

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        inside.append(0)

    def leave(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given = 0
        for value in (*inputs, *named.values()):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in own | received:
                received.add(value.untyped_storage()._cdata)  # what all blocks are told is kept once
                held.append(value)
                given += value.untyped_storage().nbytes()
        blocks.append((given, inside.pop()))

    handles = []
    for module in model.modules():
        if isinstance(module, redone):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, with_kwargs=True)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield (
                lambda: (
                    outside + sum(given for given, _ in blocks) + max((own for _, own in blocks), default=0)
                    if checkpointing
                    else outside + sum(own for _, own in blocks)
                )
            )
    finally:
        for handle in handles:
            handle.remove()
