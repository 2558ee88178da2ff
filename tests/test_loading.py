"""Adapters on a pipeline: load, set strengths, unload, on whatever kind of pipeline."""

import logging
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
import torch
from conftest import offload_sequentially, tiny_pipeline
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_group_offloading

from svfit_dreambooth import load_adapter, merge_adapters, save_adapter, set_adapters, unload_adapter
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.families import apply_svfit, find_projections
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.method.layer import SVFitLayer
from svfit_dreambooth.method.targets import svfit_layers
from svfit_dreambooth.painting.registry import loaded_adapters

CPU = torch.device("cpu")


@pytest.fixture
def pipeline():
    return tiny_pipeline()


def make_adapter(pipeline, seed=0, rank=None, components=("unet", "text_encoder"), scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"{component}.{name}": layer.weight
        for component in components
        for name, (_, _, layer) in find_projections(getattr(pipeline, component)).items()
    }
    shifts = {
        name: scale * torch.randn(min(rank or 99, *weight.shape), generator=generator)
        for name, weight in weights.items()
    }
    return Adapter(shifts=shifts, base_model="tiny", base_fingerprint=fingerprint(weights), title=f"adapter{seed}")


def paint(pipeline, prompt="a photo of sks dog", **options):
    return torch.tensor(
        pipeline(
            prompt,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            height=16,
            width=16,
            **options,
        ).images
    )


def test_load_from_file_and_unload_to_the_bit(pipeline, tmp_path):
    base = paint(pipeline)
    path = save_adapter(make_adapter(pipeline), tmp_path / "dog.safetensors")
    assert load_adapter(pipeline, path) == "dog"
    adapted = paint(pipeline)
    assert (adapted - base).abs().max() > 0.01
    assert loaded_adapters(pipeline) == {"dog": 1.0}
    unload_adapter(pipeline)
    assert torch.equal(paint(pipeline), base)
    assert not svfit_layers(pipeline.unet) and not loaded_adapters(pipeline)


def test_strengths(pipeline):
    base = paint(pipeline)
    load_adapter(pipeline, make_adapter(pipeline), name="dog")
    adapted = paint(pipeline)
    set_adapters(pipeline, {"dog": 0.0})
    assert torch.equal(paint(pipeline), base)
    set_adapters(pipeline, {"dog": 0.5})
    half = paint(pipeline)
    assert not torch.allclose(half, adapted) and not torch.allclose(half, base)
    set_adapters(pipeline, {"dog": 1.0})
    assert torch.equal(paint(pipeline), adapted)


def test_adapters_are_listed_as_they_were_loaded():
    """Also where the first changes another component than the second."""
    pipeline = tiny_pipeline()
    kinds = {"words": ("text_encoder",), "looks": ("unet",), "both": ("unet", "text_encoder")}
    made = {name: make_adapter(pipeline, components=components) for name, components in kinds.items()}
    for name, adapter in made.items():
        load_adapter(pipeline, adapter, name=name)
    assert list(loaded_adapters(pipeline)) == ["words", "looks", "both"]


def test_several_adapters_add_up_whatever_their_ranks(pipeline):
    small, large = make_adapter(pipeline, 1, rank=3, components=("unet",)), make_adapter(pipeline, 2)
    load_adapter(pipeline, small, 0.7)
    load_adapter(pipeline, large, 0.4)
    both = paint(pipeline)
    total = {name: 0.4 * shift for name, shift in large.shifts.items()}
    for name, shift in small.shifts.items():
        total[name][:3] += 0.7 * shift[: len(total[name])]
    other = tiny_pipeline()
    load_adapter(other, Adapter(shifts=total, base_model="tiny", base_fingerprint=large.base_fingerprint, title="sum"))
    assert torch.allclose(paint(other), both, atol=1e-4)
    unload_adapter(pipeline, "adapter2")
    alone = tiny_pipeline()
    load_adapter(alone, small, 0.7)
    assert torch.allclose(paint(pipeline), paint(alone), atol=1e-5)


def test_merging_gives_the_same_pictures_and_is_undone(pipeline):
    load_adapter(pipeline, make_adapter(pipeline))
    adapted = paint(pipeline)
    with merge_adapters(pipeline):
        assert torch.allclose(paint(pipeline), adapted, atol=1e-4)
        set_adapters(pipeline, {"adapter0": 0.0})
        set_adapters(pipeline, {"adapter0": 1.0})
        assert torch.allclose(paint(pipeline), adapted, atol=1e-4)
    assert torch.equal(paint(pipeline), adapted)


