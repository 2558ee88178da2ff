"""A batch in which every picture has its own adapters: the same pictures as one by one, or a plain error."""

from functools import partial

import pytest
import torch
from conftest import offload_sequentially, tiny_pipeline, tiny_sdxl_pipeline
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.hooks import apply_group_offloading
from torch import nn

from svfit_dreambooth import adapter_mixes, load_adapter, merge_adapters, set_adapters, unload_adapter
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.adapter.words import LearnedWord, word_key
from svfit_dreambooth.bases.families import family_of
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.method.targets import get_shifts, matrix_layers, svfit_layers
from svfit_dreambooth.method.word import base_rows, word_embedding, word_pieces
from svfit_dreambooth.painting.registry import loaded_adapters

PROMPTS = ["a photo of sks dog", "a mug on the beach", "sks cat in snow"]
NEGATIVE = ["", "snow", "a sks dog"]
MIXES = [{"dog": 0.8}, {"mug": 1.0, "cat": -0.5}, {}]
CPU = torch.device("cpu")


def adapter(pipeline, seed, rank=None, layers=None, word=None, scale=0.5):
    """Random shifts of `layers` (None: all linear layers and convolutions), every third value zero."""
    generator = torch.Generator().manual_seed(seed)
    family = family_of(pipeline)
    weights = {
        f"{component}.{path}": layer.weight
        for component, model in family.components.items()
        for path, (_, _, layer) in matrix_layers(model).items()
        if layers is None or path.endswith(layers)
    }
    shifts = {}
    for name, weight in weights.items():
        values = scale * torch.randn(min(rank or 99, *weight.flatten(1).shape), generator=generator)
        values[::3] = 0
        shifts[name] = values
    words = []
    if word is not None:
        tokens, deltas = {}, {}
        for component, tokenizer in family.tokenizers.items():
            pieces = word_pieces(tokenizer, word)
            tokens[component] = tokenizer.convert_ids_to_tokens(list(pieces))
            rows = base_rows(family.components[component], pieces)
            weights[word_key(component, 0)] = rows
            deltas[component] = torch.randn(rows.shape, generator=generator)
        words = [LearnedWord(word, tokens, deltas)]
    return Adapter(shifts=shifts, base_model="tiny", base_fingerprint=fingerprint(weights), learned_words=words)


def load_three(pipeline, **options):
    """Of different ranks and layers; two of them learned the same word."""
    plain = pipeline if "plain" not in options else options.pop("plain")
    load_adapter(pipeline, adapter(plain, 1, rank=5, word="sks"), 0.0, "dog")
    load_adapter(pipeline, adapter(plain, 2, layers=("to_q", "q_proj", "conv1", "time_emb_proj")), 0.0, "mug")
    load_adapter(pipeline, adapter(plain, 3, layers=("to_v", "ff.net.2", "linear_1"), word="sks"), 0.0, "cat")


def paint(pipeline, prompts, seeds, **options):
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"} | options
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.tensor(pipeline(prompts, generator=generators, **options).images)


def one_by_one(pipeline, mixes=MIXES, copies=1, **options):
    pictures = []
    for i, mix in enumerate(mixes):
        set_adapters(pipeline, mix)
        negative = {"negative_prompt": NEGATIVE[i]} if options.get("guidance_scale") != 1.0 else {}
        for k in range(copies):
            pictures.append(paint(pipeline, PROMPTS[i], [copies * i + k], **options, **negative))
    set_adapters(pipeline, {})
    return torch.cat(pictures)


def together(pipeline, mixes=MIXES, copies=1, **options):
    if options.get("guidance_scale") != 1.0:
        options["negative_prompt"] = NEGATIVE[: len(mixes)]
    with adapter_mixes(pipeline, mixes):
        seeds = range(copies * len(mixes))
        return paint(pipeline, PROMPTS[: len(mixes)], seeds, num_images_per_prompt=copies, **options)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_pictures_equal_those_painted_one_by_one(make, copies, guidance_scale):
    pipeline = make()
    load_three(pipeline)
    expected = one_by_one(pipeline, copies=copies, guidance_scale=guidance_scale)
    painted = together(pipeline, copies=copies, guidance_scale=guidance_scale)
    assert torch.allclose(painted, expected, atol=1e-4)
    base = torch.cat([paint(pipeline, PROMPTS[i], [copies * i], guidance_scale=guidance_scale) for i in range(2)])
    assert ((expected[::copies][:2] - base).flatten(1).abs().amax(1) > 0.01).all()  # the adapters do something


