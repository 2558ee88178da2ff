"""A learned word: embeddings that change where a prompt holds it, and nowhere else; in the file and on pipelines."""

import json

import pytest
import torch
from conftest import tiny_pipeline, tiny_text_encoder
from safetensors import safe_open
from test_adapter_checks import refuses, write_with
from test_loading import make_adapter, paint
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from svfit_dreambooth import TrainConfig, load_adapter, read_adapter, save_adapter, set_adapters, train, unload_adapter
from svfit_dreambooth.adapter.describe import describe_adapter
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.adapter.words import LearnedWord, word_key
from svfit_dreambooth.bases.families import family_of
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.method.word import (
    WordEmbedding,
    base_rows,
    find_word,
    learn_word,
    remove_word_embedding,
    word_ends,
    word_pieces,
)
from svfit_dreambooth.training.words import check_word
from toybox.tokenizer import build_tokenizer

WORDS = ["a", "photo", "of", "dog", "sks"]
TOKENIZER = build_tokenizer(WORDS, max_length=77)


def ids(*prompts):
    return TOKENIZER(list(prompts), padding="max_length", max_length=20, return_tensors="pt").input_ids


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return tiny_text_encoder(len(TOKENIZER)).eval().requires_grad_(False)


def test_words_are_found_whole_and_nowhere_else():
    ends = word_ends(TOKENIZER, len(TOKENIZER))
    assert len(word_pieces(TOKENIZER, "sks")) == 1 and len(word_pieces(TOKENIZER, "zwx")) == 3
    prompts = ids("a photo of zwx dog", "azwx zwxa zw", "zwx, zwx ZWX", "a photo of sks")
    found = find_word(prompts, word_pieces(TOKENIZER, "zwx"), ends)
    assert found.nonzero().tolist() == [[0, 4], [2, 1], [2, 5], [2, 8]]
    assert not find_word(prompts[:, :2], word_pieces(TOKENIZER, "zwx"), ends).any()  # longer than the prompt


@pytest.mark.parametrize("word", ["sks", "zwx"])
def test_only_prompts_with_the_word_change_and_removal_is_exact(encoder, word):
    prompts = ids(f"a photo of {word} dog", "a photo of dog", f"a{word} z w x", f"{word} {word}")
    table = encoder.get_input_embeddings()
    weight, expected = table.weight, encoder(prompts)[0]
    delta = learn_word(encoder, TOKENIZER, word)
    pieces = word_pieces(TOKENIZER, word)
    assert delta.shape == (len(pieces), 24) and [p for p in encoder.parameters() if p.requires_grad] == [delta]
    assert torch.equal(encoder(prompts)[0], expected)
    delta.data = torch.randn_like(delta)
    embedded = encoder.get_input_embeddings()(prompts)
    plain = torch.nn.functional.embedding(prompts, weight)
    for k in range(len(pieces)):  # the fourth prompt holds it twice
        assert torch.allclose(embedded[0, 4 + k], plain[0, 4 + k] + delta[k])
        assert torch.allclose(embedded[3, 1 + len(pieces) + k], plain[3, 1 + len(pieces) + k] + delta[k])
    changed = (encoder(prompts)[0] != expected).flatten(1).any(1)
    assert changed.tolist() == [True, False, False, True]
    remove_word_embedding(encoder)
    assert type(encoder.get_input_embeddings()) is nn.Embedding and encoder.get_input_embeddings().weight is weight
    assert torch.equal(encoder(prompts)[0], expected)


def test_the_other_kind_of_text_encoder():
    config = CLIPTextConfig(vocab_size=len(TOKENIZER), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=1, projection_dim=8, eos_token_id=1)  # fmt: skip
    encoder = CLIPTextModelWithProjection(config).eval()
    expected = encoder(ids("sks"))[0]
    learn_word(encoder, TOKENIZER, "sks").data[:, 0] += 1  # a shift of all would be lost in the norm
    assert not torch.allclose(encoder(ids("sks"))[0], expected)
    remove_word_embedding(encoder)
    assert torch.equal(encoder(ids("sks"))[0], expected)