def test_a_base_loaded_in_float16_takes_the_same_adapter_silently(pipeline, caplog):
    adapter = make_adapter(pipeline)
    half = tiny_pipeline().to(torch.float16).to(torch.float32)
    with caplog.at_level(logging.WARNING):
        load_adapter(half, adapter)
    assert not [record for record in caplog.records if record.name.startswith("svfit")]
    load_adapter(pipeline, adapter)
    assert (paint(half) - paint(pipeline)).abs().max() < 0.02


def test_a_bfloat16_copy_loads_with_a_notice(pipeline, caplog):
    adapter = make_adapter(pipeline)
    rounded = tiny_pipeline().to(torch.bfloat16).to(torch.float32)
    with caplog.at_level(logging.WARNING):
        load_adapter(rounded, adapter)
    assert "more precise or slightly different copy" in caplog.text


def test_another_base_is_refused_unless_allowed(pipeline):
    adapter = make_adapter(pipeline)
    other = tiny_pipeline(seed=5)
    base = paint(other)
    with pytest.raises(SVFitError, match="was trained on tiny, and this pipeline holds other weights"):
        load_adapter(other, adapter)
    assert torch.equal(paint(other), base) and not loaded_adapters(other)
    load_adapter(other, adapter, allow_other_base=True)
    assert not torch.allclose(paint(other), base)


@contextmanager
def failing_layer(number, error):
    """Within it the layer of that number, from 1, does not get its basis."""
    takes_over, left = SVFitLayer._take_over, iter(range(number - 1))

    def take_over(layer, *arguments):
        if next(left, None) is None:
            raise error
        takes_over(layer, *arguments)

    with patch.object(SVFitLayer, "_take_over", take_over), pytest.raises(type(error)):
        yield


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", [5, 38])  # in the text encoder, in the UNet
def test_a_first_adapter_that_fails_half_way_leaves_the_base(pipeline, error, number):
    base, adapter = paint(pipeline), make_adapter(pipeline)
    with failing_layer(number, error):
        load_adapter(pipeline, adapter)
    assert not loaded_adapters(pipeline) and torch.equal(paint(pipeline), base)
    assert not svfit_layers(pipeline.unet) and not svfit_layers(pipeline.text_encoder)
    load_adapter(pipeline, adapter)
    assert not torch.allclose(paint(pipeline), base)


@pytest.mark.parametrize("number", [5, 38])
def test_a_second_adapter_that_fails_half_way_leaves_the_first(pipeline, number):
    load_adapter(pipeline, make_adapter(pipeline, 1, rank=3), name="dog")
    before = paint(pipeline)
    with failing_layer(number, torch.OutOfMemoryError("CUDA out of memory")):
        load_adapter(pipeline, make_adapter(tiny_pipeline(), 2))
    assert loaded_adapters(pipeline) == {"dog": 1.0}
    assert torch.allclose(paint(pipeline), before, atol=1e-5)
    layers = svfit_layers(pipeline.text_encoder) | svfit_layers(pipeline.unet)
    assert not any(layer.shift.requires_grad for layer in layers.values())


def test_a_component_that_is_being_trained_is_left_alone(pipeline):
    shifts = apply_svfit(pipeline.unet)
    with pytest.raises(SVFitError, match="the unet is being trained"):
        load_adapter(pipeline, make_adapter(tiny_pipeline()))
    assert svfit_layers(pipeline.unet).keys() == shifts.keys()
    assert not svfit_layers(pipeline.text_encoder)


