"""The one-sided form of a layer, against the dense form it stands for, and in every place where both sides work."""

import copy

import pytest
import torch
from conftest import tiny_pipeline
from test_attention import (  # the same tests, on the other form
    test_a_peft_lora_sits_on_top_or_below,  # noqa: F401
    test_gradient_checkpointing_gives_the_same_gradients,  # noqa: F401
    test_half_precision_keeps_float32_shifts,  # noqa: F401
    test_merge_is_exact_to_undo_and_the_context_restores_what_was,  # noqa: F401
    test_patched_model_is_the_base_to_the_bit_and_removal_is_exact,  # noqa: F401
    unet,  # noqa: F401
)
from test_loading import (
    pipeline,  # noqa: F401
    test_group_offload_stays_on,  # noqa: F401
    test_load_from_file_and_unload_to_the_bit,  # noqa: F401
    test_merging_gives_the_same_pictures_and_is_undone,  # noqa: F401
    test_sequential_cpu_offload_stays_on,  # noqa: F401
)
from test_mixes import load_three, one_by_one, together
from torch import nn

from svfit_dreambooth import train
from svfit_dreambooth.adapter.file import read_adapter
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method import one_sided
from svfit_dreambooth.method.decomposition import decompose
from svfit_dreambooth.method.layer import SVFitConv2d, SVFitLinear
from svfit_dreambooth.method.one_sided import SVFitOneSided, small_values, svfit_layer
from svfit_dreambooth.sharing.export import export_lora
from svfit_dreambooth.sharing.merged_model import export_merged

SHAPES = [(24, 24), (24, 40), (40, 24)]
FORMATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def every_linear_layer_is_one_sided(monkeypatch):
    monkeypatch.setattr(one_sided, "BOTH_SIDES_MOST", 0)


def steep_layer(shape=(24, 40), dtype=torch.float64, bias=True):
    """A layer whose singular values fall from 3 to 1e-6: the last quarter lies below every floor."""
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    S = torch.cat([torch.linspace(3, 1, 18), torch.logspace(-3, -6, 6)]).double()
    linear.weight.data = U * S @ Vh
    return linear.to(dtype), (U, S, Vh)


def dense_output(linear, factors, shift, input):
    """x (W + U diag(shift) Vh)^T + b, with u_i = W v_i / S_i of the layer's own W wherever S_i is not tiny."""
    U, S, Vh = factors
    W = linear.weight.double()
    big = S > 0.1
    if W.shape[0] >= W.shape[1]:
        U = torch.where(big, W @ Vh.T / S, U)
    else:
        Vh = torch.where(big[:, None], U.T @ W / S[:, None], Vh)
    return nn.functional.linear(input, W + U * shift @ Vh, None if linear.bias is None else linear.bias.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [slice(None), slice(3, 21), slice(3), slice(20, 24)])
def test_output_and_gradients_equal_the_dense_form(shape, bias, kept):
    linear, (U, S, Vh) = steep_layer(shape, bias=bias)
    linear.weight.data += 1e-4 * torch.randn(shape, dtype=torch.float64)  # as rounding would
    factors = U[:, kept], S[kept], Vh[kept]
    layer = SVFitOneSided(linear, *factors)
    input = torch.randn(2, 5, shape[1], dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, shape[0], dtype=torch.float64)
    shift = torch.randn(layer.rank, dtype=torch.float64, requires_grad=True)
    expected = dense_output(linear, factors, shift, input)
    expected_grads = torch.autograd.grad((expected * weights).sum(), (input, shift))
    layer.shift.data = shift.detach().clone()
    output = layer(input)
    grads = torch.autograd.grad((output * weights).sum(), (input, layer.shift))
    for found, wanted in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert torch.dist(found, wanted) <= 1e-6 * wanted.norm()
    assert torch.dist(layer(input), nn.functional.linear(input, linear.weight + layer.delta(), linear.bias)) < 1e-9


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_shift_it_is_the_base_to_the_bit(shape, dtype, autocast):
    linear, factors = steep_layer(shape, dtype)
    layer = SVFitOneSided(linear, *factors)
    for size in ((shape[1],), (7, shape[1]), (2, 3, 5, shape[1])):
        input = torch.randn(size, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(layer(input), linear(input))
    assert layer.weight is linear.weight and type(layer.to_plain()) is nn.Linear
    assert torch.equal(layer.to_plain()(input), linear(input))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(3,), (3, 7), (3, 2, 5)])
def test_a_shift_for_every_sample(shape, size):
    linear, factors = steep_layer(shape)
    layer = SVFitOneSided(linear, *factors)
    layer.shift.data = torch.randn(3, 1, 24, dtype=torch.float64)
    input = torch.randn(*size, shape[1], dtype=torch.float64)
    output = layer(input)
    for sample in range(3):
        expected = dense_output(linear, factors, layer.shift[sample, 0], input[sample])
        assert torch.dist(output[sample], expected) <= 1e-6 * expected.norm()
    with pytest.raises(SVFitError, match="shifts of 3 samples meet a batch of 2"):
        layer(input[:2])
    with pytest.raises(SVFitError, match="one per sample"):
        layer.merge()


