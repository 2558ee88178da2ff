"""The adapter file: what is written comes back, and what can't be written is refused."""

import hashlib
import json
import os
import re
import struct
from pathlib import Path

import pytest
import torch

from svfit_dreambooth.adapter.describe import describe_adapter
from svfit_dreambooth.adapter.file import Adapter, read_adapter, save_adapter
from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.errors import SVFitError

FINGERPRINT = {"unet": {"sha256": "ab" * 32, "sample": [0.25, -1.5]}}
NAMES = ("unet.mid_block.attentions.0.attn1.to_q", "text_encoder.text_model.encoder.layers.3.self_attn.q_proj")


def sd15_ranks():
    """Projection -> full rank, for Stable Diffusion 1.5 with its text encoder."""
    widths = {f"down_blocks.{b}.attentions.{a}": 320 * 2**b for b in range(3) for a in range(2)}
    widths |= {"mid_block.attentions.0": 1280}
    widths |= {f"up_blocks.{b}.attentions.{a}": 320 * 2 ** (3 - b) for b in (1, 2, 3) for a in range(3)}
    ranks = {}
    for place, width in widths.items():
        for attention, context in (("attn1", width), ("attn2", 768)):
            for projection, in_features in (("to_q", width), ("to_k", context), ("to_v", context), ("to_out.0", width)):
                ranks[f"unet.{place}.transformer_blocks.0.{attention}.{projection}"] = min(width, in_features)
    for layer in range(12):
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            ranks[f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{projection}"] = 768
    return ranks


def make_adapter(**changes):
    torch.manual_seed(0)
    fields = {
        "shifts": {name: torch.randn(rank) * 0.1 for name, rank in zip(NAMES, (8, 5), strict=True)},
        "base_model": DEFAULT_BASE,
        "base_fingerprint": FINGERPRINT,
        "instance_prompt": "a photo of sks dog",
        "class_prompt": "a photo of a dog",
        "training": {"learning_rate": 0.05, "max_train_steps": 200},
        "title": "Dog",
    }
    return Adapter(**(fields | changes))


def header_of(path):
    content = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.fixture
def path(tmp_path):
    return save_adapter(make_adapter(), tmp_path / "dog.safetensors", torch.float32)


# ---------------------------------------------------------------- round trip


def test_float32_round_trip_is_exact(path):
    adapter, back = make_adapter(), read_adapter(path)
    assert back.shifts.keys() == adapter.shifts.keys()
    assert all(torch.equal(back.shifts[name], adapter.shifts[name]) for name in NAMES)
    for name in ("base_model", "base_fingerprint", "instance_prompt", "class_prompt", "training", "title"):
        assert getattr(back, name) == getattr(adapter, name)
    assert back.ranks == {NAMES[0]: 8, NAMES[1]: 5} and back.components == ["text_encoder", "unet"]


def test_float16_is_the_default_and_rounds_once(tmp_path):
    adapter = make_adapter()
    back = read_adapter(save_adapter(adapter, tmp_path / "a.safetensors"))
    for name in NAMES:
        assert back.shifts[name].dtype == torch.float32
        assert torch.equal(back.shifts[name], adapter.shifts[name].half().float())
    again = read_adapter(save_adapter(back, tmp_path / "b.safetensors"))
    assert again.metadata["payload_sha256"] == back.metadata["payload_sha256"]


def test_parameters_views_and_float64(tmp_path):
    wide = torch.arange(12, dtype=torch.float64).reshape(6, 2)
    shifts = {"unet.a": wide[:, 1], "unet.b": torch.nn.Parameter(torch.ones(3)), "unet.c": torch.zeros(2)}
    shifts["unet.d"] = shifts["unet.c"]  # shared memory is no obstacle
    back = read_adapter(save_adapter(make_adapter(shifts=shifts), tmp_path / "a.safetensors", torch.float32))
    assert torch.equal(back.shifts["unet.a"], wide[:, 1].float()) and len(back.shifts) == 4


def test_shifts_outlive_the_file(path):
    back = read_adapter(path)
    before = back.shifts[NAMES[0]].clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(back.shifts[NAMES[0]], before)


def test_header(path):
    header, payload = header_of(path)
    metadata = header.pop("__metadata__")
    assert set(header) == {name + ".shift" for name in NAMES}
    assert metadata["format"] == "svfit" and metadata["format_version"] == "1"
    assert json.loads(metadata["targets"]) == {NAMES[0]: 8, NAMES[1]: 5}
    assert metadata["payload_sha256"] == hashlib.sha256(payload).hexdigest()
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["payload_sha256"]
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion/svfit"
    assert metadata["modelspec.title"] == "Dog"
    assert metadata["modelspec.trigger_phrase"] == metadata["instance_prompt"] == "a photo of sks dog"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", metadata["modelspec.date"])


def test_no_prompts_and_no_title(tmp_path):
    bare = make_adapter(instance_prompt=None, class_prompt=None, title="", training={})
    back = read_adapter(save_adapter(bare, tmp_path / "mein Hund.safetensors"))
    assert back.instance_prompt is None and back.class_prompt is None and back.title == "mein Hund"
    assert not {"instance_prompt", "class_prompt", "modelspec.trigger_phrase"} & back.metadata.keys()


def test_foreign_metadata_is_kept_own_is_renewed(path, tmp_path):
    adapter = read_adapter(path)
    adapter.metadata["modelspec.author"] = "Ann"
    adapter.instance_prompt, adapter.architecture = None, "stable-diffusion-v1"
    back = read_adapter(save_adapter(adapter, tmp_path / "b.safetensors"))
    assert back.metadata["modelspec.author"] == "Ann" and "modelspec.trigger_phrase" not in back.metadata
    assert back.architecture == "stable-diffusion-v1"


def test_all_of_stable_diffusion_15_stays_under_300_kb(tmp_path):
    ranks = sd15_ranks()
    assert len(ranks) == 176 and sum(ranks.values()) == 130_560
    assert sum(rank for name, rank in ranks.items() if name.startswith("unet.")) == 93_696
    training = {
        "adapter_name": "dog", "rank": "full", "energy": None, "target_modules": None, "train_text_encoder": True,
        "learning_rate": 0.05, "text_encoder_lr": 0.0005, "lr_scheduler": "cosine", "lr_warmup_steps": 50,
        "max_train_steps": 1000, "train_batch_size": 1, "gradient_accumulation_steps": 4, "resolution": 512,
        "center_crop": False, "random_flip": True, "crops_per_photo": 4, "mixed_precision": "bf16", "seed": 0,
        "with_prior_preservation": True, "prior_loss_weight": 1.0, "num_class_images": 100, "adam_beta1": 0.9,
        "adam_beta2": 0.999, "adam_weight_decay": 0.0, "adam_epsilon": 1e-08, "max_grad_norm": 1.0,
        "num_photos": 5, "final_loss": 0.0812, "seconds": 914, "gradient_checkpointing": False,
        "allow_tf32": False,
    }  # fmt: skip
    fingerprint = {
        component: {"sha256": "0123456789abcdef" * 4, "sample": [-0.012345 - i / 1e6 for i in range(32)]}
        for component in ("unet", "text_encoder")
    }
    assert len(json.dumps(training)) > 700 and len(json.dumps(fingerprint)) > 800
    adapter = make_adapter(
        shifts={name: torch.randn(rank) for name, rank in ranks.items()},
        base_model="stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        base_fingerprint=fingerprint,
        training=training,
        architecture="stable-diffusion-v1",
    )
    path = save_adapter(adapter, tmp_path / "dog.safetensors")
    assert path.stat().st_size < 300_000
    assert read_adapter(path).ranks == ranks


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("toybox", "toybox"),
        ("owner/name", "owner/name"),
        ("owner/name@refs/pr/1", "owner/name@refs/pr/1"),
        ("My Model", "My Model"),
        ("/home/ann/models/sd15", "sd15"),
        ("/home/ann/models/sd15/", "sd15"),
        ("../models/sd15", "sd15"),
        ("./sd15", "sd15"),
        ("~/sd15", "sd15"),
        ("a/b/c.safetensors", "c.safetensors"),
        ("C:\\models\\sd15", "sd15"),
        ("https://huggingface.co/owner/name", "name"),
        ("/", "unnamed"),
    ],
)
def test_no_path_of_the_disk_is_stored(tmp_path, given, stored):
    path = save_adapter(make_adapter(base_model=given), tmp_path / "a.safetensors")
    assert read_adapter(path).base_model == stored