def test_gradients_reach_the_word_alone_and_it_keeps_its_precision(encoder):
    delta = learn_word(encoder, TOKENIZER, "zwx")
    encoder(ids("a zwx"))[0].square().sum().backward()
    assert delta.grad.any() and all(p.grad is None for p in encoder.parameters() if p is not delta)
    delta.data.fill_(1 + 2**-20)
    encoder.half()
    embedding = encoder.get_input_embeddings()
    assert embedding.weight.dtype == torch.float16 and embedding(ids("a zwx")).dtype == torch.float16
    assert delta.dtype == delta.grad.dtype == torch.float32 and (delta == 1 + 2**-20).all()


def test_a_base_checkpoint_loads_beneath_a_word(encoder):
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    learn_word(encoder, TOKENIZER, "sks").data += 1
    encoder.load_state_dict(state, strict=True)
    assert (next(iter(encoder.get_input_embeddings().deltas().values())) == 1).all()


@pytest.mark.parametrize("word", ["", "  ", "sks dog", "sks,", "a.b"])
def test_what_is_no_word_is_refused(word):
    with pytest.raises(SVFitError, match="learned_word .* is not one word"):
        word_pieces(TOKENIZER, word)


def test_the_word_must_be_in_every_caption():
    family = family_of(tiny_pipeline())
    family.pipeline.tokenizer = TOKENIZER
    check_word(family, "zwx", ["a photo of zwx dog", "zwx"])
    with pytest.raises(SVFitError, match="'zwx' does not occur in the prompt 'a photo of zwxy dog'"):
        check_word(family, "zwx", ["a photo of zwx dog", "a photo of zwxy dog"])


# ---------------------------------------------------------------- the file


def with_word(pipeline, word="sks", seed=0, components=("unet",), **options):
    """An adapter of `make_adapter` that has learned `word`."""
    adapter = make_adapter(pipeline, seed, components=components, **options)
    pieces = word_pieces(pipeline.tokenizer, word)
    generator = torch.Generator().manual_seed(seed)
    delta = 0.2 * torch.randn(len(pieces), 24, generator=generator)
    tokens = {"text_encoder": pipeline.tokenizer.convert_ids_to_tokens(list(pieces))}
    adapter.learned_words = [LearnedWord(word, tokens, {"text_encoder": delta})]
    rows = {word_key("text_encoder", 0): base_rows(pipeline.text_encoder, pieces)}
    assert "text_encoder" not in adapter.base_fingerprint
    adapter.base_fingerprint |= fingerprint(rows)
    return adapter


@torch.no_grad()
def test_a_textual_inversion_loaded_later_leaves_the_word():
    def read(pipeline):
        ids = pipeline.tokenizer("a photo of sks <style>", return_tensors="pt").input_ids
        return pipeline.text_encoder(ids)[0]

    before, after = tiny_pipeline(), tiny_pipeline()
    style = {"<style>": torch.randn(1, 24, generator=torch.Generator().manual_seed(1))}
    before.load_textual_inversion(dict(style))
    plain, adapter = read(before), with_word(tiny_pipeline(), "sks")
    load_adapter(before, adapter)
    load_adapter(after, adapter)
    after.load_textual_inversion(dict(style))
    assert torch.equal(read(after), read(before)) and not torch.allclose(read(after), plain)
    unload_adapter(after)
    assert torch.equal(read(after), plain)


def test_a_word_of_what_reads_no_text_is_refused(tmp_path):
    adapter = with_word(tiny_pipeline(), "mine")
    (word,) = adapter.learned_words
    word.tokens, word.deltas = ({"unet": held["text_encoder"]} for held in (word.tokens, word.deltas))
    path = save_adapter(adapter, tmp_path / "a.safetensors")
    with pytest.raises(SVFitError, match="'unet' learned a word, which only text_encoder and text_encoder_2 read"):
        read_adapter(path)


def test_round_trip(tmp_path):
    adapter = with_word(tiny_pipeline(), "mine")
    path = save_adapter(adapter, tmp_path / "a.safetensors", torch.float32)
    with safe_open(path, "pt") as file:
        assert "text_encoder.learned_words.0" in file.keys()  # noqa: SIM118
        header = json.loads(file.metadata()["learned_words"])
    assert header == [{"word": "mine", "tokens": {"text_encoder": ["m", "i", "n", "e</w>"]}}]
    back = read_adapter(path)
    (word,) = back.learned_words
    assert word.word == "mine" and torch.equal(
        word.deltas["text_encoder"], adapter.learned_words[0].deltas["text_encoder"]
    )
    assert back.components == ["text_encoder", "unet"] and back.ranks == adapter.ranks
    assert describe_adapter(back)["learned_words"] == ["mine"]
    again = read_adapter(save_adapter(back, tmp_path / "b.safetensors", torch.float32))
    assert again.metadata["payload_sha256"] == back.metadata["payload_sha256"]
    back.learned_words = []
    assert "learned_words" not in read_adapter(save_adapter(back, tmp_path / "c.safetensors")).metadata


