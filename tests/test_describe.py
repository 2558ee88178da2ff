"""What files say about themselves."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image
from test_loading import make_adapter

from svfit_dreambooth import read_adapter, save_adapter
from svfit_dreambooth.adapter.describe import (
    annotate_adapter,
    base_metadata,
    licence_note,
    read_thumbnail,
    stored_dtype,
    thumbnail_url,
)
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.sharing.lora_metadata import lora_metadata


@pytest.fixture(scope="module")
def adapter():
    return make_adapter(tiny_pipeline(), rank=3)


def gradient(width, height):
    x = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    return Image.fromarray(x.astype(np.uint8))


@pytest.mark.parametrize(("size", "side"), [((600, 400), 256), ((64, 64), 64), ((30, 50), 30)])
def test_a_thumbnail_is_a_small_square_of_the_middle(size, side):
    url = thumbnail_url(gradient(*size))
    assert url.startswith("data:image/jpeg;base64,") and len(url) < 20_000
    picture = read_thumbnail({"modelspec.thumbnail": url})
    assert picture.size == (side, side)
    edge = min(size)
    left = (size[0] - edge) / 2 / size[0] * 255
    assert abs(np.asarray(picture)[side // 2, 0, 0] - left) < 12  # JPEG


@pytest.mark.parametrize(
    "text",
    ["", "https://example.org/x.jpg", "data:image/svg+xml;base64,AAAA", "data:image/png;base64,AAAA", "data:image/jpeg;base64,%"],
)  # fmt: skip
def test_other_thumbnails_are_not_opened(text):
    assert read_thumbnail({"modelspec.thumbnail": text}) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_words_and_a_picture_are_added_and_values_stay(adapter, tmp_path, dtype):
    path = save_adapter(adapter, tmp_path / "dog.safetensors", dtype)
    before = read_adapter(path)
    annotate_adapter(path, thumbnail=gradient(64, 64), author="Zoë", license="CC0-1.0", title="Dog")
    after = read_adapter(path)
    assert after.metadata["modelspec.author"] == "Zoë" and after.title == "Dog"
    assert after.metadata["payload_sha256"] == before.metadata["payload_sha256"] and stored_dtype(path) == dtype
    assert read_thumbnail(after.metadata).size == (64, 64)
    assert licence_note(after) == "CC0-1.0"
    annotate_adapter(path, author="", license=None)
    again = read_adapter(path)
    assert "modelspec.author" not in again.metadata and again.metadata["modelspec.license"] == "CC0-1.0"
    with pytest.raises(SVFitError, match="'hash_sha256' is not among the fields"):
        annotate_adapter(path, hash_sha256="0x0")


@pytest.mark.parametrize(
    ("architecture", "prediction", "expected"),
    [
        ("stable-diffusion-v1", "epsilon", ("stable-diffusion-v1/lora", "sd_v1", "False", "CreativeML OpenRAIL-M")),
        ("stable-diffusion-v2", "v", ("stable-diffusion-v2-768-v/lora", "sd_v2_v", "True", "CreativeML OpenRAIL++-M")),
        ("stable-diffusion-v2", "epsilon", ("stable-diffusion-v2-512/lora", "sd_v2", "True", "CreativeML OpenRAIL++-M")),
        ("stable-diffusion-xl-v1-base", "epsilon", ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "False", "CreativeML OpenRAIL++-M")),
        ("toybox", "epsilon", ("toybox/lora", None, None, "Apache-2.0")),
    ],
)  # fmt: skip
def test_families(adapter, architecture, prediction, expected):
    adapter.architecture = architecture
    base = BaseModel("tiny", tiny_pipeline(prediction_type="v_prediction" if prediction == "v" else "epsilon"))
    found = lora_metadata(adapter, title="dog", scale=1.0, ranks={"a": 3}, alpha=3.0, error=0.0, base=base)
    assert found["modelspec.prediction_type"] == prediction and found["modelspec.resolution"] == "16x16"
    fields = ("modelspec.architecture", "ss_base_model_version", "ss_v2")
    assert tuple(found.get(field) for field in fields) == expected[:3]
    assert found["modelspec.license"] == f"as the base model's, {expected[3]}"
    assert all(isinstance(value, str) for value in found.values())
    assert json.loads(found["svfit_source"])["left_out"] == 0.0


def test_what_an_adapter_takes_over_from_its_base():
    """Toybox says Apache-2.0; a Stable Diffusion of unknown family leaves the licence to the reader."""
    found = base_metadata("toybox", 16, "epsilon")
    assert found == {
        "modelspec.resolution": "16x16",
        "modelspec.prediction_type": "epsilon",
        "modelspec.license": "as the base model's, Apache-2.0",
    }
    assert "modelspec.license" not in base_metadata("stable-diffusion", 16, None)
