"""Targets beyond attention: convolutions as matrices, the words that name groups of layers, and their adapters."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_pipeline, tiny_text_encoder, tiny_unet
from diffusers import UNet2DConditionModel
from torch import nn

from svfit_dreambooth import load_adapter, merge_adapters, save_adapter, unload_adapter
from svfit_dreambooth.adapter.file import Adapter, read_adapter
from svfit_dreambooth.bases.families import apply_svfit, find_projections
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint, model_basis, same_base, weight_hash
from svfit_dreambooth.method.decomposition import as_matrix, decompose
from svfit_dreambooth.method.layer import SVFitConv2d, SVFitLinear
from svfit_dreambooth.method.targets import (
    get_shifts,
    remove_svfit,
    set_shifts,
    svfit_layers,
)

KINDS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "pointwise": {"kernel_size": 1, "bias": False},
    "oblong": {"kernel_size": (3, 1), "dilation": (2, 1), "padding": "same", "padding_mode": "circular"},
    "grouped": {"kernel_size": 3, "groups": 4},
}


def make_layer(kind, rank=None, dtype=torch.float64):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, **KINDS[kind], dtype=dtype)
    U, S, Vh = decompose(as_matrix(conv.weight), rank or "full")
    return conv, SVFitConv2d(conv, U, Vh), (U, S, Vh)


def routes(kind):
    return ["forward", "forward_merged"] + ([] if kind == "grouped" else ["forward_factored"])


def dense_form(conv, factors, S_trained, input):
    """The paper's W' = U diag(S_trained) Vh + W_e on the reshaped weight, by a plain convolution."""
    U, S, Vh = factors
    W_e = conv.weight.double().flatten(1) - U @ torch.diag(S) @ Vh
    weight = (U @ torch.diag(S_trained) @ Vh + W_e).reshape(conv.weight.shape)
    bias = None if conv.bias is None else conv.bias.double()
    return conv._conv_forward(input, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_untrained_convolution_is_the_base_to_the_bit(kind, dtype):
    conv, layer, _ = make_layer(kind, dtype=dtype)
    input = torch.randn(2, 8, 9, 7, dtype=dtype)
    expected = conv(input)
    for route in routes(kind):
        assert torch.equal(getattr(layer, route)(input), expected)
    assert layer.weight is conv.weight and layer.bias is conv.bias
    plain = layer.to_plain()
    assert type(plain) is nn.Conv2d and str(plain) == str(conv) and torch.equal(plain(input), expected)


@pytest.mark.parametrize("rank", [1, 5, None])
@pytest.mark.parametrize("kind", list(KINDS))
def test_convolution_routes_equal_the_dense_form(kind, rank):
    conv, layer, factors = make_layer(kind, rank)
    shift = torch.randn(layer.rank, dtype=torch.float64)
    S_trained = (factors[1] + shift).requires_grad_()
    first = torch.randn(2, 8, 9, 7, dtype=torch.float64, requires_grad=True)
    expected = dense_form(conv, factors, S_trained, first)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    layer.shift.data = shift
    for route in routes(kind):
        layer.shift.grad = None
        second = first.detach().clone().requires_grad_()
        actual = getattr(layer, route)(second)
        (actual * weights).sum().backward()
        assert torch.allclose(actual, expected, atol=1e-10)
        assert torch.allclose(layer.shift.grad, S_trained.grad, atol=1e-9)
        assert torch.allclose(second.grad, first.grad, atol=1e-10)


def test_the_cheaper_route_is_taken_by_places(monkeypatch):
    taken = []
    for route in ("forward_merged", "forward_factored"):
        monkeypatch.setattr(SVFitConv2d, route, lambda self, input, route=route: taken.append(route))
    _, layer, _ = make_layer("plain")
    layer(torch.randn(1, 8, 2, 2, dtype=torch.float64))
    layer(torch.randn(1, 8, 32, 32, dtype=torch.float64))
    assert taken == ["forward_factored", "forward_merged"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grouped"])
@pytest.mark.parametrize("size", [4, 24])
def test_a_shift_for_every_sample_of_a_convolution(kind, size):
    conv, layer, factors = make_layer(kind)
    shifts = torch.randn(3, 1, layer.rank, dtype=torch.float64)
    layer.shift.data = shifts
    input = torch.randn(3, 8, size, size, dtype=torch.float64)
    output = layer(input)
    for i in range(3):
        expected = dense_form(conv, factors, factors[1] + shifts[i, 0], input[i : i + 1])
        assert torch.allclose(output[i : i + 1], expected, atol=1e-10)
    with pytest.raises(SVFitError, match="one per sample"):
        layer.merge()


def test_groups_refuse_a_shift_for_every_sample():
    _, layer, _ = make_layer("grouped")
    layer.shift.data = torch.randn(3, 1, layer.rank, dtype=torch.float64)
    with pytest.raises(
        SVFitError, match=r"4 groups works only with one shift for all samples, not with .*\(3, 1, 12\)"
    ):
        layer(torch.randn(3, 8, 5, 5, dtype=torch.float64))


def test_a_shift_for_every_sample_where_tokens_are_missing():
    """Time embeddings are (batch, dim): the shifts must not spread over each other's samples."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, dtype=torch.float64)
    U, _, Vh = decompose(linear.weight)
    layer = SVFitLinear(linear, U, Vh)
    layer.shift.data = torch.randn(3, 1, 5, dtype=torch.float64)
    input = torch.randn(3, 6, dtype=torch.float64)
    expected = [F.linear(input[i], linear.weight + U * layer.shift[i] @ Vh, linear.bias) for i in range(3)]
    assert torch.allclose(layer(input), torch.stack(expected))