@pytest.mark.parametrize(
    ("entry", "delta", "match"),
    [
        ("nonsense", torch.ones(1, 4), "isn't a list of words"),
        ([{"word": "sks"}], torch.ones(1, 4), "isn't a list of words"),
        ([{"word": "sks", "tokens": {}}], torch.ones(1, 4), "isn't a list of words"),
        ([{"word": "sks", "tokens": {"text_encoder": [3]}}], torch.ones(1, 4), "isn't a list of words"),
        ([{"word": "sks", "tokens": {"text_encoder": ["s", "ks"]}}], torch.ones(1, 4), r"\[1, 4\], not 2 embeddings"),
        ([{"word": "sks", "tokens": {"text_encoder": ["sks"]}}], torch.ones(4), r"shape \[4\]"),
        ([{"word": "sks", "tokens": {"text_encoder": ["sks"]}}], torch.ones(1, 4).int(), "is I32"),
        ([{"word": "sks", "tokens": {"text_encoder": ["sks"]}}], torch.tensor([[float("nan")]]), "NaN or infinity"),
        ([{"word": "sks", "tokens": {"text_encoder_2": ["sks"]}}], torch.ones(1, 4), "lacks 'text_encoder_2.learned"),
        ([], torch.ones(1, 4), "1 tensors that its targets don't list, first 'text_encoder.learned_words.0'"),
    ],
)
def test_bad_words_in_a_file_are_refused(tmp_path, entry, delta, match):
    tensors = {"unet.a.shift": torch.ones(3), "text_encoder.learned_words.0": delta}
    text = entry if isinstance(entry, str) else json.dumps(entry)
    refuses(write_with(tmp_path / "a", tensors, targets='{"unet.a":3}', learned_words=text), match)


def test_saving_refuses_words_that_are_not_finite(tmp_path):
    adapter = with_word(tiny_pipeline())
    adapter.learned_words[0].deltas["text_encoder"][0, 0] = 1e6
    with pytest.raises(SVFitError, match="embeddings of 'sks' hold NaN or infinity"):
        save_adapter(adapter, tmp_path / "a.safetensors")


# ---------------------------------------------------------------- on a pipeline


def test_load_strengths_and_unload_to_the_bit(tmp_path):
    pipeline = tiny_pipeline()
    base, shifts_only = paint(pipeline), make_adapter(pipeline, components=("unet",))
    path = save_adapter(with_word(pipeline), tmp_path / "dog.safetensors")
    load_adapter(pipeline, shifts_only, name="plain")
    without = paint(pipeline)
    unload_adapter(pipeline)
    load_adapter(pipeline, path)
    adapted = paint(pipeline)
    assert not torch.allclose(adapted, without, atol=1e-3)
    set_adapters(pipeline, {"dog": 0.0})
    assert torch.equal(paint(pipeline), base)
    set_adapters(pipeline, {"dog": 0.5})
    (delta,) = pipeline.text_encoder.get_input_embeddings().deltas().values()
    stored = read_adapter(path).learned_words[0].deltas["text_encoder"]
    assert torch.equal(delta, 0.5 * stored) and not delta.requires_grad
    set_adapters(pipeline, {"dog": 1.0})
    assert torch.equal(paint(pipeline), adapted)
    unload_adapter(pipeline)
    assert torch.equal(paint(pipeline), base)
    assert type(pipeline.text_encoder.get_input_embeddings()) is nn.Embedding


