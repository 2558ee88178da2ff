"""The ComfyUI node, against a stand-in of what it uses of ComfyUI: patched weights must be those of load_adapter."""

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import tiny_pipeline
from flow_bases import BASES
from safetensors.torch import save_file

from svfit_dreambooth import load_adapter, save_adapter
from svfit_dreambooth.adapter.file import Adapter, read_adapter
from svfit_dreambooth.adapter.words import LearnedWord
from svfit_dreambooth.bases.families import family_of, find_projections
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.method.targets import svfit_layers
from svfit_dreambooth.sharing.lora_names import lora_places

NODE = Path(__file__).resolve().parent.parent / "comfyui" / "svfit_loader.py"


class Patcher:
    """ComfyUI's ModelPatcher in small: patches are kept beside the model and added to a copy of its weights."""

    def __init__(self, weights, decoded):
        self.weights, self.decoded, self.patches, self.layer = weights, decoded, {}, None
        self.model = self.cond_stage_model = SimpleNamespace(keys=list(weights))

    @property
    def patcher(self):
        return self

    def clone(self):
        other = copy.copy(self)
        other.patches = {key: list(patches) for key, patches in self.patches.items()}
        return other

    def clip_layer(self, layer):
        self.layer = layer

    def get_key_patches(self):
        first = {key: ((w, lambda w, **_: w) if self.decoded else w) for key, w in self.weights.items()}
        return {key: [first[key], *self.patches.get(key, [])] for key in self.weights}

    def add_patches(self, patches, strength_patch=1.0):
        for key, patch in patches.items():
            assert (key if isinstance(key, str) else key[0]) in self.weights
            self.patches.setdefault(key, []).append((strength_patch, patch))

    def patched(self, key):
        weight = self.weights[key].float().clone()
        for target, patches in self.patches.items():
            if target != key and target[0] != key:
                continue
            rows = weight if target == key else weight.narrow(*target[1])
            for strength, (kind, content) in patches:
                change = content[0].float() if kind == "diff" else content[0].float() @ content[1].float()
                assert kind in ("diff", "lora") and change.shape == rows.shape
                rows += strength * change
        return weight


OLD = "svfit_dreambooth.adapter import read_adapter\nfrom svfit_dreambooth.adapter.file import is_adapter"


@pytest.fixture
def node(monkeypatch, tmp_path):
    comfy, lora, folder_paths = ModuleType("comfy"), ModuleType("comfy.lora"), ModuleType("folder_paths")
    lora.load_lora = lambda lora, to_load: {
        key: ("lora", (lora[f"{x}.lora_up.weight"], lora[f"{x}.lora_down.weight"], None, None))
        for x, key in to_load.items()
    }
    lora.model_lora_keys_unet = lambda model, found: (
        found
        | getattr(model, "by_diffusers_names", {})
        | {
            "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_"): key
            for key in model.keys
        }
    )
    lora.model_lora_keys_clip = lambda model, found: (
        found
        | {
            "lora_te_" + key.removeprefix("clip_l.transformer.").removesuffix(".weight").replace(".", "_"): key
            for key in model.keys
        }
    )
    comfy.lora = lora
    folder_paths.get_filename_list = lambda kind: sorted(path.name for path in tmp_path.glob("*.safetensors"))
    folder_paths.get_full_path = lambda kind, name: str(tmp_path / name)
    for module in (comfy, lora, folder_paths):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return import_node(NODE)


