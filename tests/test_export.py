"""Adapters as LoRA files: what public loaders make of them, and what is refused."""

import hashlib
import json
import struct

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import LCMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_loading import make_adapter, paint

from svfit_dreambooth import load_adapter, save_adapter, unload_adapter
from svfit_dreambooth.bases.families import find_projections
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.method.decomposition import as_matrix
from svfit_dreambooth.method.targets import matrix_layers
from svfit_dreambooth.sharing import export as export_room
from svfit_dreambooth.sharing.export import export_lora
from svfit_dreambooth.sharing.lora_file import describe_lora, is_lora, lora_changes
from svfit_dreambooth.sharing.lora_names import Place
from svfit_dreambooth.sharing.lora_plan import plan_lora

PIXEL = 1 / 255


@pytest.fixture
def base():
    return BaseModel("tiny", tiny_pipeline())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """An adapter of UNet and text encoder whose ranks differ from layer to layer, as `--energy` chooses them."""
    adapter = make_adapter(tiny_pipeline())
    generator = torch.Generator().manual_seed(0)
    for name, shift in adapter.shifts.items():
        adapter.shifts[name] = shift[: int(torch.randint(1, len(shift) + 1, (1,), generator=generator))]
    assert len(set(adapter.ranks.values())) > 5
    adapter.instance_prompt = "a photo of sks dog"
    adapter.architecture = "stable-diffusion-v1"
    adapter.training = {"photos": 5, "steps": 80, "resolution": 16}
    return save_adapter(adapter, tmp_path_factory.mktemp("adapters") / "dog.safetensors")


def native_picture(pipeline, path, scale=1.0):
    load_adapter(pipeline, path, scale)
    picture = paint(pipeline)
    unload_adapter(pipeline)
    return picture


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("scale", [1.0, -0.6])
def test_the_public_loader_paints_the_adapters_pictures(base, path, tmp_path, layout, scale):
    before = paint(base.pipeline)
    native = native_picture(base.pipeline, path, scale)
    assert (native - before).abs().max() > 10 * PIXEL
    exported = export_lora(path, base, tmp_path / "out.safetensors", layout, scale=scale, dtype=torch.float32)
    assert torch.equal(paint(base.pipeline), before)
    base.pipeline.load_lora_weights(str(exported.path))
    assert (paint(base.pipeline) - native).abs().max() <= PIXEL / 100
    base.pipeline.unload_lora_weights()
    half = export_lora(path, base, tmp_path / "half.safetensors", layout, scale=scale)
    base.pipeline.load_lora_weights(str(half.path))
    assert (paint(base.pipeline) - native).abs().max() <= PIXEL
    assert half.file_bytes < 0.75 * exported.file_bytes


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_every_layer_has_a_name_that_the_loader_knows(base, tmp_path, layout):
    adapter = make_adapter(base.pipeline)
    generator = torch.Generator().manual_seed(1)
    weights = {
        f"{component}.{name}": as_matrix(layer.weight)
        for component in ("unet", "text_encoder")
        for name, (_, _, layer) in matrix_layers(getattr(base.pipeline, component)).items()
    }
    assert any("ff.net.0.proj" in name for name in weights) and any("time_emb" in name for name in weights)
    assert {"unet.conv_in", "unet.conv_out", "unet.down_blocks.0.downsamplers.0.conv"} <= set(weights)
    adapter.shifts = {name: 0.1 * torch.randn(min(w.shape), generator=generator) for name, w in weights.items()}
    adapter.base_fingerprint = fingerprint(weights)
    path = save_adapter(adapter, tmp_path / "all.safetensors")
    native = native_picture(base.pipeline, path)
    exported = export_lora(path, base, tmp_path / "out.safetensors", layout, dtype=torch.float32)
    base.pipeline.load_lora_weights(str(exported.path))
    assert (paint(base.pipeline) - native).abs().max() <= PIXEL / 100