@pytest.mark.parametrize("kind", list(KINDS))
def test_merging_a_convolution_is_undone_to_the_bit(kind):
    conv, layer, _ = make_layer(kind, dtype=torch.float32)
    layer = nn.Sequential(layer).to(memory_format=torch.channels_last)[0]
    base = conv.weight.detach().clone()
    input = torch.randn(2, 8, 9, 7)
    layer.shift.data = torch.randn_like(layer.shift)
    expected = layer(input)
    layer.merge()
    assert torch.allclose(layer(input), expected, atol=1e-5) and torch.equal(layer.base_weight, base)
    layer.unmerge()
    assert torch.equal(layer.weight, base)


def test_convolutions_keep_precision_and_load_base_checkpoints():
    _, layer, _ = make_layer("plain", dtype=torch.float32)
    value = torch.full((12,), 1 + 2**-20)
    layer.shift.data = value.clone()
    layer.half()
    assert layer.weight.dtype == layer.Vh.dtype == torch.float16 and torch.equal(layer.shift.data, value)
    layer.load_state_dict(nn.Conv2d(8, 12, **KINDS["plain"]).state_dict(), strict=True)
    assert torch.equal(layer.shift.data, value)


@pytest.mark.parametrize("shapes", [((12, 3), (3, 8)), ((8, 3), (3, 72)), ((12, 3), (4, 72))])
def test_a_basis_that_does_not_fit_the_kernels_is_refused(shapes):
    with pytest.raises(SVFitError, match=r"does not fit a weight of shape \(12, 72\)"):
        SVFitConv2d(nn.Conv2d(8, 12, 3), *(torch.zeros(shape) for shape in shapes))


# ---------------------------------------------------------------- words that name groups of layers


def test_target_words_on_stable_diffusion_1():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    found = {word: find_projections(unet, word) for word in ("attention", "feed-forward", "conv", "all-linear", "all")}
    assert {word: len(layers) for word, layers in found.items()} == {
        "attention": 128, "feed-forward": 32, "conv": 98, "all-linear": 184, "all": 282,
    }  # fmt: skip
    convolutions = sum(isinstance(module, nn.Conv2d) for module in unet.modules())
    assert convolutions == 98 and {"conv_in", "conv_out"} < set(found["conv"])
    assert not set(found["attention"]) & set(found["feed-forward"])
    both = find_projections(unet, ["feed-forward", "conv", "attn2.to_k"])
    assert len(both) == 32 + 98 + 16
    assert len(find_projections(unet, ["conv_shortcut"])) == 14


def test_target_words_on_a_text_encoder():
    encoder = tiny_text_encoder(50)
    assert len(find_projections(encoder, ["attention"])) == 8
    assert len(find_projections(encoder, ["feed-forward"])) == 4
    assert len(find_projections(encoder, ["all"])) == 12
    with pytest.raises(SVFitError, match="'conv' matches no linear layer or convolution of CLIPTextModel: use att"):
        find_projections(encoder, ["conv"])


def run(unet):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    return unet(sample, torch.tensor([10, 500]), torch.randn(2, 7, 24, generator=generator)).sample


