"""The method on one layer, against the paper's dense form W' = U diag(S_trained) Vh + W_e."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.decomposition import decompose
from svfit_dreambooth.method.layer import SVFitLinear, merged_is_cheaper

SHAPES = [(24, 24), (24, 40), (40, 24)]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def make_layer(out_features=24, in_features=40, rank=9, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    U, S, Vh = decompose(linear.weight, rank)
    return linear, SVFitLinear(linear, U, Vh), (U, S, Vh)


def dense_form(linear, factors, S_trained, input):
    """The paper's equation, written from its text: nothing here comes from the package."""
    U, S, Vh = factors
    W_r = U @ torch.diag(S_trained) @ Vh
    W_e = linear.weight.double() - U @ torch.diag(S) @ Vh
    output = input @ (W_r + W_e).T
    return output if linear.bias is None else output + linear.bias.double()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("rank", [3, 24])
def test_untrained_layer_is_the_base_to_the_bit(dtype, tokens, rank, autocast):
    linear, layer, _ = make_layer(rank=rank, dtype=dtype)
    input = torch.randn(tokens, 40, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = linear(input)
        for route in (layer, layer.forward_merged, layer.forward_factored):
            assert torch.equal(route(input), expected)
    assert layer.weight is linear.weight
    assert type(layer.to_plain()) is nn.Linear
    assert torch.equal(layer.to_plain()(input), linear(input))


@pytest.mark.parametrize("route", ["forward", "forward_merged", "forward_factored"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 9, 24])
def test_routes_equal_the_dense_form(route, dtype, shape, rank):
    linear, layer, factors = make_layer(*shape, rank=rank, dtype=dtype)
    input = torch.randn(2, 5, shape[1], dtype=torch.float64)
    shift = torch.randn(rank, dtype=torch.float64)
    weights = torch.randn(2, 5, shape[0], dtype=torch.float64)

    expected_input = input.to(dtype).double().requires_grad_()
    S_trained = (factors[1] + shift).requires_grad_()
    expected = dense_form(linear, factors, S_trained, expected_input)
    (expected * weights).sum().backward()

    layer.shift.data = shift.to(layer.shift.dtype)
    actual_input = input.to(dtype).requires_grad_()
    actual = getattr(layer, route)(actual_input)
    (actual * weights.to(dtype)).sum().backward()

    def error(a, b):
        return torch.dist(a.double(), b) / b.norm()

    assert error(actual, expected) < TOLERANCE[dtype]
    assert error(layer.shift.grad, S_trained.grad) < TOLERANCE[dtype]
    assert error(actual_input.grad, expected_input.grad) < TOLERANCE[dtype]


def test_the_cheaper_route_is_taken(monkeypatch):
    taken = []
    for route in ("forward_merged", "forward_factored"):
        original = getattr(SVFitLinear, route)
        monkeypatch.setattr(
            SVFitLinear,
            route,
            lambda self, x, original=original, route=route: (taken.append(route), original(self, x))[1],
        )
    _, layer, _ = make_layer(24, 24, 24)
    # a square layer of full rank: merged from 2d/3 = 16 tokens on when training, from d/2 = 12 on otherwise
    for tokens, training in [(16, True), (17, True), (12, False), (13, False)]:
        with torch.set_grad_enabled(training):
            layer(torch.randn(tokens, 24, dtype=torch.float64))
    assert taken == ["forward_factored", "forward_merged"] * 2
    assert not merged_is_cheaper(77, 768, 1280, 768, training=True)
    assert merged_is_cheaper(4096, 320, 320, 320, training=True)


@pytest.mark.parametrize("tokens", [1, 300])
def test_a_shift_for_every_sample(tokens):
    linear, layer, factors = make_layer()
    shifts = torch.randn(3, 1, 9, dtype=torch.float64)
    layer.shift.data = shifts
    input = torch.randn(3, tokens, 40, dtype=torch.float64)
    output = layer(input)
    for sample in range(3):
        expected = dense_form(linear, factors, factors[1] + shifts[sample, 0], input[sample])
        assert torch.dist(output[sample], expected) < 1e-9
    with pytest.raises(SVFitError, match="one per sample"):
        layer.merge()


@pytest.mark.parametrize("convert", ["half", "bfloat16", "to"])
def test_shift_keeps_its_precision(convert):
    _, layer, _ = make_layer(dtype=torch.float32)
    value = torch.full((9,), 1 + 2**-20)
    layer.shift.data = value.clone()
    layer.shift.grad = value.clone()
    parameter = layer.shift
    model = nn.Sequential(layer)
    model = model.to(torch.bfloat16) if convert == "to" else getattr(model, convert)()
    assert layer.weight.dtype == layer.U.dtype == layer.Vh.dtype != torch.float32
    assert layer.shift is parameter and layer.shift.dtype == torch.float32
    assert torch.equal(layer.shift, value) and torch.equal(layer.shift.grad, value)
    model.double()
    assert layer.shift.dtype == torch.float64 and torch.equal(layer.shift.float(), value)
    assert layer.shift.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merge_and_unmerge(dtype):
    linear, layer, factors = make_layer(dtype=dtype)
    base = linear.weight.detach().clone()
    input = torch.randn(4, 40, dtype=dtype)
    layer.shift.data = torch.randn_like(layer.shift)
    expected = dense_form(linear, factors, factors[1] + layer.shift.double(), input.double())
    layer.merge()
    layer.merge()  # a second merge adds nothing
    output = layer(input)
    assert torch.dist(output.double(), expected) / expected.norm() < TOLERANCE[dtype]
    layer.unmerge()
    assert torch.equal(layer.weight, base)


class OutOfMemory(TorchDispatchMode):
    """From the operation of that number on, from 0, nothing that needs new memory works."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation is not torch.ops.aten.copy_.default:
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_out_of_memory_while_merging_changes_nothing(dtype):
    _, layer, _ = make_layer(dtype=dtype)
    nn.init.normal_(layer.shift, std=0.5)
    input, weight = torch.randn(3, 40, dtype=dtype), layer.weight.detach().clone()
    expected, failures = layer(input), 0
    while layer.unmerged_weight is None:
        try:
            with OutOfMemory(failures):
                layer.merge()
        except torch.OutOfMemoryError:
            failures += 1
            assert torch.equal(layer.weight, weight) and torch.equal(layer(input), expected)
    assert failures > 3 and torch.allclose(layer(input), expected, rtol=1e-3, atol=1e-2)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_state_dict_holds_no_basis_and_accepts_base_checkpoints():
    _, layer, _ = make_layer()
    assert set(layer.state_dict()) == {"weight", "bias", "shift"}
    layer.shift.data.fill_(2.0)
    other = nn.Linear(40, 24, dtype=torch.float64)
    layer.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(layer.weight, other.weight) and (layer.shift == 2).all()
    layer.load_state_dict({**other.state_dict(), "shift": torch.ones(9, dtype=torch.float64)})
    assert (layer.shift == 1).all()


def test_deepcopy_and_training_mode():
    linear, _, (U, _, Vh) = make_layer()
    layer = SVFitLinear(linear.eval(), U, Vh)
    assert not layer.training
    twin = copy.deepcopy(layer)
    twin.shift.data.fill_(1.0)
    assert (layer.shift == 0).all() and twin.weight is not layer.weight


def test_a_basis_of_another_shape_is_refused():
    linear = nn.Linear(4, 6)
    with pytest.raises(SVFitError, match="does not fit a weight of shape"):
        SVFitLinear(linear, torch.zeros(4, 2), torch.zeros(2, 6))


def test_training_the_shift_lowers_a_loss():
    _, layer, _ = make_layer(dtype=torch.float32, rank=24)
    layer.requires_grad_(False)
    layer.shift.requires_grad_()
    input, target = torch.randn(64, 40), torch.randn(64, 24)
    optimizer = torch.optim.AdamW([layer.shift], lr=0.05)
    losses = []
    for _ in range(50):
        loss = F.mse_loss(layer(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("shape", [(3, 2), (3, 40, 2), (3, 4, 5, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_shift_for_every_sample_by_either_route(shape, bias):
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    U, _, Vh = decompose(linear.weight)
    layer = SVFitLinear(linear, U, Vh)
    layer.shift.data = torch.randn(3, 1, 5, dtype=torch.float64)
    input = torch.randn(*shape[:-1], 6, dtype=torch.float64)
    expected = torch.stack(
        [nn.functional.linear(input[i], linear.weight + U * layer.shift[i] @ Vh, linear.bias) for i in range(3)]
    )
    for forward in (layer, layer.forward_merged, layer.forward_factored):
        assert torch.allclose(forward(input), expected, atol=1e-12)
        with pytest.raises(SVFitError, match="shifts of 3 samples meet a batch of 2"):
            forward(input[:2])
