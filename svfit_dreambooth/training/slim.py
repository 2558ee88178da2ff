"""A frozen network that keeps for its backward pass only what the gradient of its input needs.

PyTorch keeps the input of every convolution for the gradient of its weight, also where that weight is frozen, and
the result of every elementwise step.  Where nothing but a few adapters is trained, more than half of it is never
needed (Bhatia and Dangel, "Lowering PyTorch's Memory Consumption for Selective Differentiation", 2024,
arXiv:2404.12406, for the convolutions).  Here

    convolution             keeps nothing but its weight
    SiLU after GroupNorm    computes the norm's output again from its input
    GEGLU                   computes gelu(gate) again, and writes both halves of its gradient where they belong

Output and gradients stay what they were, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def slim(model: nn.Module) -> None:
    """Lets the frozen convolutions, residual blocks and GEGLUs of `model` keep less; `unslim` takes it back.

    A layer that is trained, or is of a kind not known here, works as before.
    """
    for module in model.modules():
        if type(module) in FORWARDS and "forward" not in vars(module):
            module.forward = partial(FORWARDS[type(module)], module)  # type: ignore[method-assign]


def unslim(model: nn.Module) -> None:
    """Gives every module of `model` its own forward again."""
    for module in model.modules():
        own = vars(module).get("forward")
        if isinstance(own, partial) and own.func in FORWARDS.values():
            del module.forward


def spare_memory(model: nn.Module, checkpointing: bool) -> None:
    """Lets a frozen `model` keep less for its backward pass: `slim`, and where `checkpointing`, gradient checkpointing.

    `spend_memory` takes both back.
    """
    slim(model)
    if checkpointing:
        _diffusers_or_transformers(model, "enable_gradient_checkpointing", "gradient_checkpointing_enable")


def spend_memory(model: nn.Module) -> None:
    """`model` as it was before `spare_memory`."""
    unslim(model)
    if getattr(model, "is_gradient_checkpointing", False):
        _diffusers_or_transformers(model, "disable_gradient_checkpointing", "gradient_checkpointing_disable")


def _diffusers_or_transformers(model: nn.Module, *names: str) -> None:
    act: Callable[[], None] = next(getattr(model, name) for name in names if hasattr(model, name))
    act()


def _conv(module: nn.Conv2d, x: Tensor) -> Tensor:
    """(batch, in, height, width) -> (batch, out, height', width')"""
    weight, bias = module.weight, module.bias
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained or not x.requires_grad or not torch.is_grad_enabled() or module.padding_mode != "zeros":
        return nn.Conv2d.forward(module, x)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _FrozenConv.apply(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)


def _resnet(block: ResnetBlock2D, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """(batch, in, height, width), (batch, dim) -> (batch, out, height, width)"""
    if not _is_plain(block):
        return ResnetBlock2D.forward(block, input_tensor, temb, *args, **kwargs)
    hidden = block.conv1(_norm_silu(block.norm1, input_tensor))  # (batch, out, height, width)
    if temb is not None:
        hidden = hidden + block.time_emb_proj(F.silu(temb))[:, :, None, None]
    hidden = block.conv2(block.dropout(_norm_silu(block.norm2, hidden)))
    shortcut = input_tensor if block.conv_shortcut is None else block.conv_shortcut(input_tensor.contiguous())
    return shortcut + hidden


def _is_plain(block: ResnetBlock2D) -> bool:
    """Whether the block is the one of Stable Diffusion: no resampling inside, time embedding added, not scaled."""
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
        and block.time_emb_proj is not None
        and not block.skip_time_act
        and block.output_scale_factor == 1
        and type(block.nonlinearity) is nn.SiLU
        and not block.norm1.weight.requires_grad
        and not block.norm2.weight.requires_grad
    )


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)), (batch, channels, height, width)"""
    if x.requires_grad and torch.is_grad_enabled() and x.dtype == norm.weight.dtype:
        return _GroupNormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return F.silu(norm(x))


def _geglu(module: GEGLU, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(batch, tokens, dim) -> (batch, tokens, inner)"""
    projected = module.proj(hidden_states)  # (batch, tokens, 2 * inner)
    if projected.requires_grad and torch.is_grad_enabled():
        return _GatedGelu.apply(projected)
    hidden, gate = projected.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height', width'); `how`: stride, padding, dilation, groups."""
        ctx.save_for_backward(weight)
        ctx.how, ctx.shape, ctx.strides, ctx.dtype = how, x.shape, x.stride(), x.dtype
        return F.conv2d(x, weight, bias, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        unread = torch.empty_strided(ctx.shape, ctx.strides, dtype=ctx.dtype, device=grad.device)  # only its shape
        grads = aten.convolution_backward(
            grad, unread, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return grads[0], *(None,) * 6


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        """(batch, channels, height, width) -> the same"""
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(_group_norm(x, weight, bias, groups, eps)[0], inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        normed, mean, rstd = _group_norm(x, weight, bias, ctx.groups, ctx.eps)
        grad = aten.silu_backward(grad, normed)
        batch, channels, *size = x.shape
        (dx, _, _) = aten.native_group_norm_backward(
            grad.contiguous(), x.contiguous(), mean, rstd, weight, batch, channels, size[0] * size[1], ctx.groups,
            [True, False, False],
        )  # fmt: skip
        return dx, None, None, None, None


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normed x, and mean and 1 / deviation of every group, (batch, groups)."""
    batch, channels, height, width = x.shape
    return aten.native_group_norm(x.contiguous(), weight, bias, batch, channels, height * width, groups, eps)


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        """(..., 2 * inner) -> (..., inner): the first half times gelu of the second."""
        ctx.save_for_backward(projected)
        hidden, gate = projected.chunk(2, dim=-1)
        return F.gelu(gate).mul_(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        hidden, gate = projected.chunk(2, dim=-1)
        result = torch.empty_like(projected)
        of_hidden, of_gate = result.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=of_hidden)
        aten.gelu_backward.grad_input(grad * hidden, gate, grad_input=of_gate)
        return result


FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Conv2d: _conv, ResnetBlock2D: _resnet, GEGLU: _geglu}
