"""A frozen network that keeps less computes the same, to the bit."""

import copy

import pytest
import torch
from conftest import tiny_unet
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from svfit_dreambooth.bases.families import apply_svfit
from svfit_dreambooth.training.counting import kept_for_backward
from svfit_dreambooth.training.slim import _FrozenConv, _GatedGelu, _GroupNormSiLU, slim, unslim

MODULES = {
    "convolution": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), (2, 8, 9, 7)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2, bias=False), (2, 8, 9, 7)),
    "pointwise": (lambda: nn.Conv2d(8, 6, 1), (2, 8, 5, 5)),
    "residual block": (lambda: ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=5, groups=4), (2, 8, 6, 6)),
    "with shortcut": (lambda: ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=5, groups=4), (2, 8, 6, 6)),
    "resampling": (
        lambda: ResnetBlock2D(in_channels=8, temb_channels=5, groups=4, up=True),
        (2, 8, 6, 6),
    ),
    "geglu": (lambda: GEGLU(8, 12), (2, 7, 8)),
}


def run(module, x, temb):
    """Output, and gradient of the input under a fixed gradient of the output."""
    x = x.clone().requires_grad_()
    output = run_plainly(module, x, temb)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    (output * weights).sum().backward()
    return output.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODULES)
def test_output_and_gradient_stay_to_the_bit(kind, dtype):
    torch.manual_seed(0)
    make, shape = MODULES[kind]
    module = make().to(dtype).requires_grad_(False)
    x, temb = torch.randn(shape, dtype=dtype), torch.randn(2, 5, dtype=dtype)
    expected = run(module, x, temb)
    slim(module)
    assert all(torch.equal(a, b) for a, b in zip(run(module, x, temb), expected, strict=True))
    with torch.no_grad():
        assert torch.equal(run_plainly(module, x, temb), expected[0])
    unslim(module)
    assert not any("forward" in vars(part) for part in module.modules())
    assert all(torch.equal(a, b) for a, b in zip(run(module, x, temb), expected, strict=True))


def run_plainly(module, x, temb):
    return module(x, temb) if isinstance(module, ResnetBlock2D) else module(x)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    gain, offset = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    check = torch.autograd.gradcheck
    assert check(lambda x: _FrozenConv.apply(x, weight, bias, (2, 2), (1, 1), (1, 1), 1), x)
    assert check(lambda x: _GroupNormSiLU.apply(x, gain, offset, 2, 1e-5), x)
    assert check(_GatedGelu.apply, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_unet_keeps_less_and_its_shifts_learn_the_same(autocast):
    torch.manual_seed(0)
    unet = tiny_unet().train()
    shifts = apply_svfit(unet)
    for shift in shifts.values():
        shift.requires_grad_(True)
        shift.data = 0.1 * torch.randn_like(shift)
    inputs = (torch.randn(2, 4, 16, 16), torch.zeros(2), torch.randn(2, 7, unet.config.cross_attention_dim))

    def gradients():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), kept_for_backward(unet, (), False) as count:
            output = unet(*inputs, return_dict=False)[0]
        output.float().square().mean().backward()
        found = [shift.grad.clone() for shift in shifts.values()]
        for shift in shifts.values():
            shift.grad = None
        return output.detach(), found, count()

    output, expected, kept = gradients()
    slim(unet)
    slim(unet)  # a second time changes nothing
    slim_output, found, kept_slim = gradients()
    assert torch.equal(slim_output, output)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert kept_slim < 0.8 * kept
    twin = copy.deepcopy(unet)
    assert twin.conv_in.forward.args[0] is twin.conv_in


def test_a_trained_convolution_gets_its_gradient():
    conv = nn.Conv2d(3, 2, 3)
    slim(conv)
    conv(torch.randn(1, 3, 5, 5, requires_grad=True)).sum().backward()
    assert conv.weight.grad is not None and conv.bias.grad is not None