def test_several_words_at_once_and_clashes():
    pipeline = tiny_pipeline()
    dog, cat = with_word(pipeline, "sks", 1), with_word(pipeline, "zwx", 2)
    load_adapter(pipeline, dog, name="dog")
    alone = paint(pipeline)
    with pytest.raises(SVFitError, match="'dog' and 'other' both learned the word 'sks'.*unload 'dog'"):
        load_adapter(pipeline, with_word(tiny_pipeline(), "sks", 3), name="other")
    assert torch.equal(paint(pipeline), alone)
    load_adapter(pipeline, cat, 0.0, name="cat")
    assert torch.equal(paint(pipeline), alone)  # its word stands in no prompt, its shifts rest
    assert len(pipeline.text_encoder.get_input_embeddings().words) == 1
    set_adapters(pipeline, {"dog": 1.0, "cat": 0.5})
    assert len(pipeline.text_encoder.get_input_embeddings().words) == 2
    unload_adapter(pipeline, "cat")
    assert torch.equal(paint(pipeline), alone)
    load_adapter(pipeline, with_word(tiny_pipeline(), "sks", 3), 0.0, name="other")  # at rest it means nothing
    assert torch.equal(paint(pipeline), alone)
    with pytest.raises(SVFitError, match="'dog' and 'other' both learned the word 'sks'.*set it to 0"):
        set_adapters(pipeline, {"dog": 1.0, "other": 0.5})


def test_another_spelling_and_another_base_are_refused():
    adapter = with_word(tiny_pipeline())
    pipeline = tiny_pipeline()
    pipeline.tokenizer = build_tokenizer(["a", "photo", "dog", "sk"], max_length=77)
    with pytest.raises(SVFitError, match="learned the word 'sks' on tiny, and the text_encoder of this pipeline reads"):
        load_adapter(pipeline, adapter)
    other = tiny_pipeline()
    other.text_encoder.get_input_embeddings().weight.data += 0.1
    with pytest.raises(SVFitError, match="this pipeline holds other weights"):
        load_adapter(other, adapter)
    assert not isinstance(other.text_encoder.get_input_embeddings(), WordEmbedding)


# ---------------------------------------------------------------- a run


def test_a_run_learns_its_word_and_goes_on_from_it(tiny_base, photo_folder, tmp_path):
    options = {
        "pretrained_model_name_or_path": str(tiny_base),
        "instance_data_dir": str(photo_folder),
        "instance_prompt": "a photo of sks dog",
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 3,
        "train_batch_size": 2,
        "resolution": 16,
        "fixed_loss_examples": 2,
        "final_pictures": False,
        "validation_steps": 0,
        "save_dtype": "float32",
        "target_modules": ["attn2.to_k"],
        "learned_word": "sks",
    }
    result = train(TrainConfig(**options))
    pipeline = result.base.pipeline
    assert type(pipeline.text_encoder.get_input_embeddings()) is nn.Embedding
    (word,) = read_adapter(result.adapter_path).learned_words
    assert word.word == "sks" and word.tokens == {"text_encoder": ["sks</w>"]} and word.deltas["text_encoder"].any()
    load_adapter(pipeline, result.adapter_path)
    unload_adapter(pipeline)
    more = {**options, "output_dir": str(tmp_path / "more"), "init_adapter": str(result.adapter_path)}
    second = train(TrainConfig(**{**more, "learned_word_lr": 1e-9, "learning_rate": 1e-9}))
    assert second.loss_before == pytest.approx(result.loss_after, rel=1e-3)
    with pytest.raises(SVFitError, match="learned a word: add learned_word sks"):
        train(TrainConfig(**{**more, "learned_word": None}))
    with pytest.raises(SVFitError, match="'sky' does not occur in the prompt 'a photo of sks dog'"):
        train(TrainConfig(**{**options, "learned_word": "sky"}))


def test_mixed_precision_records_the_stored_base(tiny_base, photo_folder, tmp_path):
    result = train(
        TrainConfig(
            pretrained_model_name_or_path=str(tiny_base), instance_data_dir=str(photo_folder),
            instance_prompt="a photo of sks dog", output_dir=str(tmp_path), max_train_steps=2, train_batch_size=1,
            resolution=16, fixed_loss_examples=0, final_pictures=False, validation_steps=0, learned_word="sks",
            target_modules=["attn2.to_k"], mixed_precision="bf16", train_text_encoder=True,
        )
    )  # fmt: skip
    adapter = read_adapter(result.adapter_path)
    assert isinstance(adapter, Adapter) and adapter.learned_words[0].deltas["text_encoder"].any()
    load_adapter(tiny_pipeline(), adapter)  # the same weights in float32: identical, or it would warn