@pytest.mark.parametrize("dtype", FORMATS)
def test_merged_it_paints_the_same_and_comes_back(dtype):
    linear, factors = steep_layer(dtype=dtype)
    layer = SVFitOneSided(linear, *factors)
    before = linear.weight.detach().clone()
    torch.nn.init.normal_(layer.shift, std=0.3)
    input = torch.randn(4, 40, dtype=dtype)
    factored = layer(input)
    layer.merge()
    assert torch.dist(layer(input).double(), factored.double()) <= 0.03 * factored.double().norm()
    assert layer.base_weight is not layer.weight and torch.equal(layer.base_weight, before)
    layer.unmerge()
    assert torch.equal(layer.weight, before) and torch.equal(layer(input), factored)


def test_casting_keeps_shift_and_singular_values_precise():
    linear, factors = steep_layer(dtype=torch.float32)
    layer = SVFitOneSided(linear, *factors)
    layer.shift.data.fill_(1 + 2**-20)
    S = layer.S.clone()
    model = nn.Sequential(layer).to(torch.bfloat16)
    assert layer.side.dtype == layer.U.dtype == layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.S, S) and (layer.shift == 1 + 2**-20).all()
    model.double()
    assert layer.S.dtype == torch.float64 and torch.equal(layer.S.float(), S)
    twin = copy.deepcopy(layer)
    assert twin.side is not layer.side and torch.equal(twin(input := torch.ones(1, 40).double()), layer(input))


def test_base_checkpoints_load_and_nothing_of_the_basis_is_saved():
    linear, factors = steep_layer()
    layer = SVFitOneSided(linear, *factors)
    assert set(layer.state_dict()) == {"weight", "bias", "shift"}
    other = nn.Linear(40, 24, dtype=torch.float64)
    layer.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_values_below_the_floor_keep_both_sides(scale):
    linear, (U, S, Vh) = steep_layer()
    assert small_values(S * scale, linear.weight * scale) == 6
    assert (
        small_values(S[2:20] * scale, linear.weight * scale) == 2
    )  # the floor is the weight's, not the chosen values'
    layer = SVFitOneSided(linear, U, S, Vh)
    assert layer.side.shape == (18, 24) and layer.U.shape == (24, 6) and layer.Vh.shape == (6, 40)
    tall = SVFitOneSided(*((made := steep_layer((40, 24)))[0], *made[1]))
    assert tall.side.shape == (18, 24) and torch.equal(tall.side, made[1][2][:18])


def test_the_form_follows_from_the_size_of_the_basis(monkeypatch):
    linear, (U, S, Vh) = steep_layer()
    conv = nn.Conv2d(4, 4, 3)
    monkeypatch.setattr(one_sided, "BOTH_SIDES_MOST", 24 * (24 + 40))
    assert type(svfit_layer(linear, (U, S, Vh))) is SVFitLinear
    monkeypatch.setattr(one_sided, "BOTH_SIDES_MOST", 24 * (24 + 40) - 1)
    assert type(svfit_layer(linear, (U, S, Vh))) is SVFitOneSided
    assert type(svfit_layer(linear, (U[:, :23], S[:23], Vh[:23]))) is SVFitLinear
    assert type(svfit_layer(linear, (U, Vh))) is SVFitLinear  # a basis without its singular values
    assert type(svfit_layer(conv, decompose(conv.weight.flatten(1)))) is SVFitConv2d


def test_every_picture_of_a_batch_has_its_own_adapters():
    model = tiny_pipeline()
    load_three(model)
    assert any(isinstance(layer, SVFitOneSided) for layer in model.unet.modules())
    torch.testing.assert_close(together(model), one_by_one(model), rtol=0, atol=5e-3)


@pytest.mark.slow
def test_a_run_learns_what_it_learns_with_both_sides(tiny_run, tiny_base, tmp_path, monkeypatch):
    """The same file but for the rounding of the weight, and from it the same LoRA and merged model."""
    options = {"max_train_steps": 4, "learning_rate": 0.05, "validation_steps": 0, "final_pictures": False}
    found = read_adapter(one := train(tiny_run(**options, output_dir=str(tmp_path / "one")).config).adapter_path)
    assert export_lora(one, open_base_model(str(tiny_base)), tmp_path / "lora", "diffusers").worst_error < 1e-3
    merged = export_merged(one, open_base_model(str(tiny_base)), tmp_path / "merged").path
    weight = open_base_model(str(merged)).pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    monkeypatch.undo()
    expected = read_adapter(train(tiny_run(**options, output_dir=str(tmp_path / "two")).config).adapter_path)
    assert found.shifts.keys() == expected.shifts.keys()
    for name, shift in expected.shifts.items():
        assert torch.dist(found.shifts[name], shift) <= 0.1 * shift.norm(), name
    again = export_merged(one, open_base_model(str(tiny_base)), tmp_path / "again").path
    other = open_base_model(str(again)).pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert torch.dist(weight, other) <= 1e-3 * other.norm()