def test_afterwards_strengths_and_pictures_are_what_they_were():
    pipeline = tiny_pipeline()
    load_three(pipeline)
    set_adapters(pipeline, {"mug": 0.3, "dog": 1.0})
    before, shifts = paint(pipeline, PROMPTS, range(3)), get_shifts(pipeline.unet)
    together(pipeline)
    assert loaded_adapters(pipeline) == {"dog": 1.0, "mug": 0.3, "cat": 0.0}
    assert all(torch.equal(shift, get_shifts(pipeline.unet)[name]) for name, shift in shifts.items())
    assert torch.equal(paint(pipeline, PROMPTS, range(3)), before)
    assert "encode_prompt" not in vars(pipeline)
    with pytest.raises(KeyboardInterrupt), adapter_mixes(pipeline, MIXES):
        paint(pipeline, PROMPTS, range(3))
        raise KeyboardInterrupt
    assert torch.equal(paint(pipeline, PROMPTS, range(3)), before)
    unload_adapter(pipeline)
    plain = tiny_pipeline()
    assert torch.equal(paint(pipeline, PROMPTS, range(3)), paint(plain, PROMPTS, range(3)))


def test_merged_weights_are_kept_within_their_bound():
    pipeline = tiny_pipeline()
    load_three(pipeline)
    expected, kept = one_by_one(pipeline), []
    for most in (0, 20_000, 10**9):
        with adapter_mixes(pipeline, MIXES, merged_bytes=most):
            painted = paint(pipeline, PROMPTS, range(3), negative_prompt=NEGATIVE)
            mixed = [layer.mixed for layer in svfit_layers(pipeline.unet).values() if layer.mixed is not None]
            sizes = [each.kept.numel() * 4 for each in mixed if each.kept is not None]
        assert torch.allclose(painted, expected, atol=1e-4) and sum(sizes) <= most
        kept.append(len(sizes))
    assert kept[0] == 0 < kept[1] < kept[2] == len(mixed)
    assert all(layer.mixed is None for layer in svfit_layers(pipeline.unet).values())