def test_kohya_files_have_one_alpha_and_flat_names_only(base, path, tmp_path):
    exported = export_lora(path, base, tmp_path, "kohya")
    assert exported.path == tmp_path / "dog.safetensors"
    tensors = load_file(exported.path)
    assert all(key.startswith(("lora_unet_", "lora_te_text_model_")) for key in tensors)
    assert len({value.item() for key, value in tensors.items() if key.endswith(".alpha")}) == 1
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in tensors
    assert is_lora(exported.path) and describe_lora(exported.path)["layers"] == 40


def test_diffusers_files_say_the_scale_of_every_layer(base, path, tmp_path):
    exported = export_lora(path, base, tmp_path / "folder", "diffusers")
    assert exported.path == tmp_path / "folder" / "pytorch_lora_weights.safetensors"
    with safe_open(exported.path, "pt") as file:
        assert not [key for key in file.keys() if "alpha" in key]  # noqa: SIM118
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    for component in ("unet", "text_encoder"):
        assert metadata[f"{component}.r"] == metadata[f"{component}.lora_alpha"]
        assert metadata[f"{component}.rank_pattern"] == metadata[f"{component}.alpha_pattern"]
    base.pipeline.load_lora_weights(str(tmp_path / "folder"))  # found by its name
    assert base.pipeline.unet.peft_config["default_0"].rank_pattern == metadata["unet.rank_pattern"]
    assert all(
        layer.scaling["default_0"] == 1.0
        for model in (base.pipeline.unet, base.pipeline.text_encoder)
        for layer in model.modules()
        if hasattr(layer, "lora_A")
    )


def test_metadata_of_a_lora(base, path, tmp_path):
    exported = export_lora(path, base, tmp_path / "dog.safetensors", scale=0.5)
    content = exported.path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    digest = hashlib.sha256(content[start:]).hexdigest()
    metadata = describe_lora(exported.path)["metadata"]
    assert metadata["sshs_model_hash"] == digest and metadata["modelspec.hash_sha256"] == "0x" + digest
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["ss_base_model_version"] == "sd_v1" and metadata["ss_v2"] == "False"
    assert metadata["modelspec.trigger_phrase"] == "a photo of sks dog"
    assert json.loads(metadata["ss_tag_frequency"]) == {"photos": {"a photo of sks dog": 5}}
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == str(max(exported.plan.ranks.values()))
    assert metadata["modelspec.resolution"] == "16x16" and "OpenRAIL-M" in metadata["modelspec.license"]
    source = json.loads(metadata["svfit_source"])
    assert source["scale"] == 0.5 and len(source["payload_sha256"]) == 64


# ---------------------------------------------------------------- truncation


def test_truncation_is_that_of_the_singular_value_decomposition():
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(12, generator=generator)
    U, Vh = (torch.linalg.qr(torch.randn(n, 12, generator=generator).double())[0] for n in (20, 16))
    change = (U * shift) @ Vh.mT
    S = torch.linalg.svdvals(change)
    plan = plan_lora({"unet.a.to_q": shift}, {"unet.a.to_q": (20, 16)}, rank=4)
    best = (S[4:].square().sum() / S[:12].square().sum()).sqrt().item()
    assert plan.errors["unet.a.to_q"] == pytest.approx(best, rel=1e-6) == plan.total_error
    assert plan.bytes == 2 * 4 * (20 + 16)
    kept = plan.kept["unet.a.to_q"]
    off = change - (U[:, kept] * shift[kept]) @ Vh[:, kept].mT
    assert (off.norm() / change.norm()).item() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("error", [0.3, 0.05, 0.0])
def test_error_chooses_the_smallest_ranks_that_keep_it(error):
    generator = torch.Generator().manual_seed(0)
    shifts = {f"unet.{i}.to_q": torch.randn(24, generator=generator).pow(3) for i in range(5)}
    plan = plan_lora(shifts, dict.fromkeys(shifts, (24, 24)), error=error)
    for name, kept in plan.kept.items():
        ordered = shifts[name].double().square().sort(descending=True).values
        lost, lost_with_one_less = (
            (ordered[rank:].sum() / ordered.sum()).sqrt() for rank in (len(kept), len(kept) - 1)
        )
        assert lost <= error + 1e-9 and lost_with_one_less > error
        assert plan.errors[name] == pytest.approx(lost.item(), abs=1e-9)
    assert (plan.total_error == 0) == (error == 0)


