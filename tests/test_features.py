"""DINO and CLIP as they come from folders, at tiny sizes."""

import pytest
import torch
from conftest import WORDS
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.features import open_features
from toybox.tokenizer import build_tokenizer

IMAGES = [Image.new("RGB", (40, 30), "red"), Image.new("L", (20, 20), 80), Image.new("RGB", (32, 32), "blue")]


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    tokenizer = build_tokenizer(WORDS, max_length=77)
    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**common, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**common, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return str(folder)


def test_dino_gives_its_class_token(dino):
    features = open_features("any", dino_path=dino)
    rows = features.subject(IMAGES)
    inputs = AutoImageProcessor.from_pretrained(dino)(images=[i.convert("RGB") for i in IMAGES], return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(dino).eval()(**inputs).last_hidden_state[:, 0]
    assert torch.allclose(rows, expected, atol=1e-5) and features.picture is None and features.any is features.subject


def test_clip_gives_pictures_and_texts_in_one_space(clip):
    features = open_features(DEFAULT_BASE, clip_path=clip)  # what is asked for goes before the judge
    pictures, texts = features.picture(IMAGES), features.text(["a photo of a dog", "a cat"])
    assert pictures.shape == (3, 12) and texts.shape == (2, 12)
    model = CLIPModel.from_pretrained(clip).eval()
    inputs = CLIPProcessor.from_pretrained(clip)(
        text=["a photo of a dog", "a cat"],
        images=[image.convert("RGB") for image in IMAGES],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        output = model(**inputs)
    unit = torch.nn.functional.normalize
    assert torch.allclose(unit(pictures), output.image_embeds, atol=1e-5)
    assert torch.allclose(unit(texts), output.text_embeds, atol=1e-5)


def test_dino_sees_the_subject_where_both_are_given(dino, clip):
    features = open_features("any", dino_path=dino, clip_path=clip)
    assert features.subject(IMAGES).shape == (3, 16) and features.picture(IMAGES).shape == (3, 12)


def test_weights_that_are_none_are_a_sentence(tmp_path):
    with pytest.raises(SVFitError, match="cannot be opened as a CLIPModel") as error:
        open_features("any", clip_path=str(tmp_path))
    assert "\n" not in str(error.value)