def import_node(path):
    spec = importlib.util.spec_from_file_location("svfit_loader", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def projections(pipeline):
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return {f"{part}.{name}": found[2] for part, m in parts.items() for name, found in find_projections(m).items()}


def loaded(layers, decoded, dtype=torch.float32):
    """The model and text encoder as ComfyUI would hold them."""
    weights = {name: layer.weight.detach().to(dtype) for name, layer in layers.items()}
    unet = {f"diffusion_model{name[4:]}.weight": w for name, w in weights.items() if name.startswith("unet.")}
    clip = {
        f"clip_l.transformer{name[12:]}.weight": w for name, w in weights.items() if name.startswith("text_encoder.")
    }
    return Patcher(unet, decoded), Patcher(clip, decoded)


def key_of(name):
    part, _, path = name.partition(".")
    return ("diffusion_model." if part == "unet" else "clip_l.transformer.") + path + ".weight"


def write_adapter(layers, folder, **training):
    generator = torch.Generator().manual_seed(0)
    shifts = {name: torch.randn(min(layer.weight.shape) - 2, generator=generator) for name, layer in layers.items()}
    adapter = Adapter(shifts, "tiny", fingerprint({name: layer.weight for name, layer in layers.items()}))
    adapter.training = training
    return save_adapter(adapter, folder / "dog.safetensors", torch.float32)


@pytest.mark.parametrize(("decoded", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_the_patched_weights_are_those_of_load_adapter(node, tmp_path, decoded, dtype):
    pipeline = tiny_pipeline()
    layers = projections(pipeline)
    path = write_adapter(layers, tmp_path)
    (loader,) = node.NODE_CLASS_MAPPINGS.values()
    inputs = loader.INPUT_TYPES()
    assert inputs["required"]["adapter"] == (["dog.safetensors"],) and set(node.NODE_DISPLAY_NAME_MAPPINGS)
    before = loaded(layers, decoded, dtype)
    model, clip = getattr(loader(), loader.FUNCTION)(*before, "dog.safetensors", 1.0, 0.5)
    assert len(loader.RETURN_TYPES) == 2 and not before[0].patches and not before[1].patches
    load_adapter(pipeline, path)
    own = {f"unet.{name}": layer for name, layer in svfit_layers(pipeline.unet).items()}
    own |= {f"text_encoder.{name}": layer for name, layer in svfit_layers(pipeline.text_encoder).items()}
    assert len(own) == 40
    for name, layer in own.items():
        holder, strength = (model, 1.0) if name.startswith("unet.") else (clip, 0.5)
        expected = layer.weight + strength * layer.delta()
        error = (holder.patched(key_of(name)) - expected).abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 4e-3)

    again, _ = loader().load(model, clip, "dog.safetensors", -1.0, 0.0)  # a second loader sees the original weights
    name = next(iter(own))
    assert torch.allclose(again.patched(key_of(name)), before[0].weights[key_of(name)].float(), atol=1e-5)


def test_prompts_are_read_as_in_training(node, tmp_path):
    layers = projections(tiny_pipeline())
    for training, layer in (({}, None), ({"clip_skip": 1}, -2)):
        write_adapter(layers, tmp_path, **training)
        _, before = loaded(layers, False)
        _, clip = node.SVFitLoader().load(*loaded(layers, False), "dog.safetensors", 1.0, 1.0)
        assert clip.layer == layer and before.layer is None


def test_an_adapter_of_few_scattered_values(node, tmp_path):
    pipeline = tiny_pipeline()
    layers = projections(pipeline)
    adapter = read_adapter(write_adapter(layers, tmp_path))
    for number, shift in enumerate(adapter.shifts.values()):  # one layer is left alone, the others move in one place
        shift.copy_(torch.where(torch.arange(len(shift)) == number % len(shift), float(number), 0.0))
    path = save_adapter(adapter, tmp_path / "dog.safetensors", torch.float32)
    model, clip = node.SVFitLoader().load(*loaded(layers, True), "dog.safetensors", 1.0, 1.0)
    load_adapter(pipeline, path)
    for part, holder in (("unet", model), ("text_encoder", clip)):
        for name, layer in svfit_layers(getattr(pipeline, part)).items():
            expected = layer.weight + layer.delta()
            assert (holder.patched(key_of(f"{part}.{name}")) - expected).abs().max() < 1e-5


def test_only_adapters_are_offered(node, tmp_path):
    write_adapter(projections(tiny_pipeline()), tmp_path)
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 2)}, tmp_path / "lora.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no file at all")
    assert node.SVFitLoader.INPUT_TYPES()["required"]["adapter"] == (["dog.safetensors"],)


def test_eight_bits_are_called_what_they_are(node, tmp_path):
    layers = projections(tiny_pipeline())
    write_adapter(layers, tmp_path)
    coarse = loaded(layers, True, torch.float8_e4m3fn)
    with pytest.raises(SVFitError, match="holds its weights in torch.float8_e4m3fn, too coarse .* export a LoRA"):
        node.SVFitLoader().load(*coarse, "dog.safetensors", 1.0, 1.0)