def test_a_shorter_lora_is_off_by_what_was_said(base, path, tmp_path):
    plans = []
    exported = export_lora(path, base, tmp_path / "a.safetensors", rank=3, dtype=torch.float32, on_plan=plans.append)
    assert exported.measured_error == pytest.approx(plans[0].total_error, rel=1e-4) and exported.measured_error > 0.1
    assert "it leaves out" in plans[0].lines()[1] and max(plans[0].ranks.values()) == 3
    chosen = export_lora(path, base, tmp_path / "b.safetensors", error=0.1, dtype=torch.float32)
    assert chosen.worst_error <= 0.1 and chosen.measured_error > 0.01
    assert exported.file_bytes < chosen.file_bytes


def test_values_that_are_zero_take_no_place(base, tmp_path):
    adapter = make_adapter(base.pipeline)
    names = sorted(adapter.shifts)
    for name in names[1:]:
        adapter.shifts[name] = torch.zeros(4)
    adapter.shifts[names[0]][2:] = 0
    path = save_adapter(adapter, tmp_path / "dog.safetensors")
    exported = export_lora(path, base, tmp_path / "out.safetensors")
    assert exported.plan.ranks == {names[0]: 2}
    adapter.shifts[names[0]][:] = 0
    save_adapter(adapter, path)
    with pytest.raises(SVFitError, match="every shift of the adapter is zero"):
        export_lora(path, base, tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 3, "error": 0.1}, "give one of them"),
        ({"rank": 0}, "rank 0 keeps nothing"),
        ({"error": 1.5}, "error 1.5 is no share"),
        ({"dtype": torch.bfloat16}, "not as torch.bfloat16"),
    ],
)
def test_choices_that_make_no_sense(base, path, tmp_path, options, sentence):
    with pytest.raises(SVFitError, match=sentence):
        export_lora(path, base, tmp_path / "out.safetensors", **options)


def test_the_adapter_is_never_replaced(base, path):
    content = path.read_bytes()
    for output in (path, path.parent):
        with pytest.raises(SVFitError, match="is what the output is made from"):
            export_lora(path, base, output)
    assert path.read_bytes() == content


def test_a_place_that_cannot_be_written(base, path):
    with pytest.raises(SVFitError, match="can't be written"):
        export_lora(path, base, path / "folder" / "out.safetensors")


