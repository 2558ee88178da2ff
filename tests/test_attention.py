"""Putting SVFit layers into a UNet and a text encoder, and everything that must keep working there."""

from unittest.mock import Mock

import pytest
import torch
from conftest import tiny_text_encoder, tiny_unet
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from svfit_dreambooth.bases.families import apply_svfit, find_projections
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.layer import SVFitLinear
from svfit_dreambooth.method.targets import (
    get_shifts,
    merge_shifts,
    merged,
    remove_svfit,
    set_shifts,
    svfit_layers,
)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return tiny_unet().eval()


def run(unet, tokens=7):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, tokens, 24, generator=generator)
    return unet(sample.to(unet.dtype), torch.tensor([10, 500]), states.to(unet.dtype)).sample


def randomize(model, scale=0.3):
    generator = torch.Generator().manual_seed(2)
    shifts = {name: scale * torch.randn(s.shape, generator=generator) for name, s in get_shifts(model).items()}
    set_shifts(model, shifts)
    return shifts


def stable_diffusion_1_unet():
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)


def test_stable_diffusion_1_has_128_and_48_projections():
    unet = find_projections(stable_diffusion_1_unet())
    assert len(unet) == 128
    assert sum(min(layer.weight.shape) for _, _, layer in unet.values()) == 93_696
    with torch.device("meta"):
        config = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408
        )
        text_encoder = find_projections(CLIPTextModel(config))
    assert len(text_encoder) == 48
    assert sum(min(layer.weight.shape) for _, _, layer in text_encoder.values()) == 36_864
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0" in unet
    assert "text_model.encoder.layers.0.self_attn.q_proj" in text_encoder


def test_names_are_canonical_with_and_without_the_text_model_level():
    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    plain, projected = find_projections(CLIPTextModel(config)), find_projections(CLIPTextModelWithProjection(config))
    assert set(plain) == set(projected)


def test_patched_model_is_the_base_to_the_bit_and_removal_is_exact(unet):
    expected = run(unet)
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    shifts = apply_svfit(unet)
    assert len(shifts) == 32 and {id(p) for p in unet.parameters() if p.requires_grad} == {
        id(s) for s in shifts.values()
    }
    assert torch.equal(run(unet), expected)
    randomize(unet)
    assert not torch.allclose(run(unet), expected, atol=1e-3)
    merge_shifts(unet)
    remove_svfit(unet)
    assert not svfit_layers(unet)
    assert torch.equal(run(unet), expected)
    assert set(unet.state_dict()) == set(state)
    assert all(torch.equal(unet.state_dict()[name], tensor) for name, tensor in state.items())


def test_text_encoder_patch():
    torch.manual_seed(0)
    encoder = tiny_text_encoder(50).eval()
    ids = torch.tensor([[0, 7, 8, 1, 1]])
    expected = encoder(ids)[0]
    apply_svfit(encoder, rank=5)
    assert torch.equal(encoder(ids)[0], expected)
    randomize(encoder)
    assert not torch.allclose(encoder(ids)[0], expected, atol=1e-3)
    remove_svfit(encoder)
    assert torch.equal(encoder(ids)[0], expected)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0, "sliced"])
def test_every_attention_processor_sees_the_shifts(unet, processor):
    apply_svfit(unet)
    randomize(unet)
    expected = run(unet)
    if processor == "sliced":
        unet.set_attention_slice(1)
    else:
        unet.set_attn_processor(processor())
    assert torch.allclose(run(unet), expected, atol=1e-5)


def test_fused_projections_are_refused_before_and_after(unet):
    expected = run(unet)
    unet.fuse_qkv_projections()
    with pytest.raises(SVFitError, match="unfuse_qkv_projections"):
        apply_svfit(unet)
    unet.unfuse_qkv_projections()
    apply_svfit(unet)
    randomize(unet)
    with pytest.raises(SVFitError, match="cannot be fused"):
        unet.fuse_qkv_projections()
    remove_svfit(unet)
    unet.fuse_qkv_projections()
    assert torch.allclose(run(unet), expected, atol=1e-5)


def test_target_modules_narrow_and_widen(unet):
    assert {name.rpartition(".")[2] for name in find_projections(unet, ["to_k", "to_v"])} == {"to_k", "to_v"}
    assert len(find_projections(unet, ["attn2.to_k"])) == 4
    assert "time_embedding.linear_1" in find_projections(unet, ["attention", "time_embedding.linear_1"])
    assert len(find_projections(unet, "all-linear")) == sum(isinstance(m, nn.Linear) for m in unet.modules())
    with pytest.raises(SVFitError, match="'to_z' matches no linear layer"):
        find_projections(unet, ["to_z"])


def test_any_module_works():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 3)))
    input = torch.randn(4, 6)
    expected = model(input)
    shifts = apply_svfit(model, rank=2)
    assert list(shifts) == ["0", "2.0"] and all(s.shape == (2,) for s in shifts.values())
    assert torch.equal(model(input), expected)
    with pytest.raises(SVFitError, match="already"):
        apply_svfit(model)
    with pytest.raises(SVFitError, match="no linear layer"):
        apply_svfit(nn.ReLU())


