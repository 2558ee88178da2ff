"""LoRAs as the nearest adapter: what they change along the base's directions, and what gets lost."""

import json

import pytest
import torch
from conftest import tiny_pipeline, tiny_sdxl_pipeline
from flow_bases import tiny_flux1
from safetensors.torch import load_file, save_file
from test_loading import make_adapter

from svfit_dreambooth import read_adapter, save_adapter
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.commands.main import main
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import model_basis
from svfit_dreambooth.method.targets import matrix_layers
from svfit_dreambooth.sharing.export import export_lora
from svfit_dreambooth.sharing.lora_import import import_lora

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = LAYER.replace(".", "_")


@pytest.fixture(scope="module")
def base():
    return BaseModel("tiny", tiny_pipeline())


def matrices(base, layer=LAYER, rank=3):
    weight = matrix_layers(base.pipeline.unet)[layer][2].weight
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(weight.shape[0], rank, generator=generator)
    return up, torch.randn(rank, weight[0].numel(), generator=generator)


def nearest(base, change, layer=LAYER):
    """By the definition: u_i^T D v_i, all written out."""
    weight = matrix_layers(base.pipeline.unet)[layer][2].weight.detach()
    U, Vh = model_basis({"unet." + layer: weight.flatten(1)})["unet." + layer]
    return torch.diagonal(U.double().mT @ change.double() @ Vh.double().mT).float()


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline, tiny_flux1])
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_what_was_exported_comes_back(make, layout, tmp_path):
    base = BaseModel("tiny", make())
    components = list(base.family.components)
    adapter = make_adapter(base.pipeline, rank=5, components=components)
    adapter.instance_prompt, adapter.training = "a photo of sks dog", {"clip_skip": 1} if len(components) == 2 else {}
    path = save_adapter(adapter, tmp_path / "dog.safetensors")
    exported = export_lora(path, base, tmp_path / "lora.safetensors", layout, dtype=torch.float32)
    result = import_lora(exported.path, base)
    assert set(result.adapter.shifts) == set(adapter.shifts) and result.lost < 1e-3 and not result.unfit
    for name, shift in adapter.shifts.items():
        again = result.adapter.shifts[name]
        torch.testing.assert_close(again[: len(shift)], shift, atol=2e-3, rtol=2e-3)
        assert again[len(shift) :].norm() < 2e-3
    assert result.adapter.instance_prompt == "a photo of sks dog" and result.adapter.clip_skip == adapter.clip_skip
    assert result.adapter.base_fingerprint == adapter.base_fingerprint


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [
        (f"lora_unet_{FLAT}.lora_down.weight", f"lora_unet_{FLAT}.lora_up.weight", f"lora_unet_{FLAT}.alpha"),
        (f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight", None),
        (f"unet.{LAYER}.lora.down.weight", f"unet.{LAYER}.lora.up.weight", None),
        (f"base_model.model.{LAYER}.lora_A.weight", f"base_model.model.{LAYER}.lora_B.weight", None),
        (f"{LAYER}.lora_A.default.weight", f"{LAYER}.lora_B.default.weight", None),
        (
            f"unet.{LAYER}".replace(".to_q", ".processor.to_q_lora.down.weight"),
            f"unet.{LAYER}".replace(".to_q", ".processor.to_q_lora.up.weight"),
            None,
        ),
    ],
)
def test_layouts(base, tmp_path, down, up, alpha):
    B, A = matrices(base)
    tensors = {down: A, up: B} | ({alpha: torch.tensor(1.5)} if alpha else {})
    save_file(tensors, tmp_path / "x.safetensors")
    result = import_lora(tmp_path / "x.safetensors", base, partial=True)
    change = (0.5 if alpha else 1.0) * B @ A
    (shift,) = result.adapter.shifts.values()
    torch.testing.assert_close(shift, nearest(base, change), atol=1e-4, rtol=1e-3)
    missed = (1 - shift.square().sum() / change.square().sum()).sqrt().item()
    assert result.lost == pytest.approx(missed, abs=1e-4) and result.lost_by_component == {"unet": result.lost}


