"""What else people do with a transformer base: offloading, several subjects, the base's own pictures, measuring, the page."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import offload_sequentially
from diffusers.hooks import apply_group_offloading
from flow_bases import BASES, SIDES, tiny_klein
from test_features import clip  # noqa: F401 - a fixture
from test_processes import ROOT, on_two_processes
from web_stand_ins import paint as paint_order

from svfit_dreambooth import read_adapter, save_adapter, train
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.commands.main import main
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.painting.batches import Sample, paint_batch, read_words
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.painting.loading import load_adapter, unload_adapter
from svfit_dreambooth.subjects.together import train_together
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.web.rooms.bases import Bases
from svfit_dreambooth.web.rooms.orders import Cell, Order
from svfit_dreambooth.web.rooms.studio import Studio

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("flow") / "tiny-klein"
    tiny_klein().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    family = open_base_model(str(folder)).family
    layers = family.find_projections("transformer")
    weights = {f"transformer.{name}": layer.weight.detach() for name, (_, _, layer) in layers.items()}
    torch.manual_seed(2)
    shifts = {name: 0.3 * torch.randn(min(weight.shape)) for name, weight in weights.items()}
    content = Adapter(shifts, "tiny-klein", fingerprint(weights), instance_prompt="a photo of sks dog")
    return save_adapter(content, tmp_path_factory.mktemp("adapter") / "dog.safetensors", torch.float32)


@pytest.fixture
def options(folder, photo_folder, tmp_path):
    return {
        "pretrained_model_name_or_path": str(folder),
        "instance_data_dir": str(photo_folder),
        "instance_prompt": "a photo of sks dog",
        "output_dir": str(tmp_path / "run"),
        "resolution": 16,
        "max_train_steps": 2,
        "learning_rate": 0.05,
        "fixed_loss_examples": 2,
        "num_inference_steps": 2,
        "validation_steps": 0,
        "final_pictures": False,
        "save_dtype": "float32",
    }


def paint(model):
    (picture,) = generate(model, ["a photo of sks dog"], num_inference_steps=2, seed=3, height=16, width=16)
    return np.asarray(picture.image, dtype=int)


@pytest.mark.parametrize("way", ["model", "sequential", "group"])
def test_offloaded_pictures_are_the_same(folder, adapter, way, monkeypatch):
    plain = open_base_model(str(folder))
    before = paint(plain)
    load_adapter(plain.pipeline, adapter)
    expected = paint(plain)
    assert (expected != before).any()
    model = open_base_model(str(folder))
    pipeline = model.pipeline
    if way == "model":
        pipeline.enable_model_cpu_offload(device="cpu")
    elif way == "group":
        apply_group_offloading(pipeline.transformer, CPU, CPU, offload_type="leaf_level")
    else:
        monkeypatch.setattr(
            pipeline,
            "enable_sequential_cpu_offload",
            lambda device: offload_sequentially(pipeline.transformer, device),
        )
        pipeline.enable_sequential_cpu_offload(device=CPU)
    load_adapter(pipeline, adapter)
    assert (paint(model) == expected).all()
    unload_adapter(pipeline)
    assert (paint(model) == before).all()


@pytest.mark.parametrize(
    "name", [n if n in ("klein", "z-image") else pytest.param(n, marks=pytest.mark.slow) for n in BASES]
)
def test_pictures_of_a_batch_are_those_painted_alone(name):
    """With prompts and strengths of their own, as jobs and the page put them together."""
    pipeline = BASES[name]()
    model = BaseModel("tiny", pipeline)
    layers = model.family.find_projections("transformer")
    weights = {f"transformer.{name}": layer.weight.detach() for name, (_, _, layer) in layers.items()}
    torch.manual_seed(2)
    shifts = {name: torch.randn(min(weight.shape)) for name, weight in weights.items()}
    load_adapter(pipeline, Adapter(shifts, "tiny", fingerprint(weights)), name="dog")
    samples = [
        Sample(*read_words(model, prompt, None, {"dog": strength}, model.guidance_scale)[:1], seed, {"dog": strength})
        for prompt, strength, seed in (("a dog", 1.0, 1), ("a cat at the beach", 0.0, 2))
    ]
    side = SIDES.get(name, 16)
    common = {"num_inference_steps": 2, "height": side, "width": side}
    if samples[0].kind != samples[1].kind:
        assert name in ("qwen-image", "chroma")  # whose prompts have a length of their own: painted one by one
        return
    together = paint_batch(model, samples, **common)
    alone = [paint_batch(model, [sample], **common)[0] for sample in samples]
    for (found, _), (expected, _) in zip(together, alone, strict=True):
        assert np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1
    assert (np.asarray(alone[0][0]) != np.asarray(alone[1][0])).any()


def test_the_page_paints_with_an_adapter(workspace, folder, adapter):
    studio = Studio(Bases(workspace.models, (str(folder),)))
    order = Order(
        "a photo of sks dog", folder.name, [(adapter, 1.0)], seed=3, num_inference_steps=2, width=16, height=16,
        cells=(Cell(0.0), Cell(1.0)),
    )  # fmt: skip
    _, (bare, full) = paint_order(studio, order)
    plain = open_base_model(str(folder))
    assert (np.asarray(bare.image, dtype=int) == paint(plain)).all()
    load_adapter(plain.pipeline, adapter)
    assert np.abs(np.asarray(full.image, dtype=int) - paint(plain)).max() <= 1


@pytest.mark.slow
def test_several_subjects_in_one_run(options, tmp_path, photo_folder):
    configs = [
        TrainConfig(**options | {"output_dir": str(tmp_path / name), "instance_prompt": f"a photo of {name} dog"})
        for name in ("sks", "zwx")
    ]
    outcomes = train_together(configs)
    assert [outcome.state for outcome in outcomes] == ["finished", "finished"], [
        outcome.message for outcome in outcomes
    ]
    alone = train(replace(configs[1], output_dir=str(tmp_path / "alone")))
    found, expected = read_adapter(outcomes[1].adapter).shifts, read_adapter(alone.adapter_path).shifts
    assert all(torch.allclose(found[name], shift, atol=1e-5) for name, shift in expected.items())


@pytest.mark.slow
def test_the_base_is_kept_by_its_own_pictures(options, tmp_path, monkeypatch):
    monkeypatch.setattr("svfit_dreambooth.training.base_pictures.PLAIN_PROMPTS", ("a photo of a tractor", "a cup"))
    config = TrainConfig(**options, keep_base=True, basis_cache_dir=str(tmp_path / "cache"))
    result = train(config)
    assert result.ending.status == "finished" and result.base.family.text_encoders == {}


@pytest.mark.slow
def test_adapters_are_measured(folder, adapter, photo_folder, tmp_path, capsys, clip):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("a photo of {}")
    found = main(
        ["evaluate", "--adapter", str(adapter), "--instance_data_dir", str(photo_folder), "--output_dir",
         str(tmp_path / "scores"), "--pretrained_model_name_or_path", str(folder), "--num_images", "2",
         "--num_inference_steps", "1", "--class_words", "dog", "--prompts", str(tmp_path / "prompts.txt"), "--clip_path", str(clip)]
    )  # fmt: skip
    assert found == 0 and (tmp_path / "scores" / "scores.json").is_file() and "dog" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_train_what_one_trains_with_twice_the_batch(options, tmp_path):
    options |= {"aspect_ratio": "square", "adam_epsilon": 1e-3, "output_dir": str(tmp_path / "two")}
    output = on_two_processes(ROOT / "train_dreambooth_svfit.py", options, timeout=400)
    assert output.count("singular values trained") == 1
    one = train(TrainConfig(**options | {"train_batch_size": 2, "output_dir": str(tmp_path / "one")}))
    found = read_adapter(next((tmp_path / "two").glob("*.safetensors"))).shifts
    expected = read_adapter(one.adapter_path).shifts
    assert all((found[name] - shift).norm() <= 1e-3 * shift.norm() + 1e-6 for name, shift in expected.items())
