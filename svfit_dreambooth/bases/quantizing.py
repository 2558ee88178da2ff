"""The denoiser of a base held in 8 or 4 bits a weight: int8 and fp8 by torchao, nf4 by bitsandbytes.

Weights alone are quantised, those of the linear layers in the blocks that a denoiser repeats; in between are numbers of
the run's own type.  Each layer keeps a function that reads its weight as it is stored, from which directions are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.quantized import kind_of

Quantization = Literal["int8", "fp8", "nf4"]
BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5625}  # of a weight; nf4 has a float32 for each 64 beside
LIBRARY = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}


def block_layers(denoiser: nn.Module, family: type[Family] | Family) -> list[str]:
    """The linear layers within the blocks that gradient checkpointing runs again, nearly all of the weights."""
    return [
        f"{path}.{inner}"
        for path, block in denoiser.named_modules()
        if isinstance(block, family.checkpointed)
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    ]


def check_library(kind: Quantization) -> None:
    """Raises SVFitError where there is no such kind, or the library that it needs is not installed."""
    if kind not in LIBRARY:
        raise SVFitError(f"quantize is {kind!r}: use one of {', '.join(LIBRARY)}.", "quantize")
    try:
        __import__(LIBRARY[kind])
    except ImportError:
        raise SVFitError(
            f"quantize {kind} needs the library {LIBRARY[kind]}: install it with pip install {LIBRARY[kind]}.",
            "quantize",
        ) from None


def quantize_layers(
    network: nn.Module,
    names: Sequence[str],
    kind: Quantization,
    readers: Mapping[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Quantises the linear layers `names` of `network` in place, one after the other.

    `readers`: "<layer>.weight" -> what reads the weight as it is stored; None: its copy from before is kept.
    """
    check_library(kind)
    for name in names:
        parent_path, _, attribute = name.rpartition(".")
        parent, layer = network.get_submodule(parent_path), network.get_submodule(name)
        read = readers[f"{name}.weight"] if readers is not None else _kept(layer)
        layer = _nf4(layer) if kind == "nf4" else _by_torchao(layer, kind)
        layer.stored = read  # type: ignore[assignment]
        layer.requires_grad_(False)
        layer.register_forward_pre_hook(_in_one_type)
        layer.register_forward_hook(_out_in_that_type)
        parent.register_module(attribute, layer)


def _kept(layer: Any) -> Callable[[], Tensor]:
    weight = layer.weight.detach().clone()
    return lambda: weight


def _by_torchao(layer: Any, kind: str) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    holder = nn.Sequential(layer)  # which quantize_ replaces the layer's weight in
    quantize_(holder, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
    return holder[0]


def _nf4(layer: Any) -> Any:
    from bitsandbytes.nn import Linear4bit

    device = layer.weight.device
    coarse = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    kind: Any = type(coarse.weight)  # bitsandbytes' Params4bit
    coarse.weight = kind(layer.weight.detach(), requires_grad=False, compress_statistics=False, quant_type="nf4").to(
        device
    )
    coarse.bias = layer.bias
    return coarse.train(layer.training)


def _in_one_type(layer: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Before a product: what goes in is cast as autocast would, which does not reach into quantised products.

    An fp8 weight keeps the type that it had when it was quantised, and is told that of what goes in.
    """
    (input,) = inputs
    if torch.is_autocast_enabled(input.device.type):
        input = input.to(torch.get_autocast_dtype(input.device.type))
    weight = layer.weight
    if weight.dtype != input.dtype and hasattr(weight, "__tensor_unflatten__"):
        names, about = weight.__tensor_flatten__()
        parts = {name: getattr(weight, name) for name in names}
        about = {**about, "dtype": input.dtype}
        told = type(weight).__tensor_unflatten__(parts, about, weight.shape, weight.stride())
        layer.weight = nn.Parameter(told, requires_grad=False)
    return (input,)


def _out_in_that_type(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)


def empty(network: nn.Module) -> None:
    """Gives the memory of a network back, whoever still knows of it."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and kind_of(layer) == "nf4":  # which cannot go to the meta device
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    network.to("meta")


def check_unquantized(name: str, part: str, config: Mapping[str, Any]) -> None:
    """Raises SVFitError for the config of a network of the base `name` whose files hold it quantised already."""
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method", "another format") if isinstance(found, Mapping) else found
        raise SVFitError(
            f"{name} holds its {part} quantised already ({method}), and directions are those of the weights as they were "
            "before: give the base that it was made from, and quantise that by quantize.",
            "quantize",
        )
