"""Reading CLIP some layers before its end, as many anime bases were taught: `clip_skip`.

Counted as diffusers counts, 0 for none; A1111, ComfyUI and kohya's scripts show 1 more ("Clip skip: 2" is 1 here).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Skip = Callable[[Any, int], list[RemovableHandle]]  # how an encoder is read that many layers earlier


def clip_skip_of(encoder: Any) -> int:
    """How many layers earlier than its family does `encoder` is read."""
    return getattr(_bare(encoder), "svfit_clip_skip", (0,))[0]


def set_clip_skip(encoder: Any, count: int, skip: Skip) -> None:
    """Has `encoder` read `count` layers earlier from now on, whatever held before."""
    encoder = _bare(encoder)
    _, handles = getattr(encoder, "svfit_clip_skip", (0, ()))
    for handle in handles:
        handle.remove()
    encoder.svfit_clip_skip = (count, skip(encoder, count) if count else ())


def hand_through(encoder: Any, count: int) -> list[RemovableHandle]:
    """The last `count` layers return what they are given, which the last norm then ends up with."""

    def unchanged(layer: nn.Module, given: tuple[Any, ...], made: Tensor) -> Tensor:
        return given[0]  # (prompts, tokens, dim)

    layers = getattr(encoder, "text_model", encoder).encoder.layers
    return [layer.register_forward_hook(unchanged) for layer in layers[-count:]]


def hide_last_states(encoder: Any, count: int) -> list[RemovableHandle]:
    """The last `count` hidden states are not told; a pooled output stays that of the whole encoder."""

    def hide(encoder: nn.Module, given: tuple[Any, ...], made: Any) -> Any:
        if made.hidden_states is not None:
            made.hidden_states = made.hidden_states[:-count]
        return made

    return [encoder.register_forward_hook(hide)]


def _bare(encoder: Any) -> Any:
    return getattr(encoder, "_orig_mod", encoder)  # without what torch.compile puts around it
