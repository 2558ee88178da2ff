"""Transformer bases: the whole journey of each family, and what it shares with its pipeline."""

import gc
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from flow_bases import BASES, side_of
from safetensors.torch import load_file

from svfit_dreambooth import load_adapter, save_adapter, train, unload_adapter
from svfit_dreambooth.adapter.file import read_adapter
from svfit_dreambooth.bases.families import family_of
from svfit_dreambooth.bases.flow import FlowTransformer, TransformerFamily
from svfit_dreambooth.bases.krea2 import Krea2
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.bases.stored import StoredBase
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method import one_sided
from svfit_dreambooth.method.arithmetic import exact_delta
from svfit_dreambooth.method.one_sided import SVFitOneSided
from svfit_dreambooth.method.targets import matrix_layers, svfit_layers
from svfit_dreambooth.painting.generate import generate, open_for_adapters
from svfit_dreambooth.sharing.export import export_lora
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.counting import kept_for_backward
from svfit_dreambooth.training.estimate import _activations, estimate_memory
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.plan import prepare
from svfit_dreambooth.training.slim import slim

EVERY = [name if name == "klein" else pytest.param(name, marks=pytest.mark.slow) for name in BASES]


@pytest.fixture(scope="module", params=EVERY)
def folder(request, tmp_path_factory):
    """Folder of a tiny base of each family."""
    path = tmp_path_factory.mktemp("flow") / f"tiny-{request.param}"
    BASES[request.param]().save_pretrained(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Krea2, "resolution", 16)  # which no config names: pictures of its own size would take minutes
        yield path


@pytest.fixture
def config(folder, photo_folder, tmp_path):
    return TrainConfig(
        pretrained_model_name_or_path=str(folder),
        instance_data_dir=str(photo_folder),
        instance_prompt="a photo of sks dog",
        output_dir=str(tmp_path / "run"),
        resolution=side_of(folder),
        max_train_steps=4,
        checkpointing_steps=2,
        learning_rate=0.05,
        train_batch_size=2,
        fixed_loss_examples=2,
        num_inference_steps=2,
        validation_steps=0,
        final_pictures=False,
    )


def pixels(picture):
    return np.asarray(picture.image, dtype=int)


def paint(model):
    side = model.family.resolution if model.family.required_multiple > 16 else 16
    return generate(model, ["a photo of sks dog"], num_inference_steps=2, seed=3, height=side, width=side)[0]


def test_from_photos_to_pictures(config, folder, tmp_path):
    result = train(config)
    adapter = read_adapter(result.adapter_path)
    family = open_base_model(str(folder)).family
    assert {name.partition(".")[0] for name in adapter.shifts} == {"transformer"}
    assert len(adapter.shifts) == len(family.find_projections("transformer"))
    assert adapter.architecture == family.architecture
    assert any(shift.abs().max() > 0 for shift in adapter.shifts.values())

    model = open_for_adapters([(result.adapter_path, 1.0)], str(folder))
    painted = paint(model)
    base = open_base_model(str(folder))
    plain = paint(base)
    assert (pixels(painted) != pixels(plain)).any()
    load_adapter(base.pipeline, result.adapter_path)
    assert (pixels(paint(base)) == pixels(painted)).all()
    unload_adapter(base.pipeline)
    assert (pixels(paint(base)) == pixels(plain)).all()


def test_unasked_a_run_trains_the_values_that_help_most(config, folder, monkeypatch):
    """A budget of the family's number a layer, whose choice a second run repeats; asked for, all of them."""
    monkeypatch.setattr(TransformerFamily, "values_per_layer", 3)
    monkeypatch.setattr(one_sided, "BOTH_SIDES_MOST", 0)
    result = train(replace(config, max_train_steps=2))
    adapter = read_adapter(result.adapter_path)
    layers = len(open_base_model(str(folder)).family.find_projections("transformer"))
    assert result.values == 3 * layers and result.plan.config.budget == 3 * layers
    assert 0 < sum(int((shift != 0).sum()) for shift in adapter.shifts.values()) <= 3 * layers
    assert result.plan.report() == prepare(replace(config, dry_run=True)).report()
    base = open_base_model(str(folder))
    before = pixels(paint(base))
    load_adapter(base.pipeline, adapter, name="dog")
    assert any(isinstance(layer, SVFitOneSided) for layer in base.pipeline.transformer.modules())
    assert (pixels(paint(base)) != before).any()
    unload_adapter(base.pipeline)
    assert (pixels(paint(base)) == before).all()
    assert prepare(replace(config, dry_run=True, rank="full")).config.budget is None


