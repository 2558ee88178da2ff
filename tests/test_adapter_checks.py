"""What is not a whole, unharmed adapter file is refused in one sentence, and nothing in it is executed."""

import hashlib
import json
import pickle
import random
import struct

import pytest
import torch
from safetensors.torch import save, save_file

from svfit_dreambooth.adapter.file import Adapter, read_adapter, save_adapter
from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.errors import SVFitError

NAMES = ("unet.mid_block.attentions.0.attn1.to_q", "text_encoder.text_model.encoder.layers.3.self_attn.q_proj")


@pytest.fixture
def path(tmp_path):
    """A good file."""
    torch.manual_seed(0)
    shifts = {name: torch.randn(rank) * 0.1 for name, rank in zip(NAMES, (8, 5), strict=True)}
    adapter = Adapter(shifts, DEFAULT_BASE, {}, "a photo of sks dog", training={"learning_rate": 0.05})
    return save_adapter(adapter, tmp_path / "dog.safetensors", torch.float32)


def write_with(path, tensors, **changes):
    """A file of our format around any tensors, hash and targets made to fit unless changed; None drops a field."""
    content = save(tensors)
    (length,) = struct.unpack("<Q", content[:8])
    metadata = {
        "format": "svfit",
        "format_version": "1",
        "base_model": DEFAULT_BASE,
        "base_fingerprint": "{}",
        "targets": json.dumps({key.removesuffix(".shift"): tensor.numel() for key, tensor in tensors.items()}),
        "training": "{}",
        "payload_sha256": hashlib.sha256(content[8 + length :]).hexdigest(),
    } | changes
    save_file(tensors, path, {key: value for key, value in metadata.items() if value is not None})
    return path


def refuses(path, match):
    with pytest.raises(SVFitError, match=match) as caught:
        read_adapter(path)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and str(path) in message
    return message


def test_bfloat16_and_targets_with_suffix_are_read(tmp_path):
    key = NAMES[0] + ".shift"
    write_with(tmp_path / "a", {key: torch.ones(4, dtype=torch.bfloat16)}, targets=json.dumps({key: 4}), training=None)
    assert torch.equal(read_adapter(tmp_path / "a").shifts[NAMES[0]], torch.ones(4))


def test_not_a_file(tmp_path):
    refuses(tmp_path / "gone.safetensors", "no file.*gone")
    refuses(tmp_path, "is a folder")
    (tmp_path / "a").write_bytes(b"")
    refuses(tmp_path / "a", "is empty")


@pytest.mark.parametrize("content", [b"x", b"hello, this is a text file", b"\x89PNG\r\n\x1a\n" * 9, b"\0" * 100])
def test_not_safetensors(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    refuses(tmp_path / "a.safetensors", "isn't a safetensors file")


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_not_opened(tmp_path, zipped):
    path = tmp_path / "a.safetensors"
    torch.save({"unet.a.shift": torch.ones(3), "trap": Trap()}, path, _use_new_zipfile_serialization=zipped)
    refuses(path, "pickle")
    path.write_bytes(pickle.dumps(Trap()))
    refuses(path, "pickle")


@pytest.mark.parametrize(
    "tensors",
    [
        {"<my-dog>": torch.ones(768)},
        {"dog-sks": torch.ones(2, 768)},
        {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)},
        {"emb_params": torch.ones(4, 1024)},
    ],
    ids=["one row", "by its word", "SDXL", "A1111"],
)
def test_an_embedding(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    refuses(tmp_path / "a.safetensors", r"is a textual inversion embedding.*load_textual_inversion.*folder embeddings")


@pytest.mark.parametrize("tensors", [{"latents": torch.ones(1, 4, 8, 8)}, {"table": torch.ones(1000, 8)}])
def test_one_tensor_that_is_no_embedding(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    refuses(tmp_path / "a.safetensors", "is a safetensors file but not an SVFit adapter")


@pytest.mark.parametrize("suffix", ["lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight"])
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "svfit"}])
def test_lora(tmp_path, suffix, metadata):
    save_file({f"unet.a.to_q.{suffix}": torch.ones(2, 3)}, tmp_path / "a.safetensors", metadata)
    refuses(tmp_path / "a.safetensors", r"is a LoRA.*pipeline\.load_lora_weights")


def test_other_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"conv_in.weight": torch.ones(2, 3)}, path)
    refuses(path, "names no format")
    save_file({"conv_in.weight": torch.ones(2, 3)}, path, {"format": "pt"})
    refuses(path, "format is 'pt'")
    save_file({"mid_block.attn1.to_q.delta": torch.ones(3)}, path)
    refuses(path, "SVDiff")
    save_file({}, path, {"format": "svfit", "format_version": "1", "targets": "{}"})
    refuses(path, "no targets")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("format", "SVFit", "format is 'SVFit'"),
        ("format_version", "2", "format_version 2.*update"),
        ("format_version", "one", "'one'"),
        ("format_version", "0", "'0'"),
        ("format_version", "9" * 5000, "no version number"),
        ("targets", "{", "'targets'.*JSON"),
        ("targets", "[1]", "'targets'.*JSON"),
        ("targets", "[" * 100_000, "'targets'.*JSON"),
        ("targets", "{}", "no targets"),
        ("targets", '{"x":3}', "'x', which is no <component>"),
        ("targets", '{"unet..a":3}', "'unet..a', which is no <component>"),
        ("targets", '{"unet.a\\n.b":3}', "no <component>"),
        ("targets", '{"unet.a":true}', "rank True"),
        ("targets", '{"unet.a":3.0}', "rank 3.0"),
        ("targets", '{"unet.a":-3}', "rank -3"),
        ("targets", '{"unet.a":4}', r"shape \[3\].*say \[4\]"),
        ("targets", '{"unet.a":99999999999999999999}', "shape"),
        ("targets", '{"unet.b":3}', "lacks 1 of.*unet.b.shift"),
        ("targets", '{"unet.a":3,"unet.b":3}', "lacks 1 of.*unet.b.shift"),
        ("base_fingerprint", "nonsense", "'base_fingerprint'.*JSON.*nonsense"),
        ("base_fingerprint", '{"unet":3}', "no sample.*'unet'"),
        ("base_fingerprint", '{"unet":{"sha256":"00","sample":[NaN]}}', "no sample"),
        ("base_fingerprint", '{"unet":{"sha256":null,"sample":[]}}', "no sha256"),
        ("training", "nonsense", "'training'.*JSON"),
        ("payload_sha256", "00", "damaged"),
        *[(name, None, f"lacks '{name}'") for name in ("format_version", "base_model", "base_fingerprint", "targets")],
        ("payload_sha256", None, "lacks 'payload_sha256'"),
    ],
)
def test_metadata(tmp_path, field, value, match):
    refuses(write_with(tmp_path / "a.safetensors", {"unet.a.shift": torch.ones(3)}, **{field: value}), match)


