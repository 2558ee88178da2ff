"""Learned words beside a LoRA: public loaders read them, and paint the adapter's pictures."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline, tiny_sdxl_pipeline
from safetensors import safe_open
from safetensors.torch import load_file
from test_export import PIXEL
from test_loading import paint
from test_word import with_word

from svfit_dreambooth import load_adapter, save_adapter, unload_adapter
from svfit_dreambooth.adapter.words import LearnedWord, word_key
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.method.word import base_rows, word_pieces
from svfit_dreambooth.sharing.embedding import called_elsewhere, embeddings_beside
from svfit_dreambooth.sharing.export import export_lora


def native_picture(pipeline, path, prompt, scale=1.0):
    load_adapter(pipeline, path, scale)
    picture = paint(pipeline, prompt=prompt)
    unload_adapter(pipeline)
    return picture


@pytest.mark.parametrize("word", ["sks", "zwx"])  # of one token, and of three
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_lora_and_embedding_paint_the_adapters_pictures(tmp_path, layout, word):
    base = BaseModel("tiny", tiny_pipeline())
    adapter = with_word(base.pipeline, word)
    adapter.instance_prompt = f"a photo of {word.upper()} dog, {word}s"
    path = save_adapter(adapter, tmp_path / "My-dog.safetensors", torch.float32)
    before = paint(base.pipeline, prompt=f"a photo of {word} dog")
    native = native_picture(base.pipeline, path, f"a photo of {word} dog", 0.7)
    exported = export_lora(path, base, tmp_path / "lora", layout, scale=0.7, dtype=torch.float32)
    assert torch.equal(paint(base.pipeline, prompt=f"a photo of {word} dog"), before)
    (embedding,) = exported.embeddings
    assert embedding.path == tmp_path / "lora" / f"my-dog-{word}.safetensors" and embedding.called == f"my-dog-{word}"
    assert any(f"in other programs write my-dog-{word} " in line for line in exported.lines())
    with safe_open(exported.path, "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == f"a photo of my-dog-{word} dog, {word}s"

    base.pipeline.load_lora_weights(str(exported.path))
    without = paint(base.pipeline, prompt=f"a photo of {word} dog")
    base.pipeline.load_textual_inversion(str(embedding.path))
    theirs = paint(base.pipeline, prompt=f"a photo of my-dog-{word} dog")
    assert (theirs - native).abs().max() <= PIXEL / 100 < PIXEL < (without - native).abs().max()


def test_sdxl_gets_both_text_encoders(tmp_path):
    base = BaseModel("tiny-xl", tiny_sdxl_pipeline())
    pipeline = base.pipeline
    adapter = with_word(pipeline)
    pieces = word_pieces(pipeline.tokenizer_2, "sks")
    (word,) = adapter.learned_words
    word.tokens["text_encoder_2"] = pipeline.tokenizer_2.convert_ids_to_tokens(list(pieces))
    word.deltas["text_encoder_2"] = 0.2 * torch.randn(len(pieces), 32, generator=torch.Generator().manual_seed(3))
    rows = {word_key("text_encoder_2", 0): base_rows(pipeline.text_encoder_2, pieces)}
    adapter.base_fingerprint |= fingerprint(rows)
    path = save_adapter(adapter, tmp_path / "dog.safetensors", torch.float32)
    native = native_picture(pipeline, path, "a photo of sks dog")
    exported = export_lora(path, base, tmp_path / "lora" / "dog.safetensors", dtype=torch.float32)
    tensors = load_file(exported.embeddings[0].path)
    assert {key: tuple(rows.shape) for key, rows in tensors.items()} == {"clip_l": (1, 24), "clip_g": (1, 32)}

    pipeline.tokenizer_2 = tiny_sdxl_pipeline().tokenizer_2  # the tiny pipeline's two are one object
    pipeline.load_lora_weights(str(exported.path))
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        pipeline.load_textual_inversion(
            tensors[key],
            token="dog-sks",
            text_encoder=getattr(pipeline, f"text_encoder{number}"),
            tokenizer=getattr(pipeline, f"tokenizer{number}"),
        )
    assert (paint(pipeline, prompt="a photo of dog-sks dog") - native).abs().max() <= PIXEL / 100


def test_a_text_encoder_that_learned_nothing_keeps_its_rows(tmp_path):
    base = BaseModel("tiny-xl", tiny_sdxl_pipeline())
    path = save_adapter(with_word(base.pipeline), tmp_path / "dog.safetensors", torch.float32)
    (embedding,) = export_lora(path, base, tmp_path / "lora.safetensors").embeddings
    pieces = word_pieces(base.pipeline.tokenizer_2, "sks")
    assert torch.equal(load_file(embedding.path)["clip_g"], base_rows(base.pipeline.text_encoder_2, pieces))


def test_files_that_are_there_stay_and_words_may_be_left_out(tmp_path):
    base = BaseModel("tiny", tiny_pipeline())
    path = save_adapter(with_word(base.pipeline), tmp_path / "dog.safetensors")
    lora = tmp_path / "lora.safetensors"
    (tmp_path / "lora-sks.safetensors").write_text("mine")
    with pytest.raises(SVFitError, match=r"lora-sks.safetensors' exists already"):
        export_lora(path, base, lora)
    with pytest.raises(SVFitError, match=r"lora-sks.safetensors' is no safetensors file"):
        export_lora(path, base, lora, overwrite=True)
    assert not lora.exists()
    exported = export_lora(path, base, lora, without_words=True)
    assert exported.measured_error < 1e-3 and all(name.startswith("unet.") for name in exported.plan.ranks)
    assert exported.embeddings == [] and (tmp_path / "lora-sks.safetensors").read_text() == "mine"


def test_words_are_called_by_names_of_files():
    adapter = with_word(tiny_pipeline())
    tokens = {"text_encoder": ["x"]}
    adapter.learned_words = [LearnedWord(word, tokens, {}) for word in ("<Sks>", "ohwx")]
    adapter.instance_prompt = "<sks> by ohwx, cohwx"
    embeddings = embeddings_beside(Path("lora/dog.safetensors"), "dog 2", adapter)
    assert [embedding.called for embedding in embeddings] == ["dog-2-sks", "dog-2-ohwx"]
    assert called_elsewhere(adapter, embeddings).instance_prompt == "dog-2-sks by dog-2-ohwx, cohwx"
    adapter.learned_words[1].word = "sks"
    with pytest.raises(SVFitError, match="would share a file, dog-sks, dog-sks"):
        embeddings_beside(Path("dog.safetensors"), "dog", adapter)