@pytest.mark.parametrize("rank", ["full", 3])
def test_everything_of_a_unet_adapted_is_the_base_to_the_bit_and_removal_is_exact(rank):
    torch.manual_seed(0)
    unet = tiny_unet().eval()
    expected = run(unet)
    names = list(unet.state_dict())
    shifts = apply_svfit(unet, rank, ["all"])
    kinds = {type(layer) for layer in svfit_layers(unet).values()}
    assert kinds == {SVFitLinear, SVFitConv2d} and len(shifts) == len(svfit_layers(unet))
    assert torch.equal(run(unet), expected)
    run(unet).square().mean().backward()
    assert all(shift.grad.any() for shift in shifts.values())
    set_shifts(unet, {name: torch.full_like(shift, 0.1) for name, shift in get_shifts(unet).items()})
    assert not torch.allclose(run(unet), expected, atol=1e-3)
    remove_svfit(unet)
    assert torch.equal(run(unet), expected) and list(unet.state_dict()) == names


# ---------------------------------------------------------------- basis, fingerprint, file, pipeline


def test_basis_and_fingerprint_take_kernels_as_matrices(tmp_path):
    conv = nn.Conv2d(6, 8, 3).weight.detach()
    assert weight_hash(conv) == weight_hash(conv.flatten(1))
    assert weight_hash(conv) == weight_hash(conv.to(memory_format=torch.channels_last))
    assert fingerprint({"unet.c": conv}) == fingerprint({"unet.c": conv.flatten(1)})
    assert same_base(fingerprint({"unet.c": conv}), {"unet.c": conv.half()}) == "identical"
    for _ in range(2):  # decomposed, then from the cache
        U, Vh = model_basis({"unet.c": conv}, cache_dir=tmp_path)["unet.c"]
        assert U.shape == (8, 8) and Vh.shape == (8, 54)
    assert torch.allclose(
        U.mT @ conv.flatten(1) @ Vh.mT, torch.diag((U.mT @ conv.flatten(1) @ Vh.mT).diag()), atol=0.02
    )


def make_adapter(pipeline, targets, seed=0, rank=99):
    generator = torch.Generator().manual_seed(seed)
    weights = {f"unet.{name}": layer.weight for name, (_, _, layer) in find_projections(pipeline.unet, targets).items()}
    shifts = {
        name: 0.3 * torch.randn(min(rank, *weight.flatten(1).shape), generator=generator)
        for name, weight in weights.items()
    }
    return Adapter(shifts=shifts, base_model="tiny", base_fingerprint=fingerprint(weights), title=f"adapter{seed}")


def paint(pipeline):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "np", "height": 16, "width": 16}
    return torch.tensor(pipeline("a photo of sks dog", generator=generator, **options).images)


@pytest.mark.parametrize("targets", [["conv"], ["all"], ["feed-forward", "conv_in"]])
def test_a_file_alone_says_what_to_patch(targets, tmp_path):
    pipeline = tiny_pipeline()
    base = paint(pipeline)
    adapter = make_adapter(pipeline, targets)
    path = save_adapter(adapter, tmp_path / "a.safetensors", torch.float32)
    assert read_adapter(path).ranks == adapter.ranks
    load_adapter(pipeline, path)
    assert set(svfit_layers(pipeline.unet)) == set(find_projections(tiny_pipeline().unet, targets))
    adapted = paint(pipeline)
    assert (adapted - base).abs().max() > 0.01
    with merge_adapters(pipeline):
        assert torch.allclose(paint(pipeline), adapted, atol=1e-4)
    assert torch.equal(paint(pipeline), adapted)
    unload_adapter(pipeline)
    assert torch.equal(paint(pipeline), base) and not svfit_layers(pipeline.unet)


def test_adapters_of_different_targets_add_up():
    pipeline = tiny_pipeline()
    narrow, wide = make_adapter(pipeline, None, seed=1), make_adapter(pipeline, ["all"], seed=2, rank=4)
    load_adapter(pipeline, narrow)
    alone = paint(pipeline)
    load_adapter(pipeline, wide)
    assert not torch.allclose(paint(pipeline), alone, atol=1e-3)
    unload_adapter(pipeline, "adapter2")
    assert torch.equal(paint(pipeline), alone)


def test_kernels_of_another_size_are_another_base():
    pipeline = tiny_pipeline()
    adapter = make_adapter(pipeline, ["conv_in"])
    adapter.shifts["unet.conv_in"] = torch.ones(17)
    with pytest.raises(SVFitError, match=r"built otherwise than this one \(conv_in\)"):
        load_adapter(pipeline, adapter)