def test_training_is_stored_without_paths(tmp_path):
    training = {
        "instance_data_dir": "secret", "pretrained_model_name_or_path": "secret", "config_file": "secret",
        "init_adapter": "/home/secret/old.safetensors", "list": ["C:\\secret\\x", "kept"], "at": Path("secret/y"),
        "nested": {"output_dir": "secret", "seed": 3},
    }  # fmt: skip
    path = save_adapter(make_adapter(training=training), tmp_path / "a.safetensors")
    expected = {"init_adapter": "old.safetensors", "list": ["x", "kept"], "at": "y", "nested": {"seed": 3}}
    assert read_adapter(path).training == expected
    assert b"secret" not in path.read_bytes()


@pytest.mark.parametrize(
    ("shift", "dtype", "match"),
    [
        (torch.tensor([1.0, float("nan")]), torch.float16, "NaN or infinity"),
        (torch.tensor([1.0, float("inf")]), torch.float32, "NaN or infinity"),
        (torch.tensor([1.0, -70000.0]), torch.float16, "70000.*save it as float32"),
        (torch.tensor([1e300], dtype=torch.float64), torch.float32, "1e.300"),
        (torch.ones(2, 2), torch.float16, r"shape \(2, 2\)"),
        (torch.ones(0), torch.float16, r"shape \(0,\)"),
        (torch.ones(2), torch.int8, "torch.int8"),
    ],
)
def test_saving_refuses_values(tmp_path, shift, dtype, match):
    with pytest.raises(SVFitError, match=match):
        save_adapter(make_adapter(shifts={"unet.a": shift}), tmp_path / "a.safetensors", dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["unet.a.shift", "unet", "", "unet..a", "unet.a b"])