def test_copies_of_the_node_that_people_have_still_work(node, tmp_path):
    """They import from where the modules were when they were copied."""
    text = NODE.read_text(encoding="utf-8")
    for here, before in (
        ("svfit_dreambooth.adapter.file import is_adapter, read_adapter", OLD),
        ("svfit_dreambooth.method.basis import", "svfit_dreambooth.basis import"),
    ):
        assert here in text
        text = text.replace(here, before)
    (tmp_path / "old.py").write_text(text, encoding="utf-8")
    layers = projections(tiny_pipeline())
    write_adapter(layers, tmp_path)
    old = import_node(tmp_path / "old.py")
    model, _ = old.SVFitLoader().load(*loaded(layers, True), "dog.safetensors", 1.0, 1.0)
    assert len(model.patches) == 32


def test_another_model_is_refused(node, tmp_path):
    layers = projections(tiny_pipeline())
    write_adapter(layers, tmp_path)
    other = projections(tiny_pipeline(seed=5))
    with pytest.raises(SVFitError, match="dog.safetensors was trained on tiny, and other weights are loaded"):
        node.SVFitLoader().load(*loaded(other, True), "dog.safetensors", 1.0, 1.0)
    model, _ = node.SVFitLoader().load(*loaded(other, True), "dog.safetensors", 1.0, 1.0, allow_other_base=True)
    assert len(model.patches) == 32
    name = next(name for name in layers if name.startswith("unet."))
    smaller = {other: layer for other, layer in layers.items() if other != name}
    with pytest.raises(SVFitError, match=f"this model has no {name}"):
        node.SVFitLoader().load(*loaded(smaller, True), "dog.safetensors", 1.0, 1.0)


def test_a_learned_word_is_not_lost_silently(node, tmp_path):
    layers = projections(tiny_pipeline())
    adapter = read_adapter(write_adapter(layers, tmp_path))
    adapter.learned_words = [LearnedWord("sks", {"text_encoder": ["sks"]}, {"text_encoder": torch.ones(1, 24)})]
    save_adapter(adapter, tmp_path / "dog.safetensors")
    for allow_other_base in (False, True):
        with pytest.raises(SVFitError, match="dog.safetensors has learned the word sks, which this node cannot load"):
            node.SVFitLoader().load(*loaded(layers, True), "dog.safetensors", 1.0, 1.0, allow_other_base)


@pytest.mark.parametrize(
    "tiny", [tiny for name, tiny in BASES.items() if name not in ("sana", "krea2")]
)  # not in ComfyUI's maps
@pytest.mark.parametrize("values", ["all", "few"])
def test_transformers_whose_layers_are_rows_of_one(node, tmp_path, tiny, values):
    """ComfyUI holds query, key and value of most families as one layer, and its map names their rows."""
    family = family_of(tiny())
    layers = {name: found[2] for name, found in family.find_projections("transformer").items()}
    layers = {f"transformer.{name}": layer for name, layer in layers.items()}
    weights, names = {}, {}
    for name, place in lora_places(layers, "kohya", family).items():
        weight, key = layers[name].weight.detach().bfloat16(), f"diffusion_model.{place.stem}.weight"
        if place.rows is None:
            weights[key], names[name] = weight, key
        else:
            weights.setdefault(key, torch.zeros(place.rows, weight.shape[1], dtype=weight.dtype))
            names[name] = (key, (0, place.first, len(weight)))
            weights[key].narrow(*names[name][1]).copy_(weight)
    model = Patcher(weights, decoded=True)
    model.model.by_diffusers_names = names
    family.cast(torch.bfloat16)
    adapter = read_adapter(write_adapter(layers, tmp_path))
    if values == "few":
        for number, shift in enumerate(adapter.shifts.values()):
            shift.copy_(torch.where(torch.arange(len(shift)) == number % len(shift), 1.0 + number, 0.0))
    path = save_adapter(adapter, tmp_path / "dog.safetensors", torch.float32)

    patched, _ = node.SVFitLoader().load(model=model, adapter="dog.safetensors", strength_model=0.5)
    thin = {kind for patches in patched.patches.values() for _, (kind, _) in patches}
    assert "lora" in thin if values == "few" else "diff" in thin
    load_adapter(family.pipeline, path)
    for name, layer in svfit_layers(family.denoiser).items():
        key, rows = names[f"transformer.{name}"], slice(None)
        if isinstance(key, tuple):
            key, rows = key[0], slice(key[1][1], key[1][1] + key[1][2])
        expected = layer.weight.float() + 0.5 * layer.exact_delta()
        assert (patched.patched(key)[rows] - expected).abs().max() < 1e-2 * expected.abs().max()