def test_a_resumed_run_is_the_uninterrupted_one(config, tmp_path):
    whole = train(config)
    halved = replace(config, output_dir=str(tmp_path / "halved"))
    train(halved, on_step=lambda step: step.step == 2)
    resumed = train(replace(halved, resume_from_checkpoint="latest"))
    expected, found = (read_adapter(result.adapter_path).shifts for result in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture
def opening(monkeypatch):
    """Which networks are opened and let go, in order; no two of text encoder, autoencoder and denoiser at once."""
    events, alive = [], {}
    opened, let_go = StoredBase.open, BaseModel.let_go

    def opens(stored, part, dtype=torch.float32):
        gc.collect()
        events.append(f"open {part}")
        living = {name for name, network in alive.items() if network() is not None and not is_outline(network())}
        if part == stored.family.denoiser_name:
            assert not living & set(stored.family.text_encoder_names)
        network = opened(stored, part, dtype)
        alive[part] = weakref.ref(network)
        return network

    def lets_go(base, *parts):
        held = [part for part in parts if base.is_open(part)]
        let_go(base, *parts)
        events.extend(f"let go {part}" for part in held)
        assert not any(map(base.is_open, parts))

    monkeypatch.setattr(StoredBase, "open", opens)
    monkeypatch.setattr(BaseModel, "let_go", lets_go)
    return events


def is_outline(network):
    return next(network.parameters()).is_meta


def test_text_encoders_answer_once_and_are_gone_before_the_denoiser_comes(config, folder, opening, tmp_path):
    whole = train(config)
    encoders = list(open_base_model(str(folder)).family.text_encoders)
    asked = [f"open {name}" for name in encoders] + [f"let go {name}" for name in encoders]
    assert opening == [*asked, "open vae", "let go vae", "open transformer"]
    assert whole.base.family.text_encoders == {} and not whole.base.is_open("vae")
    opening.clear()
    longer = train(replace(config, max_train_steps=6, resume_from_checkpoint="latest"))
    assert longer.steps == 6 and opening == ["open transformer"]  # prompts and photos were read before

    kept = sorted(whole.plan.folder.encoded.iterdir())
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    opening.clear()
    train(replace(config, max_train_steps=7, resume_from_checkpoint="latest"))
    assert len(opening) in (3, 1 + 2 * len(encoders))  # only who gave the damaged answer is asked again
    with pytest.raises(SVFitError, match="the text encoder was let go, and the prompt 'a cat' is none of those"):
        generate(whole.base, ["a cat"], num_inference_steps=1)


def test_an_answer_is_of_its_base_alone(config, folder, opening, tmp_path):
    """Another text encoder under the same name is asked anew, and another denoiser is not."""
    train(config)
    name, encoder = next(iter(open_base_model(str(folder)).family.text_encoders.items()))
    with torch.no_grad():
        encoder.get_input_embeddings().weight[3] += 1
    shutil.copytree(folder, tmp_path / folder.name)
    encoder.save_pretrained(tmp_path / folder.name / name)
    opening.clear()
    train(replace(config, pretrained_model_name_or_path=str(tmp_path / folder.name)))
    assert "open vae" not in opening and "open text_encoder" in opening


def test_looks_and_final_pictures_are_painted(config, opening):
    options = {"validation_steps": 4, "final_pictures": True, "validation_prompts": ["a sks dog"]}
    result = train(replace(config, mixed_precision="bf16", **options))
    assert len(list(result.adapter_path.parent.rglob("step_*.png"))) == 2 and result.showing.sheet.is_file()
    encoders = [event for event in opening if "text_encoder" in event]
    assert opening[: len(encoders)] == encoders  # all that is painted was read before


def test_final_pictures_are_those_of_the_whole_base(config, folder):
    """The denoiser is opened anew after a run in bf16, and prompts are answered from what was kept."""
    result = train(replace(config, mixed_precision="bf16", final_pictures=True, validation_prompts=["a sks dog"]))
    assert result.base.pipeline.transformer.dtype == torch.bfloat16
    model = open_for_adapters([(result.adapter_path, 1.0)], str(folder), dtype=torch.bfloat16)
    model.family.answers = result.base.family.answers
    (again,) = generate(model, ["a sks dog"], num_inference_steps=2, seed=1000)
    assert (pixels(again) == np.asarray(result.showing.first, dtype=int)).all()


def test_class_pictures_are_painted_without_the_text_encoder(config, opening, tmp_path):
    prior = {"with_prior_preservation": True, "class_prompt": "a photo of a dog", "num_class_images": 2}
    train(replace(config, **prior))
    own = [event for event in opening if "text_encoder" not in event]
    # photos, class pictures painted, class pictures read, steps
    assert own[:2] == ["open vae", "let go vae"] and own[2:4] == ["open transformer", "open vae"]
    assert own[6:] == ["open vae", "let go vae", "open transformer"]


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_of_the_sampler_goes_along_what_training_predicts(folder, step):
    """Time, sign, packing and conditions: the pipeline's latents after a step are x - (s - s') predict(x, s)."""
    pipeline, side = open_base_model(str(folder)).pipeline, side_of(folder)
    family = family_of(pipeline)
    if not isinstance(family, FlowTransformer):
        return  # see test_pixart_sigma
    if "flow_shift" in pipeline.scheduler.config:  # Sana's looks back at the step before
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    seen = []

    def look(pipeline, number, timestep, tensors):
        seen.append(family.unpacked(tensors["latents"], side, side))
        return {}

    words = family.painting_arguments({"prompt": "a dog", "negative_prompt": None}, family.unguided)
    start = torch.manual_seed(0)
    pipeline(**words, height=side, width=side, num_inference_steps=3, generator=start, callback_on_step_end=look)
    sigmas = pipeline.scheduler.sigmas
    with torch.no_grad():
        conditions = family.encode_tokens(family.tokenize(["a dog"]), family.text_encoders)
        answer = family.predict(family.denoiser, seen[step], sigmas[step + 1 : step + 2], conditions, torch.zeros(1, 6))
    expected = seen[step] - (sigmas[step + 1] - sigmas[step + 2]) * answer
    torch.testing.assert_close(seen[step + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}])