def test_saving_refuses_names(tmp_path, name):
    with pytest.raises(SVFitError, match="isn't a projection's name"):
        save_adapter(make_adapter(shifts={name: torch.ones(2)}), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shifts": {}}, "no shifts"),
        ({"training": {"loss": float("nan")}}, "'training'.*JSON"),
        ({"base_fingerprint": {"x": object()}}, "'base_fingerprint'.*JSON"),
        ({"instance_prompt": "bad \udcff"}, "Unicode"),
    ],
)
def test_saving_refuses_metadata(tmp_path, changes, match):
    with pytest.raises(SVFitError, match=match):
        save_adapter(make_adapter(**changes), tmp_path / "a.safetensors")


def test_saving_refuses_places(tmp_path):
    with pytest.raises(SVFitError, match="is a folder"):
        save_adapter(make_adapter(), tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(SVFitError, match="can't be written"):
        save_adapter(make_adapter(), tmp_path / "file" / "a.safetensors")
    with pytest.raises(SVFitError, match="can't be written"):
        save_adapter(make_adapter(), tmp_path / "a\0b")
    assert save_adapter(make_adapter(), tmp_path / "new" / "folder" / "a.safetensors").is_file()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_save_leaves_the_old_file(path, monkeypatch, step):
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(SVFitError, match="No space left"):
            save_adapter(make_adapter(title="New"), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    save_adapter(make_adapter(title="New"), path)
    assert read_adapter(path).title == "New" and list(path.parent.iterdir()) == [path]


def test_others_may_read_what_the_umask_allows(tmp_path):
    (tmp_path / "plain").write_text("x")
    path = save_adapter(make_adapter(), tmp_path / "a.safetensors")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---------------------------------------------------------------- the page about the format


def test_the_page_holds_a_loader_that_works(tmp_path):
    """The loader printed in docs/adapter-format.md merges what this package wrote."""
    page = (Path(__file__).parents[1] / "docs" / "adapter-format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {}
    exec(code, names)  # noqa: S102 - our own page

    torch.manual_seed(1)
    unet = torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 4, dtype=torch.float64)})
    with torch.no_grad():
        unet["to_q"].weight.copy_(unet["to_q"].weight.half().bfloat16())
    before = unet["to_q"].weight.detach().clone()
    shift = torch.tensor([0.5, -0.25, 1.0])
    path = save_adapter(make_adapter(shifts={"unet.to_q": shift}), tmp_path / "a.safetensors")
    names["merge"](path, {"unet": unet}, scale=2.0)

    U, S, Vh = torch.linalg.svd(before, full_matrices=False)
    S[:3] += 2.0 * shift
    assert torch.allclose(unet["to_q"].weight, U @ torch.diag(S) @ Vh, atol=1e-12)

    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        names["merge"](path, {"unet": unet})


# ---------------------------------------------------------------- describing


def test_description(tmp_path):
    shifts = {
        "unet.down_blocks.0.attentions.0.attn1.to_q": torch.full((4,), 3.0),
        "unet.down_blocks.0.attentions.1.attn1.to_q": torch.full((12,), -1.0),
        "unet.mid_block.attentions.0.attn1.to_q": torch.full((2,), 0.5),
        "text_encoder.text_model.encoder.layers.10.self_attn.q_proj": torch.zeros(3),
        "text_encoder.text_model.encoder.layers.2.self_attn.q_proj": torch.zeros(3),
        "transformer.proj_in": torch.ones(1),
    }
    adapter = make_adapter(shifts=shifts)
    path = save_adapter(adapter, tmp_path / "a.safetensors")
    described = describe_adapter(adapter, path)
    assert json.loads(json.dumps(described)) == described
    assert described["file_bytes"] == path.stat().st_size and "file_bytes" not in describe_adapter(adapter)
    assert list(described["blocks"]) == [
        "text_encoder layers.2", "text_encoder layers.10", "transformer proj_in", "unet down_blocks.0", "unet mid_block",
    ]  # fmt: skip
    assert described["blocks"]["unet down_blocks.0"] == {
        "projections": 2, "values": 16, "rank_min": 4, "rank_max": 12, "strength": pytest.approx(3**0.5),
    }  # fmt: skip
    assert described["components"]["unet"]["values"] == 18
    assert described["total"]["projections"] == 6 and described["total"]["values"] == 25
    assert described["base_model"] == DEFAULT_BASE and described["instance_prompt"] == "a photo of sks dog"