def test_settings_of_peft(base, tmp_path):
    B, A = matrices(base)
    save_file(
        {f"base_model.model.{LAYER}.lora_A.weight": A, f"base_model.model.{LAYER}.lora_B.weight": B},
        tmp_path / "adapter_model.safetensors",
    )
    expected = nearest(base, B @ A)
    for settings, scale in (
        ({"r": 3, "lora_alpha": 6}, 2.0),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
        ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 3}}, 1.0),
        ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"attn2.to_q": 3}}, 2.0),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        result = import_lora(tmp_path / "adapter_model.safetensors", base, partial=True)
        torch.testing.assert_close(next(iter(result.adapter.shifts.values())), scale * expected, atol=1e-3, rtol=1e-3)


def test_convolutions(base, tmp_path):
    layer = "down_blocks.0.resnets.0.conv1"
    weight = matrix_layers(base.pipeline.unet)[layer][2].weight
    B, A = matrices(base, layer)
    flat = "lora_unet_" + layer.replace(".", "_")
    save_file(
        {f"{flat}.lora_up.weight": B[:, :, None, None], f"{flat}.lora_down.weight": A.view(3, *weight.shape[1:])},
        tmp_path / "x.safetensors",
    )
    result = import_lora(tmp_path / "x.safetensors", base, partial=True)
    torch.testing.assert_close(
        result.adapter.shifts[f"unet.{layer}"], nearest(base, B @ A, layer), atol=1e-3, rtol=1e-3
    )


def test_a_lora_of_other_directions_is_refused_with_what_it_would_lose(base, tmp_path, capsys):
    B, A = matrices(base)
    path = tmp_path / "x.safetensors"
    save_file({f"unet.{LAYER}.lora_A.weight": A, f"unet.{LAYER}.lora_B.weight": B}, path)
    with pytest.raises(SVFitError, match=r"as an adapter .* loses 9[0-9.]+% of its change \(unet 9[0-9.]+%\)"):
        import_lora(path, base)
    base.pipeline.save_pretrained(tmp_path / "base")
    output = tmp_path / "dog.safetensors"
    arguments = [
        "import",
        str(path),
        "--output",
        str(output),
        "--pretrained_model_name_or_path",
        str(tmp_path / "base"),
    ]
    assert main(arguments) == 2 and "add --partial to take what is left" in capsys.readouterr().err
    assert main([*arguments, "--partial", "--instance_prompt", "a photo of sks dog"]) == 0
    assert "1 layers taken over, 9" in capsys.readouterr().out
    assert read_adapter(output).training["imported_from"] == "LoRA"
    assert read_adapter(output).instance_prompt == "a photo of sks dog"


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"lora_unet_x.hada_w1_a": torch.ones(3, 3)}, "is a LoHa, whose change is no product of two matrices"),
        ({"lora_unet_x.lokr_w1": torch.ones(3, 3)}, "is a LoKr, whose change"),
        ({f"unet.{LAYER}.lora_A.weight": torch.ones(1, 16), f"unet.{LAYER}.dora_scale": torch.ones(1)}, "is a DoRA"),
        ({f"unet.{LAYER}.lora_A.weight": torch.ones(1, 16)}, "one matrix of unet.* and lacks the other"),
        ({"unet.nowhere.lora_A.weight": torch.ones(1, 16)}, "changes unet.nowhere, which tiny lacks"),
        (
            {f"unet.{LAYER}.lora_A.weight": torch.ones(1, 99), f"unet.{LAYER}.lora_B.weight": torch.ones(16, 1)},
            "by 16 x 99 values, and the weight has 16 x 16: it was made for another base",
        ),
        (
            {f"unet.{LAYER}.lora_A.weight": torch.ones(1, 16), f"unet.{LAYER}.lora_B.weight": torch.ones(16, 2)},
            "which make no change",
        ),
        ({f"unet.{LAYER}.lora_A.weight": torch.full((1, 16), float("nan"))}, "holds NaN or infinity"),
        (
            {f"unet.{LAYER}.lora_A.weight": torch.ones(1, 16), f"unet.{LAYER}.lora_B.weight": torch.zeros(16, 1)},
            "changes nothing of tiny",
        ),
        (
            {"lora_unet_x.diff_b": torch.ones(3), f"unet.{LAYER}.lora_A.weight": torch.ones(1, 16)},
            r"1 of 2 tensors in .* do not fit an adapter \(1 diff_b tensors\)",
        ),
    ],
)
def test_refusals(base, tmp_path, tensors, sentence):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SVFitError, match=sentence) as refused:
        import_lora(tmp_path / "x.safetensors", base)
    assert "damaged" not in str(refused.value)  # the file is whole
    assert load_file(tmp_path / "x.safetensors")