def test_merge_is_exact_to_undo_and_the_context_restores_what_was(unet):
    base = run(unet)
    apply_svfit(unet)
    randomize(unet)
    factored = run(unet)
    with merged(unet):
        assert all(layer.unmerged_weight is not None for layer in svfit_layers(unet).values())
        assert torch.allclose(run(unet), factored, atol=1e-5)
    assert torch.equal(run(unet), factored)
    merge_shifts(unet)
    with merged(unet):
        pass
    assert all(layer.unmerged_weight is not None for layer in svfit_layers(unet).values())
    remove_svfit(unet)
    assert torch.equal(run(unet), base)


def test_layers_merged_before_one_fails_are_unmerged(unet, monkeypatch):
    apply_svfit(unet)
    randomize(unet)
    expected = run(unet)
    last = list(svfit_layers(unet).values())[-1]
    monkeypatch.setattr(last, "merge", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError), merged(unet):
        pass
    assert torch.equal(run(unet), expected)


def test_set_shifts(unet):
    apply_svfit(unet)
    shifts = randomize(unet)
    expected = run(unet)
    set_shifts(unet, {name: 2 * shift for name, shift in shifts.items()})
    assert not torch.allclose(run(unet), expected, atol=1e-4)
    with merged(unet):
        set_shifts(unet, shifts)  # merged layers follow
        assert torch.allclose(run(unet), expected, atol=1e-5)
    assert torch.equal(run(unet), expected)
    set_shifts(unet, {})
    assert all((layer.shift == 0).all() for layer in svfit_layers(unet).values())


def test_wrong_shifts_are_refused(unet):
    apply_svfit(unet, rank=3)
    name = next(iter(get_shifts(unet)))
    with pytest.raises(SVFitError, match="no SVFit layer named 'nowhere'"):
        set_shifts(unet, {"nowhere": torch.ones(3)})
    with pytest.raises(SVFitError, match="holds 3 singular values, but the shift has 9"):
        set_shifts(unet, {name: torch.ones(9)})


def test_gradient_checkpointing_gives_the_same_gradients(unet):
    shifts = apply_svfit(unet)
    randomize(unet)
    unet.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        run(unet).square().mean().backward()
        gradients.append([shift.grad.clone() for shift in shifts.values()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])


def test_a_peft_lora_sits_on_top_or_below(unet):
    lora = pytest.importorskip("peft")
    config = lora.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    apply_svfit(unet)
    shifts = randomize(unet)
    expected = run(unet)
    unet.add_adapter(config)
    both = run(unet)
    assert not torch.allclose(both, expected, atol=1e-4)
    assert set(svfit_layers(unet)) == set(shifts)
    unet.disable_adapters()
    assert torch.allclose(run(unet), expected, atol=1e-5)
    unet.enable_adapters()
    remove_svfit(unet)
    apply_svfit(unet)  # now below an existing LoRA
    set_shifts(unet, shifts)
    assert torch.allclose(run(unet), both, atol=1e-5)


@pytest.mark.slow
def test_torch_compile(unet):
    apply_svfit(unet)
    randomize(unet)
    expected = run(unet)
    compiled = torch.compile(unet, backend="aot_eager")
    assert torch.allclose(run(compiled), expected, atol=1e-5)
    set_shifts(compiled, {})
    assert torch.allclose(run(compiled), run(unet), atol=1e-5)
    assert set(svfit_layers(compiled)) == set(svfit_layers(unet))


def test_half_precision_keeps_float32_shifts(unet):
    apply_svfit(unet)
    shifts = randomize(unet)
    unet.to(torch.bfloat16)
    assert all(layer.shift.dtype == torch.float32 for layer in svfit_layers(unet).values())
    assert all(torch.equal(get_shifts(unet)[name], shift) for name, shift in shifts.items())
    assert run(unet).dtype == torch.bfloat16


def test_quantised_layers_are_refused():
    class Linear8bit(nn.Linear):
        pass

    with pytest.raises(SVFitError, match="Linear8bit, not a plain linear layer"):
        apply_svfit(nn.Sequential(Linear8bit(4, 4)))


def test_layers_keep_their_class_after_unpatching(unet):
    apply_svfit(unet)
    remove_svfit(unet)
    assert not any(isinstance(module, SVFitLinear) for module in unet.modules())


def test_a_given_basis_takes_the_place_of_the_decomposition():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    U, Vh = torch.eye(8)[:, :2], torch.eye(6)[:2]
    with pytest.raises(SVFitError, match="lacks 1 of the targeted layers, such as 1"):
        apply_svfit(model, basis={"0": (U, Vh)})
    shifts = apply_svfit(model, target_modules=["0"], basis={"0": (U, Vh)})
    shifts["0"].data.fill_(1.0)
    assert torch.allclose(model[0].delta(), U @ Vh)
