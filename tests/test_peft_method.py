"""SVFit as a PEFT method: the numbers of SVFitLinear, and everything PEFT does with an adapter."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification
from transformers.pytorch_utils import Conv1D

from svfit_dreambooth import SVFitConfig, SVFitError, SVFitLinear, adapter_from_peft, load_adapter, save_adapter
from svfit_dreambooth.method.basis import model_basis
from svfit_dreambooth.peft.layer import SVFitPeftLinear

ROOT = Path(__file__).resolve().parent.parent
PIXELS = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def classifier(seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    return ViTForImageClassification(config).eval()


def disturb(model, seed=1):
    """Sets every shift to random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".svfit_shift." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model):
    return model(PIXELS).logits


@pytest.mark.parametrize("tokens", [2, 500])  # the factored route and the merged one
def test_the_numbers_of_our_own_layer(tokens):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20))
    x, target = torch.randn(tokens, 12), torch.randn(tokens, 20)
    layer = get_peft_model(copy.deepcopy(model), SVFitConfig(rank=7, target_modules=["0"])).base_model.model[0]
    own = SVFitLinear(model[0], layer.U, layer.Vh)
    values = torch.randn(7)
    for shift in (layer.svfit_shift["default"], own.shift):
        shift.data.copy_(values)
    outputs = layer(x), own(x)
    assert torch.equal(*outputs)
    for output in outputs:
        (output - target).square().mean().backward()
    assert torch.equal(layer.svfit_shift["default"].grad, own.shift.grad)
    (_, directions), *_ = model_basis({"0": model[0].weight}, 7, use_cache=False).values()
    assert torch.equal(layer.Vh, directions)  # those that adapter files mean


def test_an_untrained_adapter_changes_nothing_and_trains_only_shifts():
    model = classifier()
    before = logits(model)
    model = get_peft_model(model, SVFitConfig(rank=5, modules_to_save=["classifier"]))
    assert torch.equal(logits(model), before)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    shifts = {name: n for name, n in trained.items() if ".svfit_shift." in name}
    assert len(shifts) == 2 * 6 and set(shifts.values()) == {5}
    assert {name.split(".")[-1] for name in set(trained) - set(shifts)} == {"weight", "bias"}