def test_refusals(pipeline):
    adapter = make_adapter(pipeline)
    load_adapter(pipeline, adapter, name="dog")
    with pytest.raises(SVFitError, match="'dog' is loaded already"):
        load_adapter(pipeline, adapter, name="dog")
    with pytest.raises(SVFitError, match="no adapter named 'cat' is loaded, only: dog"):
        set_adapters(pipeline, {"cat": 1.0})
    with pytest.raises(SVFitError, match="no adapter named 'cat'"):
        unload_adapter(pipeline, "cat")
    stranger = Adapter(shifts={"unet.nowhere.to_q": torch.ones(2)}, base_model="x", base_fingerprint={}, title="x")
    with pytest.raises(SVFitError, match=r"trained on x, whose unet is built otherwise than this one \(nowhere.to_q\)"):
        load_adapter(pipeline, stranger)
    sdxl = Adapter(shifts={"text_encoder_2.a.q_proj": torch.ones(2)}, base_model="x", base_fingerprint={}, title="y")
    with pytest.raises(SVFitError, match="changes text_encoder_2, which this pipeline lacks"):
        load_adapter(pipeline, sdxl)


def test_sequential_cpu_offload_stays_on(pipeline, monkeypatch):
    load_adapter(pipeline, make_adapter(pipeline), name="dog")
    adapted = paint(pipeline)
    unload_adapter(pipeline)
    base = paint(pipeline)
    monkeypatch.setattr(pipeline, "enable_sequential_cpu_offload", partial(offload_sequentially, pipeline.unet))
    pipeline.enable_sequential_cpu_offload(device=torch.device("cpu"))
    assert next(pipeline.unet.parameters()).is_meta
    load_adapter(pipeline, make_adapter(tiny_pipeline()), name="dog")
    assert next(pipeline.unet.parameters()).is_meta
    assert torch.allclose(paint(pipeline), adapted, atol=1e-5)
    set_adapters(pipeline, {"dog": 0.0})
    assert torch.allclose(paint(pipeline), base, atol=1e-5)
    unload_adapter(pipeline)
    assert next(pipeline.unet.parameters()).is_meta
    assert torch.equal(paint(pipeline), base)


def test_model_cpu_offload_stays_on(pipeline):
    pipeline.enable_model_cpu_offload(device="cpu")
    load_adapter(pipeline, make_adapter(tiny_pipeline()), name="dog")
    other = tiny_pipeline()
    load_adapter(other, make_adapter(other), name="dog")
    assert torch.allclose(paint(pipeline), paint(other), atol=1e-5)
    assert hasattr(pipeline.unet, "_hf_hook")


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offload_stays_on(pipeline, level):
    def offloaded(model):
        hooks = {path: getattr(module, "_diffusers_hook", None) for path, module in model.named_modules()}
        return {path for path, hook in hooks.items() if hook is not None and hook.get_hook("group_offloading")}

    base = paint(pipeline)
    other = tiny_pipeline()
    load_adapter(other, make_adapter(other), name="dog")
    adapted = paint(other)
    for model in (pipeline.unet, pipeline.text_encoder):
        apply_group_offloading(model, CPU, CPU, offload_type=level, num_blocks_per_group=1)
    hooked = offloaded(pipeline.unet)
    load_adapter(pipeline, make_adapter(tiny_pipeline()), name="dog")
    assert offloaded(pipeline.unet) == hooked  # the new layers too
    assert torch.allclose(paint(pipeline), adapted, atol=1e-5)
    with merge_adapters(pipeline):
        assert all(layer.unmerged_weight is None for layer in svfit_layers(pipeline.unet).values())
    unload_adapter(pipeline)
    assert offloaded(pipeline.unet) == hooked
    assert torch.equal(paint(pipeline), base)


def test_pipelines_that_share_components_share_adapters(pipeline):
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    load_adapter(other, make_adapter(pipeline), name="dog")
    assert loaded_adapters(pipeline) == {"dog": 1.0}


def test_saving_a_pipeline_does_not_lose_its_adapters_in_silence(tmp_path):
    pipeline = tiny_pipeline()
    adapter = make_adapter(pipeline, rank=2)
    name, other = load_adapter(pipeline, adapter), load_adapter(pipeline, adapter, name="other")
    for save in (pipeline.save_pretrained, pipeline.unet.save_pretrained, pipeline.text_encoder.save_pretrained):
        with pytest.raises(SVFitError, match="which save_pretrained would lose: unload them first"):
            save(tmp_path / "model")
    unload_adapter(pipeline, name)
    with pytest.raises(SVFitError, match="would lose"):
        pipeline.save_pretrained(tmp_path / "model")
    unload_adapter(pipeline, other)
    pipeline.save_pretrained(tmp_path / "model")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "model", subfolder="unet")
    assert again.state_dict().keys() == tiny_pipeline().unet.state_dict().keys()
