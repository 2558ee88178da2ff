"""Bases whose denoiser is held in 8 or 4 bits: what is trained on them and painted with them, and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from flow_bases import tiny_klein
from test_flow_bases import paint, pixels
from torch import nn

from svfit_dreambooth import load_adapter, merge_adapters, train, unload_adapter
from svfit_dreambooth.adapter.file import read_adapter
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.bases.outline import outline_base_model
from svfit_dreambooth.bases.quantizing import block_layers, quantize_layers
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.decomposition import decompose, matrix_shape
from svfit_dreambooth.method.one_sided import SVFitOneSided
from svfit_dreambooth.method.quantized import is_quantized, kind_of, stored_weight
from svfit_dreambooth.method.targets import apply_svfit, merge_shifts, remove_svfit, svfit_layers
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.estimate import estimate_memory
from svfit_dreambooth.training.plan import prepare

LIBRARIES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
COARSE = {"int8": 0.01, "fp8": 0.06, "nf4": 0.15}  # of random weights, relative


@pytest.fixture(params=list(LIBRARIES))
def kind(request):
    pytest.importorskip(LIBRARIES[request.param], reason=f"{LIBRARIES[request.param]} is an optional library")
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "tiny-klein"
    tiny_klein().save_pretrained(path)
    return path


@pytest.fixture
def config(folder, photo_folder, tmp_path):
    return TrainConfig(
        pretrained_model_name_or_path=str(folder),
        instance_data_dir=str(photo_folder),
        instance_prompt="a photo of sks dog",
        output_dir=str(tmp_path / "run"),
        resolution=16,
        max_train_steps=3,
        learning_rate=0.05,
        train_batch_size=2,
        fixed_loss_examples=2,
        num_inference_steps=2,
        validation_steps=0,
        final_pictures=False,
    )


def coarse_layer(kind, shape=(64, 128), bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=bias))
    plain = nn.Linear(shape[1], shape[0], bias=bias)
    plain.load_state_dict(model[0].state_dict())
    quantize_layers(model, ["0"], kind)
    return plain, model


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_quantised_one_to_the_bit_and_its_delta_that_of_the_stored_weight(kind, shape, dtype):
    plain, model = coarse_layer(kind, shape)
    assert kind_of(model[0]) == kind and matrix_shape(model[0]) == shape
    assert torch.equal(stored_weight("0", model[0]), plain.weight)
    input = torch.randn(5, shape[1], dtype=dtype, requires_grad=True)
    model.to(dtype)
    before = model(input)
    assert before.dtype == dtype
    off = torch.dist(before.float(), plain(input.float())) / plain(input.float()).norm()
    assert 0 < off < COARSE[kind] + 0.01
    U, S, Vh = decompose(plain.weight)
    quantized = model[0]
    shift = apply_svfit(model, basis={"0": (U, S, Vh)})["0"]
    assert type(model[0]) is SVFitOneSided and torch.equal(model(input), before)
    shift.data = torch.randn(64)
    change = U.float() * shift.detach() @ Vh.float()
    found = (model(input) - before).float()
    wanted = input.float() @ change.T
    assert torch.dist(found, wanted) < 0.06 * wanted.norm()
    model(input).float().square().sum().backward()
    assert shift.grad.isfinite().all() and shift.grad.norm() > 0 and input.grad.norm() > 0
    assert not model[0].weight.requires_grad
    with pytest.raises(SVFitError, match=f"not merged into {kind} weights"):
        merge_shifts(model)
    remove_svfit(model)
    assert type(model[0]) is type(quantized) and torch.equal(model(input), before)


def test_autocast_reaches_the_products(kind):
    _, model = coarse_layer(kind)
    input = torch.randn(3, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input).dtype == torch.bfloat16
        before = model(input)
        apply_svfit(model, basis={"0": decompose(stored_weight("0", model[0]))})
        assert torch.equal(model(input), before)


def test_a_layer_that_others_quantised_is_refused(kind):
    _, model = coarse_layer(kind)
    del model[0].stored
    with pytest.raises(SVFitError, match="0 is quantised, and directions are those of the weight as it was before"):
        apply_svfit(model)


def test_directions_of_another_base_keep_both_sides(kind):
    _, model = coarse_layer(kind)
    U, _, Vh = (factor.float() for factor in decompose(torch.randn(64, 128)))
    input = torch.randn(3, 128)
    before = model(input)
    shift = apply_svfit(model, basis={"0": (U, Vh)})["0"]
    shift.data.normal_()
    assert torch.allclose(model(input) - before, input @ (U * shift @ Vh).T.detach(), atol=1e-4)


def test_a_run_on_a_quantised_base(kind, config, folder):
    """The file is one of the unquantised base, close to that of the same run there, and says how it was made."""
    expected = read_adapter(train(replace(config, output_dir=config.output_dir + "-plain")).adapter_path)
    found = read_adapter(path := train(replace(config, quantize=kind)).adapter_path)
    assert found.base_fingerprint == expected.base_fingerprint and found.training["quantize"] == kind
    assert "quantize" not in expected.training
    both = [torch.cat(list(adapter.shifts.values())).double() for adapter in (found, expected)]
    assert torch.nn.functional.cosine_similarity(*both, dim=0) > {"int8": 0.99, "fp8": 0.9, "nf4": 0.8}[kind]

    base = open_base_model(str(folder), quantize=kind)
    layers = [base.pipeline.transformer.get_submodule(n) for n in block_layers(base.pipeline.transformer, base.family)]
    assert layers and all(map(is_quantized, layers))
    plain = pixels(picture := paint(base))
    assert picture.settings["quantize"] == kind
    load_adapter(base.pipeline, path, name="dog")
    with merge_adapters(base.pipeline):  # beside the weights all the same
        assert all(layer.unmerged_weight is None for layer in svfit_layers(base.pipeline.transformer).values())
    painted = pixels(paint(base))
    assert (painted != plain).any()
    base.family.cast(torch.bfloat16)
    assert np.abs(pixels(paint(base)) - painted).mean() < 8
    unload_adapter(base.pipeline, "dog")
    fresh = open_base_model(str(folder), quantize=kind)
    assert (pixels(paint(fresh)) == plain).all()


@pytest.mark.slow
def test_a_run_in_bf16_on_other_families(kind, tiny_run, tmp_path):
    run = tiny_run(quantize=kind, mixed_precision="bf16", max_train_steps=2, validation_steps=2, keep="last")
    assert is_quantized(
        run.base.family.denoiser.get_submodule(block_layers(run.base.family.denoiser, run.base.family)[0])
    )
    adapter = read_adapter(train(run.config).adapter_path)
    assert any(shift.abs().max() > 0 for shift in adapter.shifts.values())
    load_adapter(tiny_pipeline(), adapter, name="dog")  # the unquantised base takes it


def test_the_estimate_knows_what_is_spared(config):
    plan = prepare(replace(config, dry_run=True), weightless=True)
    sizes = {
        kind: estimate_memory(replace(plan, config=replace(plan.config, quantize=kind))).networks
        for kind in (None, *LIBRARIES)
    }
    assert sizes["nf4"] < sizes["int8"] == sizes["fp8"] < sizes[None]
    denoiser = plan.base.family.denoiser
    weights = sum(denoiser.get_submodule(name).weight.numel() for name in block_layers(denoiser, plan.base.family))
    assert sizes[None] - sizes["int8"] == 3 * weights  # bytes of each, in float32
    pytest.importorskip("bitsandbytes", reason="an optional library")
    opened = prepare(replace(config, dry_run=True, quantize="nf4"))
    assert estimate_memory(opened).networks == sizes["nf4"]


def test_a_folder_that_is_quantised_already_is_refused(folder, tmp_path, config):
    other = tmp_path / "coarse"
    shutil.copytree(folder, other)
    path = other / "transformer" / "config.json"
    about = json.loads(path.read_text()) | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
    }
    path.write_text(json.dumps(about))
    for act in (open_base_model, outline_base_model, lambda name: open_base_model(name, one_at_a_time=True)):
        with pytest.raises(SVFitError, match=r"transformer quantised already \(bitsandbytes\).*quantise that by"):
            act(str(other))


def test_a_single_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    pytest.importorskip("torchao", reason="an optional library")
    with pytest.raises(SVFitError, match="quantize int8 needs a diffusers folder or a hub id"):
        open_base_model(str(path), quantize="int8")


def test_a_library_that_is_missing_is_named(monkeypatch, folder):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    for kind, sentence in (
        ("nf4", "quantize nf4 needs the library bitsandbytes: install it"),
        ("int3", "quantize is 'int3': use one of int8, fp8, nf4"),
    ):
        with pytest.raises(SVFitError, match=sentence):
            open_base_model(str(folder), quantize=kind)