def test_training_lowers_the_loss():
    model = get_peft_model(classifier(), SVFitConfig())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    labels = torch.tensor([0, 1, 0])
    losses = []
    for _ in range(15):
        loss = model(PIXELS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_saved_adapter_loads_where_svfit_is_registered(tmp_path):
    model = get_peft_model(classifier(), SVFitConfig(rank=4))
    disturb(model)
    model.save_pretrained(tmp_path)
    torch.save({"expected": logits(model), "base": model.unload().state_dict(), "pixels": PIXELS}, tmp_path / "case.pt")
    script = f"""
import sys
import svfit_dreambooth
assert "torch" not in sys.modules and "peft" not in sys.modules
from peft import PeftModel
import torch
from transformers import ViTConfig, ViTForImageClassification
case = torch.load({str(tmp_path / "case.pt")!r})
base = ViTForImageClassification(ViTConfig(**{classifier().config.to_diff_dict()!r})).eval()
base.load_state_dict(case["base"])
try:
    PeftModel.from_pretrained(base, {str(tmp_path)!r})
except KeyError as error:
    assert str(error) == "'SVFIT'"  # what docs/peft.md explains
else:
    raise SystemExit("nobody registered SVFit, and PEFT knows it")
from svfit_dreambooth.peft import register
register()
register()
model = PeftModel.from_pretrained(base, {str(tmp_path)!r})
assert torch.allclose(model(case["pixels"]).logits, case["expected"], atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_transformers_own_loader(tmp_path):
    model = get_peft_model(classifier(), SVFitConfig(rank=4))
    disturb(model)
    model.save_pretrained(tmp_path)
    other = classifier()
    other.load_adapter(str(tmp_path))
    assert torch.allclose(logits(other), logits(model), atol=1e-6)
    lean = PeftModel.from_pretrained(classifier(), tmp_path, low_cpu_mem_usage=True)
    assert torch.allclose(logits(lean), logits(model), atol=1e-6)


def test_merging_and_unloading():
    model = get_peft_model(classifier(), SVFitConfig())
    weights = {name: w.clone() for name, w in classifier().state_dict().items()}
    disturb(model)
    adapted = logits(model)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(model), adapted, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(classifier()))
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is ViTForImageClassification and set(merged.state_dict()) == set(weights)
    assert torch.allclose(logits(merged), adapted, atol=1e-5)
    base = model.unload()
    assert all(torch.equal(weights[name], w) for name, w in base.state_dict().items())


def test_a_broken_adapter_is_not_merged():
    model = get_peft_model(classifier(), SVFitConfig())
    next(p for p in model.parameters() if p.requires_grad).data[0] = torch.nan
    with pytest.raises(SVFitError, match="gives NaN or infinity"):
        model.merge_and_unload(safe_merge=True)


def test_several_adapters():
    model = get_peft_model(classifier(), SVFitConfig(rank=3), "narrow")
    disturb(model)
    narrow = logits(model)
    model.add_adapter("wide", SVFitConfig())
    assert torch.equal(logits(model), narrow)
    disturb(model, seed=2)
    found = {}
    for name in ("narrow", "wide"):
        model.set_adapter(name)
        found[name] = logits(model)
    model.base_model.set_adapter(["narrow", "wide"])
    found["both"] = logits(model)
    layer = next(module for module in model.modules() if isinstance(module, SVFitPeftLinear))
    x = torch.randn(2, layer.in_features)
    total = layer.get_delta_weight("narrow") + layer.get_delta_weight("wide")
    assert torch.allclose(layer(x), layer.base_layer(x) + x @ total.T, atol=1e-5)
    model.merge_adapter(["narrow"])
    assert torch.allclose(logits(model), found["narrow"], atol=1e-5)
    model.unmerge_adapter()
    model.merge_adapter()
    assert torch.allclose(logits(model), found["both"], atol=1e-5)
    model.unmerge_adapter()
    model.delete_adapter("narrow")
    model.set_adapter("wide")
    assert torch.equal(logits(model), found["wide"])
    assert "narrow" not in json.dumps([name for name, _ in model.named_parameters()])


def test_gpt2_keeps_its_weights_transposed():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 8}
    base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    ids = torch.arange(8)[None]
    model = get_peft_model(base, SVFitConfig(energy=0.5, task_type="CAUSAL_LM"))
    disturb(model)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert isinstance(layer.base_layer, Conv1D) and (layer.out_features, layer.in_features) == (48, 16)
    for tokens in (1, 400):
        x = torch.randn(tokens, 16)
        assert torch.allclose(layer(x), layer.base_layer(x) + x @ layer.get_delta_weight("default"), atol=1e-5)
    adapted = model(ids).logits
    assert torch.allclose(model.merge_and_unload()(ids).logits, adapted, atol=1e-5)


def test_ranks_chosen_by_energy_are_saved_and_the_callers_config_is_left_alone(tmp_path):
    config = SVFitConfig(energy=0.6)
    model = get_peft_model(classifier(), config)
    disturb(model)
    ranks = model.peft_config["default"].ranks
    assert config.ranks is None and config.target_modules is None
    assert len(set(ranks.values())) > 1 and max(ranks.values()) < 16
    model.save_pretrained(tmp_path)
    other = classifier()
    for parameter in other.parameters():
        parameter.data *= 1 + 1e-3 * torch.randn(parameter.shape)  # another copy, where energy might choose otherwise
    other = PeftModel.from_pretrained(other, tmp_path)
    assert other.peft_config["default"].ranks == ranks
    shifts = get_peft_model_state_dict(model)
    assert all(torch.equal(shifts[name], shift) for name, shift in get_peft_model_state_dict(other).items())


def test_shifts_keep_their_precision():
    model = get_peft_model(classifier().bfloat16(), SVFitConfig(rank=4), autocast_adapter_dtype=False)
    disturb(model)
    shifts = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {shift.dtype for shift in shifts.values()} == {torch.float32}
    assert model(PIXELS.bfloat16()).logits.dtype == torch.bfloat16
    model.half()
    assert all(torch.equal(p, shifts[name]) for name, p in model.named_parameters() if p.requires_grad)
    double = get_peft_model(classifier().double(), SVFitConfig(rank=4))
    assert {p.dtype for p in double.parameters() if p.requires_grad} == {torch.float64}


def test_a_hook_on_the_base_layer_is_called():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), SVFitConfig(target_modules=["0"]))
    disturb(model)
    layer = model.base_model.model[0]
    x = torch.randn(300, 4)
    expected = layer(x)
    called = []
    layer.base_layer.register_forward_hook(lambda *_: called.append(True))
    assert torch.allclose(layer(x), expected, atol=1e-6) and called


def test_on_a_unet_and_on_to_an_adapter_file(tmp_path):
    pipeline = tiny_pipeline()
    unet, text_encoder = pipeline.unet.eval(), pipeline.text_encoder.eval()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 7, 24)

    @torch.no_grad()
    def sample(model):
        return model(*inputs).sample

    base = sample(unet)
    unet.requires_grad_(False)
    unet.add_adapter(SVFitConfig(rank=6), "dog")
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 32 * 6
    assert torch.equal(sample(unet), base)
    disturb(unet)
    dog = sample(unet)
    assert (dog - base).abs().max() > 0.01
    unet.set_adapters(["dog"], [0.0])
    assert torch.allclose(sample(unet), base, atol=1e-6)
    unet.set_adapters(["dog"], [1.0])
    with torch.no_grad():
        scaled = unet(*inputs, cross_attention_kwargs={"scale": 0.5}).sample
    unet.set_adapters(["dog"], [0.5])
    assert torch.equal(sample(unet), scaled)
    unet.set_adapters(["dog"], [1.0])

    other = tiny_pipeline().unet.eval()
    other.add_adapter(SVFitConfig(rank=6), "again")
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(unet, adapter_name="dog"), "again")
    assert not result.unexpected_keys and torch.equal(sample(other), dog)

    text_encoder.add_adapter(SVFitConfig(rank=4), "dog")
    disturb(text_encoder)
    components = {"unet": unet, "text_encoder": text_encoder}
    adapter = adapter_from_peft(components, "tiny", "dog", instance_prompt="a photo of sks dog")
    path = save_adapter(adapter, tmp_path / "dog.safetensors", torch.float32)
    native = tiny_pipeline()
    load_adapter(native, path)
    assert torch.allclose(sample(native.unet.eval()), dog, atol=1e-5)
    ids = torch.arange(12)[None]
    hidden = [encoder(ids)[0] for encoder in (native.text_encoder.eval(), text_encoder)]
    assert torch.allclose(*hidden, atol=1e-5)
    with pytest.raises(SVFitError, match="no layer of unet has an SVFit adapter named 'cat'"):
        adapter_from_peft({"unet": unet}, "tiny", "cat")


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (nn.Conv2d(2, 2, 1), "0 is a Conv2d, and SVFit adapts plain, unquantised linear layers"),
        (nn.MultiheadAttention(4, 2).out_proj, "0 is a NonDynamicallyQuantizableLinear"),
        (nn.Linear(4, 4, device="meta"), "0 has no weights yet"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused(module, sentence):
    with pytest.raises(SVFitError, match=sentence):
        get_peft_model(nn.Sequential(module), SVFitConfig(target_modules=["0"]))


def test_wrong_settings_are_refused():
    with pytest.raises(SVFitError, match="rank is 0"):
        SVFitConfig(rank=0)
    with pytest.raises(SVFitError, match="rank is 'all'"):
        SVFitConfig(rank="all")
    with pytest.raises(SVFitError, match="energy is 99"):
        SVFitConfig(energy=99)