def test_embeddings_that_were_read_before():
    pipeline = tiny_pipeline()
    load_three(pipeline)
    expected = one_by_one(pipeline)
    with adapter_mixes(pipeline, MIXES):
        embeds, negative = pipeline.encode_prompt(PROMPTS, CPU, 1, True, NEGATIVE)
        painted = paint(pipeline, None, range(3), prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert torch.allclose(painted, expected, atol=1e-4)


def test_another_kind_of_pipeline():
    pipeline = tiny_pipeline()
    load_three(pipeline)
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def repaint(prompts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"strength": 0.8, "num_inference_steps": 4, "output_type": "np"}
        return torch.tensor(other(prompts, image=image.repeat(len(seeds), 1, 1, 1), generator=generators, **options)[0])

    expected = []
    for i, mix in enumerate(MIXES):
        set_adapters(other, mix)
        expected.append(repaint([PROMPTS[i]], [i]))
    with adapter_mixes(other, MIXES):
        painted = repaint(PROMPTS, range(3))
        with pytest.raises(SVFitError, match="read by the encode_prompt of its own pipeline"):
            paint(pipeline, PROMPTS, range(3))
    assert torch.allclose(painted, torch.cat(expected), atol=1e-4)


def test_sequential_cpu_offload_stays_on(monkeypatch):
    pipeline = tiny_pipeline()
    monkeypatch.setattr(pipeline, "enable_sequential_cpu_offload", partial(offload_sequentially, pipeline.unet))
    pipeline.enable_sequential_cpu_offload(device=CPU)
    load_three(pipeline, plain=tiny_pipeline())
    assert torch.allclose(together(pipeline), one_by_one(pipeline), atol=1e-4)
    assert next(pipeline.unet.parameters()).is_meta


def test_model_cpu_offload_stays_on():
    pipeline = tiny_pipeline()
    pipeline.enable_model_cpu_offload(device="cpu")
    load_three(pipeline, plain=tiny_pipeline())
    assert torch.allclose(together(pipeline), one_by_one(pipeline), atol=1e-4)
    assert hasattr(pipeline.unet, "_hf_hook")


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offload_stays_on(level):
    pipeline = tiny_pipeline()
    for model in (pipeline.unet, pipeline.text_encoder):
        apply_group_offloading(model, CPU, CPU, offload_type=level, num_blocks_per_group=1)
    load_three(pipeline, plain=tiny_pipeline())
    assert torch.allclose(together(pipeline), one_by_one(pipeline), atol=1e-4)


def test_beside_a_peft_lora():
    peft = pytest.importorskip("peft")
    pipeline = tiny_pipeline()
    load_three(pipeline)
    without = together(pipeline)
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    expected = one_by_one(pipeline)
    assert torch.allclose(together(pipeline), expected, atol=1e-4)
    assert not torch.allclose(without, expected, atol=1e-2)


def test_half_precision():
    pipeline = tiny_pipeline()
    load_three(pipeline)
    pipeline.to(torch.bfloat16)
    expected = one_by_one(pipeline)
    assert (together(pipeline) - expected).abs().max() < 0.1
    assert word_embedding(pipeline.text_encoder).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("prompts", [PROMPTS[:2], PROMPTS[0], [*PROMPTS, "a dog"]])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_wrong_number_of_prompts_is_an_error(prompts, guidance_scale):
    pipeline = tiny_pipeline()
    load_three(pipeline)
    number = 1 if isinstance(prompts, str) else len(prompts)
    with adapter_mixes(pipeline, MIXES), pytest.raises(SVFitError, match=f"3 mixes of adapters meet {number} prompts"):
        pipeline(prompts, num_inference_steps=1, guidance_scale=guidance_scale)


def test_networks_that_are_called_otherwise_are_an_error():
    pipeline = tiny_pipeline()
    load_three(pipeline)
    latents, states = torch.zeros(3, 4, 8, 8), torch.zeros(3, 77, 24)
    with adapter_mixes(pipeline, MIXES):
        with pytest.raises(SVFitError, match="painted by calling its own pipeline"):
            pipeline.unet(latents, 1, states)
        paint(pipeline, PROMPTS, range(3))
        with pytest.raises(SVFitError, match="shifts of 6 samples meet a batch of 3"):
            pipeline.unet(latents, 1, states)


def test_refusals():
    pipeline = tiny_pipeline()
    load_three(pipeline)
    with pytest.raises(SVFitError, match="no adapter named 'cow' is loaded"), adapter_mixes(pipeline, [{"cow": 1.0}]):
        pass
    with pytest.raises(SVFitError, match="strength of dog is nan"), adapter_mixes(pipeline, [{"dog": float("nan")}]):
        pass
    both = {"dog": 1.0, "cat": 0.2}
    with (
        pytest.raises(SVFitError, match="'dog' and 'cat' both learned the word 'sks'"),
        adapter_mixes(pipeline, [both]),
    ):
        pass
    with pytest.raises(SVFitError, match="'dog' and 'cat' both learned the word 'sks'"):
        set_adapters(pipeline, both)
    with (
        adapter_mixes(pipeline, MIXES),
        merge_adapters(pipeline),
        pytest.raises(SVFitError, match="leave merge_adapters"),
    ):
        paint(pipeline, PROMPTS, range(3))
    with (
        adapter_mixes(pipeline, MIXES),
        pytest.raises(SVFitError, match="leave that first"),
        adapter_mixes(pipeline, MIXES),
    ):
        pass
    with adapter_mixes(pipeline, MIXES):
        unload_adapter(pipeline, "dog")
        with pytest.raises(SVFitError, match="no adapter named 'dog'"):
            paint(pipeline, PROMPTS, range(3))


def test_a_convolution_in_groups_is_refused():
    pipeline = tiny_pipeline()
    pipeline.unet.conv_in = nn.Sequential(pipeline.unet.conv_in, nn.Conv2d(16, 16, 3, padding=1, groups=2))
    load_adapter(pipeline, adapter(pipeline, 1, layers=("conv_in.1", "to_q")), 0.0, "dog")
    load_adapter(pipeline, adapter(pipeline, 2, layers=("to_v",)), 0.0, "mug")
    with (
        pytest.raises(SVFitError, match=r"'dog' changes a convolution of 2 groups \(unet\.conv_in\.1\).*one by one"),
        adapter_mixes(pipeline, [{"dog": 1.0}]),
    ):
        pass
    expected = one_by_one(pipeline, [{"mug": 1.0}, {}])
    assert torch.allclose(together(pipeline, [{"mug": 1.0}, {}]), expected, atol=1e-4)