def test_the_estimate_counts_what_the_real_network_keeps(config, changes):
    run = prepare(replace(config, dry_run=True, **changes))
    family = run.base.family
    assert estimate_memory(run).total > 0
    from svfit_dreambooth.bases.families import apply_svfit

    run.base.open("transformer")
    denoiser = family.denoiser.train()
    apply_svfit(denoiser, target_modules=run.targets["transformer"])
    slim(denoiser)
    latents, timesteps, conditions, time_ids = family.stand_in(2, run.config.resolution)
    told = {k: torch.randn(v.shape) if v.is_floating_point() else v for k, v in conditions.items()}
    inputs = [torch.randn(latents.shape), torch.rand(timesteps.shape), told, torch.rand(time_ids.shape)]
    with kept_for_backward(denoiser, family.checkpointed, run.config.gradient_checkpointing) as count:
        family.predict(denoiser, *inputs)
    assert _activations(run, run.config) == pytest.approx(count(), rel=0.02)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_text_encoder": True}, "train_text_encoder does not work on .*text encoder is not adapted"),
        ({"learned_word": "sks"}, "learned_word 'sks' does not work on"),
        ({"snr_gamma": 5.0}, "snr_gamma 5.0 is for bases that predict epsilon or v"),
        ({"timestep_sampling": "shifted"}, "timestep_sampling shifted is for bases trained by flow matching"),
        ({"resolution": 18}, "resolution 18 is not a multiple of (4|16|32)"),
    ],
)
def test_what_these_bases_cannot_do_is_said(config, folder, changes, message):
    flow = "pixart" not in folder.name
    if (flow and "timestep_sampling" in changes) or (not flow and "snr_gamma" in changes):
        return  # this they can
    with pytest.raises(SVFitError, match=message):
        prepare(replace(config, **changes))


