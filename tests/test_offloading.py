"""diffusers' private functions on which offloading rests: where they go, these tests say what broke."""

import torch
from diffusers.hooks import apply_group_offloading, group_offloading
from torch import nn


def _private(name):
    function = getattr(group_offloading, name, None)
    assert function is not None, (
        f"diffusers has no hooks.group_offloading.{name} any more: painting/offloading.py needs another way to "
        "tell whether a network is offloaded by groups, and to hook layers that were put in or taken out."
    )
    return function


def _offloaded() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    return model


def test_group_offloading_is_seen():
    is_enabled = _private("_is_group_offload_enabled")
    assert is_enabled(_offloaded())
    assert not is_enabled(nn.Sequential(nn.Linear(4, 4)))


def test_a_layer_that_was_put_in_is_hooked_as_its_neighbours_are():
    reapply = _private("_maybe_remove_and_reapply_group_offloading")
    model = _offloaded()
    hooked = model[1]._diffusers_hook.get_hook("group_offloading")
    assert hooked is not None
    model[1] = nn.Linear(4, 4)
    reapply(model)
    assert model[1]._diffusers_hook.get_hook("group_offloading") is not None
    assert model(torch.ones(1, 4)).shape == (1, 4)