def test_another_base_is_refused(path, tmp_path):
    other = BaseModel("other", tiny_pipeline(seed=7))
    with pytest.raises(SVFitError, match="holds other weights"):
        export_lora(path, other, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
    exported = export_lora(path, other, tmp_path / "out.safetensors", allow_other_base=True)
    assert exported.measured_error < 1e-3


def test_a_file_that_came_out_wrong_is_not_kept(base, path, tmp_path, monkeypatch):
    def spoilt(tensors, file, metadata):
        key = min(key for key in tensors if key.endswith("lora_up.weight"))
        save_file(tensors | {key: 1.1 * tensors[key]}, file, metadata=metadata)

    monkeypatch.setattr(export_room, "save_file", spoilt)
    with pytest.raises(SVFitError, match="the LoRA came out wrong and was not kept"):
        export_lora(path, base, tmp_path / "out.safetensors")
    monkeypatch.setattr(export_room, "save_file", lambda tensors, file, metadata: save_file({}, file))
    with pytest.raises(SVFitError, match="holds other tensors"):
        export_lora(path, base, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir()) and not base.pipeline.unet.svfit_adapters


def test_reading_back_minds_shapes(tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file({"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(4, 2)}, file)
    places = {"unet.a": Place("unet.a")}
    ((name, change),) = lora_changes(file, {"unet.a": (4, 3)}, "diffusers", places)
    assert name == "unet.a" and torch.equal(change, torch.full((4, 3), 2.0))
    with pytest.raises(SVFitError, match="with the shapes"):
        list(lora_changes(file, {"unet.a": (4, 4)}, "diffusers", places))


# ---------------------------------------------------------------- beside a LoRA of somebody else


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_few_step_lora_works_beside_an_adapter_in_either_order(path, tmp_path, layout):
    """What LCM-LoRA is to a pipeline: low-rank matrices on attention, feed-forward and time embedding, a scheduler."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, (_, _, layer) in find_projections(tiny_pipeline().unet, ["all-linear"]).items():
        down, up = (0.1 * torch.randn(4, n, generator=generator) for n in (layer.in_features, layer.out_features))
        if layout == "kohya":
            stem = "lora_unet_" + name.replace(".", "_")
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up.mT.contiguous()}
            tensors[f"{stem}.alpha"] = torch.tensor(4.0)
        else:
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up.mT.contiguous()}
    lcm = tmp_path / "lcm.safetensors"
    save_file(tensors, lcm)

    def pipeline():
        result = tiny_pipeline()
        result.scheduler = LCMScheduler.from_config(result.scheduler.config)
        return result

    def few_steps(pipeline):
        return paint(pipeline, guidance_scale=1.0)

    first, second = pipeline(), pipeline()
    base = few_steps(first)
    load_adapter(first, path)
    adapter_alone = few_steps(first)
    first.load_lora_weights(str(lcm), adapter_name="lcm")
    second.load_lora_weights(str(lcm), adapter_name="lcm")
    lora_alone = few_steps(second)
    load_adapter(second, path)
    both = few_steps(first)
    assert (few_steps(second) - both).abs().max() <= 1e-4
    for other in (base, adapter_alone, lora_alone):
        assert (both - other).abs().max() > 5 * PIXEL
    unload_adapter(first)  # in the order of loading, and in the reverse
    assert (few_steps(first) - lora_alone).abs().max() <= 1e-4
    second.unload_lora_weights()
    assert (few_steps(second) - adapter_alone).abs().max() <= 1e-4
    first.unload_lora_weights()
    unload_adapter(second)
    assert (few_steps(first) - base).abs().max() <= 1e-6 and (few_steps(second) - base).abs().max() <= 1e-6


def test_an_export_says_which_programs_read_less_of_it():
    names = ["unet.conv_in", "unet.time_embedding.linear_1", "unet.mid_block.attentions.0.proj_in"]
    names.append("text_encoder.text_model.encoder.layers.0.self_attn.q_proj")
    shifts, shapes = {name: torch.ones(2) for name in names}, dict.fromkeys(names, (4, 4))
    last = plan_lora(shifts, shapes, "kohya").lines()[-1]
    assert last == "sd-scripts has no place for 2 of the layers, such as unet.conv_in, and leaves them out"
    assert "ComfyUI reads the UNet's part of this layout only" in plan_lora(shifts, shapes, "diffusers").lines()[-1]
    plain = {names[2]: torch.ones(2)}
    for layout in ("kohya", "diffusers"):
        assert plan_lora(plain, shapes, layout).lines()[-1] == "it holds the adapter's whole change"


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize(("first", "second", "target"), [(6, 4, None), (4, 6, 32)])
def test_exports_of_other_ranks_are_exchanged_while_loaded(tmp_path, layout, first, second, target):
    """diffusers' hotswap, of files that have one rank in all layers; with several in a file it paints other pictures."""
    base = BaseModel("tiny", tiny_pipeline())
    files = []
    for seed, rank in enumerate((first, second)):
        adapter = save_adapter(make_adapter(base.pipeline, seed, 20, ["unet"]), tmp_path / f"{seed}.safetensors")
        output = tmp_path / f"lora-{seed}.safetensors"
        files.append(export_lora(adapter, base, output, layout, rank=rank, dtype=torch.float32).path)
    whole, swapped = tiny_pipeline(), tiny_pipeline()
    whole.load_lora_weights(files[1], adapter_name="x")
    if target is not None:
        swapped.enable_lora_hotswap(target_rank=target)
    swapped.load_lora_weights(files[0], adapter_name="x")
    before = paint(swapped)
    swapped.load_lora_weights(files[1], hotswap=True, adapter_name="x")
    assert (paint(swapped) - paint(whole)).abs().max() < 1e-4 < (before - paint(whole)).abs().max()