def test_adapters_of_other_kinds_of_bases_are_refused(config, tiny_base, folder):
    flow = train(replace(config, max_train_steps=1)).adapter_path
    message = f"changes transformer, which this pipeline lacks: open the base that it was trained on, {folder.name}"
    with pytest.raises(SVFitError, match=message):
        load_adapter(open_base_model(str(tiny_base)).pipeline, flow)
    other = train(replace(config, pretrained_model_name_or_path=str(tiny_base), max_train_steps=1)).adapter_path
    with pytest.raises(SVFitError, match="changes unet, which this pipeline lacks"):
        load_adapter(open_base_model(str(folder)).pipeline, other)
    with pytest.raises(
        SVFitError, match=f"init_adapter .* changes unet, which this base lacks: .* on {tiny_base.name}"
    ):
        train(replace(config, init_adapter=str(other)))


def test_the_loss_is_that_of_flow_matching(config):
    """Mean square of predict(x_s, s) - (e - x) at the timestep, noise and photo of the first example."""
    from accelerate import Accelerator

    from svfit_dreambooth.training.examples import encode_examples

    run = prepare(replace(config, train_batch_size=1))
    family = run.base.family
    if not isinstance(family, FlowTransformer):
        return
    examples = encode_examples(run, Accelerator(cpu=True).device)
    run.base.open("transformer")
    model = Objective(run, examples, family.networks, torch.device("cpu"), torch.float32)
    draw = model.draw(0)
    s = draw.timestep
    assert 0 < s < 1
    conditions = {name: rows[:1] for name, rows in examples.conditions.items()}
    with torch.no_grad():
        noisy = ((1 - s) * draw.latents + s * draw.noise)[None]
        answer = family.predict(family.denoiser, noisy, torch.tensor([s]), conditions, draw.time_ids[None])
        expected = (answer[0] - (draw.noise - draw.latents)).square().mean()
        torch.testing.assert_close(model.loss(0, 0, 1).total, expected)


def test_a_lora_in_the_layout_of_diffusers_is_the_adapter(config, folder, tmp_path):
    """The pipeline's own loader finds every key, and what it merges is the adapter's change, to 1e-3."""
    adapter = train(config).adapter_path
    base = open_base_model(str(folder))
    if not hasattr(base.pipeline, "load_lora_weights"):
        return  # PixArt's
    before = {name: layer.weight.clone() for name, (_, _, layer) in matrix_layers(base.pipeline.transformer).items()}
    load_adapter(base.pipeline, adapter)
    deltas = {
        name: exact_delta(layer.U, layer.shift.detach(), layer.Vh)
        for name, layer in svfit_layers(base.pipeline.transformer).items()
    }
    unload_adapter(base.pipeline)
    found = export_lora(adapter, base, tmp_path / "lora.safetensors", "diffusers")
    base.pipeline.load_lora_weights(found.path)
    base.pipeline.fuse_lora()
    base.pipeline.unload_lora_weights()
    after = matrix_layers(base.pipeline.transformer)
    assert set(deltas) <= set(after) and sum(delta.norm() for delta in deltas.values()) > 0
    for name, (_, _, layer) in after.items():
        change = layer.weight.detach() - before[name]
        if name in deltas:
            assert (change - deltas[name]).norm() <= 1e-3 * deltas[name].norm()
        else:
            assert torch.equal(layer.weight, before[name])


