"""What keeps a pipeline's weights off the GPU, and how adapters get at them all the same.

Of diffusers' three ways, model offload moves whole models and is no hindrance.  Sequential offload leaves no weights in
the layers, and group offload moves those layers that it has hooked.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.hooks import AlignDevicesHook, SequentialHook
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _is_group_offload_enabled, _maybe_remove_and_reapply_group_offloading
from torch import nn

from svfit_dreambooth.bases.families import pipeline_components
from svfit_dreambooth.method.targets import walk


@contextmanager
def layers_exchanged(pipeline: DiffusionPipeline) -> Iterator[None]:
    """`offloading_lifted`; layers that are put in or taken out within it are offloaded as the others are."""
    with offloading_lifted(pipeline):
        try:
            yield
        finally:
            for model in pipeline_components(pipeline).values():
                _maybe_remove_and_reapply_group_offloading(model)


@contextmanager
def offloading_lifted(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within it the weights are real, also under sequential CPU offload, which otherwise leaves none in the layers."""
    if not _sequentially_offloaded(pipeline):
        yield
        return
    device = next(
        hook.execution_device
        for model in pipeline_components(pipeline).values()
        for _, module in walk(model)
        for hook in _hooks(module)
        if isinstance(hook, AlignDevicesHook) and hook.execution_device is not None
    )
    pipeline.remove_all_hooks()
    try:
        yield
    finally:
        pipeline.enable_sequential_cpu_offload(device=device)


def weights_at_hand(pipeline: DiffusionPipeline) -> bool:
    """Whether layers hold their own weights between pictures, so that changing those changes what is painted."""
    return not _sequentially_offloaded(pipeline) and not any(
        _is_group_offload_enabled(model) for model in pipeline_components(pipeline).values()
    )


def _hooks(module: nn.Module) -> list[object]:
    hook = vars(module).get("_hf_hook")
    return list(hook.hooks) if isinstance(hook, SequentialHook) else [hook]


def _sequentially_offloaded(pipeline: DiffusionPipeline) -> bool:
    return any(
        isinstance(hook, AlignDevicesHook) and hook.offload
        for model in pipeline_components(pipeline).values()
        if any(_hooks(top) != [None] for top in (model, getattr(model, "_orig_mod", model)))  # spares the walk
        for _, module in walk(model)
        for hook in _hooks(module)
    )