def test_surplus_tensors(tmp_path):
    tensors = {"unet.a.shift": torch.ones(3), "unet.b.shift": torch.ones(3)}
    refuses(write_with(tmp_path / "a", tensors, targets='{"unet.a":3}'), "1 tensors.*unet.b.shift")
    tensors = {"unet.a.shift": torch.ones(3), "unet.a.index": torch.ones(3)}
    refuses(write_with(tmp_path / "a", tensors, targets='{"unet.a":3}'), "unet.a.index' .* is F32, only I16, I32")


@pytest.mark.parametrize("tensor", [torch.ones(3, 1), torch.ones(1, 3), torch.tensor(1.0), torch.ones(2)])
def test_wrong_shape(tmp_path, tensor):
    refuses(write_with(tmp_path / "a", {"unet.a.shift": tensor}, targets='{"unet.a":3}'), "shape")


@pytest.mark.parametrize(("dtype", "word"), [(torch.int32, "I32"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8")])
def test_wrong_dtype(tmp_path, dtype, word):
    refuses(write_with(tmp_path / "a", {"unet.a.shift": torch.ones(3).to(dtype)}), word)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(tmp_path, value):
    refuses(write_with(tmp_path / "a", {"unet.a.shift": torch.tensor([1, value])}), "NaN or infinity in 'unet.a.shift'")


def test_a_changed_value_is_noticed(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    refuses(path, "payload_sha256")


def test_wrong_offsets_are_noticed(path):
    content = path.read_bytes()
    assert content.count(b"[0,20]") == 1
    path.write_bytes(content.replace(b"[0,20]", b"[0,24]"))
    refuses(path, "damaged or cut short")


@pytest.mark.parametrize("claim", [10**18, 2**64 - 1, 2**40])
def test_nothing_is_allocated_on_a_claim(tmp_path, claim):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", claim) + b"{" + b" " * 100)
    refuses(path, f"{claim} bytes")
    header = json.dumps({"unet.a.shift": {"dtype": "F16", "shape": [claim], "data_offsets": [0, 2 * claim]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    refuses(path, "damaged or cut short")


def test_bytes_behind_the_end(path):
    path.write_bytes(path.read_bytes() + b"more")
    refuses(path, "damaged or cut short")


def test_cut_short_anywhere(path):
    content = path.read_bytes()
    for end in [*range(24), *range(24, len(content), 37), *range(len(content) - 20, len(content))]:
        path.write_bytes(content[:end])
        refuses(path, "empty|cut short|isn't a safetensors file")


def test_noise_raises_nothing_else(tmp_path, path):
    """Random files, and a good file with random bytes changed: an adapter or SVFitError, never anything else."""
    source = random.Random(0)
    good, victim = path.read_bytes(), tmp_path / "noise.safetensors"
    refused = 0
    for trial in range(1500):
        if trial % 3 == 0:
            content = source.randbytes(source.randrange(200))
        elif trial % 3 == 1:
            body = b"{" + source.randbytes(source.randrange(100))
            content = struct.pack("<Q", len(body)) + body
        else:
            content = bytearray(good)
            for _ in range(source.randrange(1, 4)):
                content[source.randrange(len(content))] = source.choice(b'{}[]",:0\\\xff9aU')
        victim.write_bytes(content)
        try:
            read_adapter(victim)
        except SVFitError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 1000


def exchanged(content, *pairs):
    """The file with words of its header exchanged, the same length, and its values untouched."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for entry in header.values():
        for before, after in pairs:
            if entry.get("dtype") == before:
                entry["dtype"] = after
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def test_exchanged_places_and_types_do_not_pass(tmp_path):
    """The bytes after the header are the same, and so is their hash."""
    adapter = Adapter({name: torch.randn(8) for name in NAMES}, DEFAULT_BASE, {})
    path = save_adapter(adapter, tmp_path / "dog.safetensors")
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    first, second = (header[name + ".shift"] for name in NAMES)
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    refuses(path, "don't match its tensors_sha256")
    path.write_bytes(exchanged(content, ("F16", "BF16")))
    refuses(path, "don't match its tensors_sha256")
    path.write_bytes(content)
    assert torch.equal(read_adapter(path).shifts[NAMES[0]], adapter.shifts[NAMES[0]].half().float())


def test_a_small_file_takes_little_memory(tmp_path):
    tensors = {"unet.a.shift": torch.ones(1), "unet.a.index": torch.tensor([2**24 - 1], dtype=torch.int32)}
    refuses(write_with(tmp_path / "a", tensors, targets='{"unet.a":1}'), "reaches 16777215, 65536 is the limit here")