# of the original code of each family: name of a layer in a block -> ours in it, row under row, "" for one not adapted
IMG, TXT = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DOUBLE = {
    "img_attn_qkv": IMG,
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_qkv": TXT,
    "txt_attn_proj": ("attn.to_add_out",),
}
QWEN = {f"attn_{name.replace('.', '_')}": (f"attn.{name}",) for name in ("to_q", "to_k", "to_v", "to_out.0")}
QWEN |= {f"attn_{name}": (f"attn.{name}",) for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
SD3 = {"x_block_attn_qkv": IMG, "x_block_attn_proj": ("attn.to_out.0",), "context_block_attn_qkv": TXT}
ZIMAGE = {
    f"attention_{name}": tuple(f"attention.{part}" for part in parts)
    for name, parts in {"qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)}.items()
}
LUMINA = {name: tuple(part.replace("attention", "attn") for part in parts) for name, parts in ZIMAGE.items()}
KREA = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "gate": "to_gate", "wo": "to_out.0"}
KREA = {f"attn_{name}": (f"attn.{part}",) for name, part in KREA.items()}
PIXART = {
    "attn_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn_proj": ("attn1.to_out.0",),
    "cross_attn_q_linear": ("attn2.to_q",),
    "cross_attn_kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn_proj": ("attn2.to_out.0",),
}
SINGLE = "single_blocks_{}", "single_transformer_blocks.{}"
ORIGINAL = {  # blocks there, blocks here, how many, layers
    "tiny-klein": [
        ("double_blocks_{}", "transformer_blocks.{}", 1, DOUBLE),
        (*SINGLE, 2, {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}),
    ],
    "tiny-flux-1": [
        ("double_blocks_{}", "transformer_blocks.{}", 1, DOUBLE),
        (*SINGLE, 2, {"linear1": (*IMG, "proj_mlp"), "linear2": ("proj_out",)}),
    ],
    "tiny-chroma": [
        ("double_blocks_{}", "transformer_blocks.{}", 1, DOUBLE),
        (*SINGLE, 2, {"linear1": (*IMG, "proj_mlp"), "linear2": ("proj_out",)}),
    ],
    "tiny-krea2": [
        ("blocks_{}", "transformer_blocks.{}", 2, KREA),
        ("txtfusion_layerwise_blocks_{}", "text_fusion.layerwise_blocks.{}", 1, KREA),
        ("txtfusion_refiner_blocks_{}", "text_fusion.refiner_blocks.{}", 1, KREA),
    ],
    "tiny-lumina2": [
        ("layers_{}", "layers.{}", 2, LUMINA),
        ("noise_refiner_{}", "noise_refiner.{}", 1, LUMINA),
        ("context_refiner_{}", "context_refiner.{}", 1, LUMINA),
    ],
    "tiny-pixart": [("blocks_{}", "transformer_blocks.{}", 2, PIXART)],
    "tiny-z-image": [
        ("layers_{}", "layers.{}", 2, ZIMAGE),
        ("noise_refiner_{}", "noise_refiner.{}", 1, ZIMAGE),
        ("context_refiner_{}", "context_refiner.{}", 1, ZIMAGE),
    ],
    "tiny-qwen-image": [("transformer_blocks_{}", "transformer_blocks.{}", 2, QWEN)],
    "tiny-sd3": [
        ("joint_blocks_{}", "transformer_blocks.{}", 2, SD3),
        ("joint_blocks_{}", "transformer_blocks.{}", 1, {"context_block_attn_proj": ("attn.to_add_out",)}),
    ],
}


def test_a_lora_in_the_layout_of_kohya_is_the_adapter(config, folder, tmp_path):
    """By the names of the original code, whose layers hold several of ours; also of an adapter that leaves some out."""
    if folder.name not in ORIGINAL:  # Sana, whose LoRAs diffusers alone reads
        with pytest.raises(SVFitError, match="kohya files have no name for .*: export in the diffusers layout"):
            export_lora(
                train(replace(config, max_train_steps=1)).adapter_path,
                open_base_model(str(folder)),
                tmp_path / "lora.safetensors",
                "kohya",
            )
        return
    adapter = read_adapter(train(replace(config, max_train_steps=1)).adapter_path)
    torch.manual_seed(0)
    for shift in adapter.shifts.values():  # also where nothing is learnt, as on the prompt's side of a last block
        shift.normal_()
    left_out = next(name for name in adapter.shifts if name.endswith(("to_k", "to_out")))
    adapter.shifts[left_out].zero_()
    path = save_adapter(adapter, tmp_path / "adapter.safetensors", torch.float32)
    base = open_base_model(str(folder))
    load_adapter(base.pipeline, path)
    layers = svfit_layers(base.pipeline.transformer)
    deltas = {name: layer.exact_delta() for name, layer in layers.items()}
    unload_adapter(base.pipeline)
    file = load_file(export_lora(path, base, tmp_path / "lora.safetensors", "kohya").path)

    stems = set()
    for there, here, count, names in ORIGINAL[folder.name]:
        for block in range(count):
            for name, parts in names.items():
                stem, ours = (
                    f"lora_unet_{there.format(block)}_{name}",
                    [f"{here.format(block)}.{part}" for part in parts],
                )
                if ours == [left_out.partition(".")[2]]:
                    continue
                stems.add(stem)
                sizes = [base.pipeline.transformer.get_submodule(part).out_features for part in ours]
                down = file[f"{stem}.lora_down.weight"].float()
                scale = file[f"{stem}.alpha"].item() / len(down)
                change = scale * file[f"{stem}.lora_up.weight"].float() @ down
                expected = torch.cat(
                    [
                        deltas[part] if part in deltas else torch.zeros(size, change.shape[1])
                        for part, size in zip(ours, sizes, strict=True)
                    ]
                )
                assert change.shape == expected.shape and (change - expected).norm() <= 1e-3 * expected.norm()
    assert {key.partition(".")[0] for key in file} == stems


def test_layers_without_a_name_in_the_original_code_are_said(config, folder, tmp_path):
    embedder = {
        "tiny-qwen-image": "img_in",
        "tiny-z-image": "cap_embedder.1",
        "tiny-sd3": "context_embedder",
        "tiny-krea2": "img_in",
        "tiny-sana": "caption_projection.linear_1",
        "tiny-pixart": "caption_projection.linear_1",
    }
    target = embedder.get(folder.name, "x_embedder")
    adapter = train(replace(config, max_train_steps=1, target_modules=[target])).adapter_path
    with pytest.raises(SVFitError, match=f"no name for .*transformer.{target}.*: export in the diffusers layout"):
        export_lora(adapter, open_base_model(str(folder)), tmp_path / "lora.safetensors", "kohya")


def test_latents_that_the_pipeline_hands_out_are_decoded_as_it_would(folder):
    pipeline, side = open_base_model(str(folder)).pipeline, side_of(folder)
    height, width = side, side * 3 // 2 if side == 16 else 2 * side
    family = family_of(pipeline)
    words = family.painting_arguments({"prompt": "a dog", "negative_prompt": None}, 2.0)

    def call(**options):
        start = torch.manual_seed(0)
        return pipeline(**words, height=height, width=width, num_inference_steps=2, generator=start, **options).images

    (expected,) = call()
    (found,) = family.decode_latents(call(output_type="latent"), height, width)
    assert found.size == expected.size == (width, height)
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_bf16_pictures_are_close_to_those_of_float32(folder):
    plain = paint(open_base_model(str(folder)))
    half = open_base_model(str(folder))
    half.pipeline.transformer.to(torch.bfloat16)
    if "pixart" in folder.name:  # whose pipeline takes the type of an encoder that is there
        half.pipeline.text_encoder.to(torch.bfloat16)
    assert np.abs(pixels(paint(half)) - pixels(plain)).mean() < 8


def test_a_plan_without_weights_knows_the_same_layers(config):
    whole, outline = prepare(replace(config, dry_run=True)), prepare(replace(config, dry_run=True), weightless=True)
    assert outline.shapes == whole.shapes and outline.report() == whole.report()


def test_the_estimate_is_of_the_largest_phase(config):
    run = prepare(replace(config, dry_run=True))
    family = run.base.family
    found = estimate_memory(run)
    prompts = 4 * sum(p.numel() for encoder in family.text_encoders.values() for p in encoder.parameters())
    assert found.before["prompts"] == prompts and list(found.phases) == ["prompts", "photos", "steps"]
    assert found.networks == 4 * sum(p.numel() for p in family.denoiser.parameters())  # and no text encoder
    assert (
        found.total == max(found.phases.values()) and f"prompts {found.phases['prompts'] / 1e9:.1f}" in found.lines()[0]
    )
    half = estimate_memory(prepare(replace(config, dry_run=True, mixed_precision="bf16")))
    assert half.before["prompts"] == prompts // 2
    larger = estimate_memory(prepare(replace(config, dry_run=True, resolution=2 * config.resolution)))
    weights = 4 * sum(p.numel() for p in family.pipeline.vae.parameters())
    assert 3.5 < (larger.before["photos"] - weights) / (found.before["photos"] - weights) <= 4.5
