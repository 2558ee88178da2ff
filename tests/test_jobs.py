"""Files of jobs: their lines, batches of several people's pictures, and adapters that come and go within a bound."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_pipeline
from PIL import Image
from test_mixes import adapter

from svfit_dreambooth import save_adapter
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.commands.main import main
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting import shelf as shelf_module
from svfit_dreambooth.painting.generate import generate, open_for_adapters
from svfit_dreambooth.painting.jobs import Job, open_for_jobs, paint_jobs, read_jobs
from svfit_dreambooth.painting.registry import adapters_on, loaded_adapters
from svfit_dreambooth.painting.shelf import AdapterFiles, Shelf

SMALL = {"num_inference_steps": 2, "height": 16, "width": 16}
LONG = "a photo of sks dog on the beach, " * 12


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Three files; two of them learned the same word."""
    folder, pipeline = tmp_path_factory.mktemp("adapters"), tiny_pipeline()
    save_adapter(adapter(pipeline, 1, rank=5, layers=("to_q", "q_proj"), word="sks"), folder / "dog.safetensors")
    save_adapter(adapter(pipeline, 2, layers=("to_v", "conv1", "v_proj")), folder / "mug.safetensors")
    save_adapter(adapter(pipeline, 3, layers=("to_k",), word="sks"), folder / "cat.safetensors")
    return folder


def pixels(image):
    return np.asarray(image.convert("RGB"), dtype=int)


def write(path, *entries):
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return path


def test_no_negative_prompt_is_not_an_empty_one(tiny_base_xl):
    """SDXL takes zeros for none."""
    jobs = [Job("a dog"), Job("a dog", negative_prompt=""), Job("a dog", negative_prompt="snow")]
    shelf, painted = Shelf(open_base_model(str(tiny_base_xl))), {}
    shelf.model.pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    paint_jobs(shelf, jobs, on_picture=lambda job, picture: painted.setdefault(job, picture), **SMALL)
    for job in jobs:
        (expected,) = generate(shelf.model, ["a dog"], negative_prompt=job.negative_prompt, **SMALL)
        assert np.abs(pixels(painted[job].image) - pixels(expected.image)).max() <= 1


@pytest.mark.parametrize("batch_size", [2, 5])
def test_pictures_are_those_of_generate(tiny_base, adapters, batch_size):
    dog, mug, cat = (str(adapters / f"{name}.safetensors") for name in ("dog", "mug", "cat"))
    jobs = [
        Job("a photo of sks dog", ((dog, 0.8),), seed=3, count=3),
        Job("a mug", ((mug, 1.0), (cat, -0.5)), seed=1, negative_prompt="snow"),
        Job(LONG, ((cat, 1.0),), seed=9, count=2),
        Job("a cat in snow"),
    ]
    painted = []
    shelf = Shelf(open_for_adapters([], str(tiny_base), device="cpu"))
    paint_jobs(shelf, jobs, batch_size=batch_size, on_picture=lambda *each: painted.append(each), **SMALL)
    assert len(painted) == 7 and not any(loaded_adapters(shelf.model.pipeline).values())
    for job in jobs:
        model = open_for_adapters(list(job.adapters), str(tiny_base), device="cpu")
        expected = generate(model, [job.prompt], num_images=job.count, seed=job.seed,
                            negative_prompt=job.negative_prompt, **SMALL)  # fmt: skip
        own = [picture for other, picture in painted if other is job]
        assert [picture.settings for picture in own] == [picture.settings for picture in expected]
        for one, other in zip(own, expected, strict=True):
            assert np.abs(pixels(one.image) - pixels(other.image)).max() <= 1  # of 255: 1e-4 may round otherwise


def test_many_adapters_come_and_go_within_the_bound(tiny_base, tmp_path):
    pipeline = tiny_pipeline()
    files = []
    for seed in range(40):
        files.append(str(save_adapter(adapter(pipeline, seed, layers=("to_q",)), tmp_path / f"{seed}.safetensors")))
    shelf = Shelf(open_base_model(str(tiny_base)))
    shelf.bring(files[:1])
    (size,) = shelf.sizes.values()
    shelf.most_bytes = 5 * size + 1
    held, last = [], []

    def look(job, picture):
        networks = shelf.model.family.components.values()
        tensors = [t for m in networks for loaded in adapters_on(m).values() for t in loaded.shifts.values()]
        held.append(sum(t.numel() * t.element_size() for t in tensors))
        last.append(picture)

    jobs = [Job("a dog", ((file, 1.0),)) for file in [*files, files[0]]]
    paint_jobs(shelf, jobs, batch_size=3, on_picture=look, **SMALL)
    assert len(held) == 41 and max(held) == 5 * size
    assert set(shelf.sizes) == set(loaded_adapters(shelf.model.pipeline)) and len(shelf.sizes) == 5
    assert np.abs(pixels(last[0].image) - pixels(last[-1].image)).max() <= 1  # gone and come back
    assert np.abs(pixels(last[0].image) - pixels(last[1].image)).max() > 1
    with pytest.raises(SVFitError, match=r"the 6 adapters of one batch hold .* allow more, or paint fewer"):
        shelf.bring(files[:6])
    shelf.bring([files[39]])
    shelf.bring([files[0]])
    shelf.bring(files[5:9])  # the one used longest ago makes room
    assert set(shelf.sizes) == set(loaded_adapters(shelf.model.pipeline)) == {files[0], *files[5:9]}


def test_a_file_is_read_once(tiny_base, adapters, tmp_path, monkeypatch):
    names = [str(adapters / f"{name}.safetensors") for name in ("dog", "mug", "cat")]
    path = write(tmp_path / "jobs.jsonl", *({"prompt": "a dog", "adapters": [name]} for name in [*names, *names]))
    read = []
    original = shelf_module.read_adapter
    monkeypatch.setattr(shelf_module, "read_adapter", lambda path: read.append(str(path)) or original(path))
    files = AdapterFiles()
    jobs = read_jobs(path, files)
    shelf = Shelf(open_for_jobs(jobs, str(tiny_base), files=files), files=files)
    paint_jobs(shelf, jobs, **SMALL)
    assert read == names and not files.waiting and files.bytes == 0


@pytest.mark.slow
def test_a_thousand_adapters_on_one_base(tiny_base, tmp_path):
    """They are read, checked and painted with, while a tenth of them is in memory at most."""
    pipeline = tiny_pipeline()
    names = [
        str(save_adapter(adapter(pipeline, n, layers=("to_q",)), tmp_path / f"{n}.safetensors")) for n in range(1000)
    ]
    path = write(tmp_path / "jobs.jsonl", *({"prompt": "a dog", "adapters": [name]} for name in names))
    probe = AdapterFiles()
    probe.look(names[0])
    files = AdapterFiles(100 * probe.bytes)
    jobs, held, painted = read_jobs(path, files), [], []
    assert files.bytes == files.most_bytes
    shelf = Shelf(open_for_jobs(jobs, str(tiny_base), files=files), files.most_bytes, files=files)

    def look(job, picture):
        held.append(shelf.bytes)
        painted.append(job.line)

    paint_jobs(shelf, jobs, batch_size=8, on_picture=look, num_inference_steps=1, height=16, width=16)
    assert sorted(painted) == list(range(1, 1001)) and max(held) <= 100 * probe.bytes
    assert len(loaded_adapters(shelf.model.pipeline)) <= 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "is not JSON"),
        ('["a dog"]', "no object in braces"),
        ({"adapters": []}, "there is no prompt"),
        ({"prompt": None}, "prompt is None, not text"),
        ({"prompt": "a", "seeds": 1}, "'seeds' is none of prompt, adapters"),
        ({"prompt": "a", "count": 0}, "count is 0"),
        ({"prompt": "a", "count": True}, "count is True, not a whole number"),
        ({"prompt": "a", "seed": 1.5}, "seed is 1.5, not a whole number"),
        ({"prompt": "a", "adapters": "dog.safetensors"}, "adapters is 'dog.safetensors', not a list"),
        ({"prompt": "a", "adapters": [1]}, r"adapters is \[1\], not a list of texts"),
        ({"prompt": "a", "adapters": ["/no/dog.safetensors"]}, "/no/dog.safetensors"),
        ({"prompt": "a", "adapters": ["x.safetensors:inf"]}, "strength of x.safetensors is inf"),
        ({"prompt": "a", "adapters": ["x.safetensors", "x.safetensors:0.5"]}, "holds one twice"),
    ],
)
def test_bad_lines_are_named_by_number(tmp_path, line, message):
    path = write(tmp_path / "jobs.jsonl", {"prompt": "a dog"}, "", line)
    with pytest.raises(SVFitError, match=f"lines that are no jobs: line 3: .*{message}"):
        read_jobs(path)


def test_files_without_jobs(tmp_path):
    with pytest.raises(SVFitError, match="holds no jobs"):
        read_jobs(write(tmp_path / "jobs.jsonl", "", ""))
    with pytest.raises(SVFitError, match="cannot be read"):
        read_jobs(tmp_path / "none.jsonl")
    with pytest.raises(SVFitError, match="line 5: .*and 2 more"):
        read_jobs(write(tmp_path / "jobs.jsonl", *["{"] * 7))


def test_an_adapter_of_another_base_is_named_before_anything_is_painted(tiny_base, adapters, tmp_path):
    other = save_adapter(adapter(tiny_pipeline(seed=7), 1, layers=("to_q",)), tmp_path / "other.safetensors")
    jobs = [Job("a dog", ((str(adapters / "mug.safetensors"), 1.0),), line=1), Job("b", ((str(other), 1.0),), line=2)]
    shelf, painted = Shelf(open_base_model(str(tiny_base))), []
    with pytest.raises(SVFitError, match=r"line 2: .*other\.safetensors' was trained on tiny, and this pipeline"):
        paint_jobs(shelf, jobs, on_picture=lambda *each: painted.append(each), **SMALL)
    assert not painted and not loaded_adapters(shelf.model.pipeline)
    shelf.allow_other_base = True
    paint_jobs(shelf, jobs, on_picture=lambda *each: painted.append(each), **SMALL)
    assert len(painted) == 2


def test_the_command(tiny_base, adapters, tmp_path, capsys):
    dog = adapters / "dog.safetensors"
    path = write(
        tmp_path / "jobs.jsonl",
        {"prompt": "a photo of sks dog", "adapters": [f"{dog}:0.8"], "seed": 5, "count": 2},
        {"prompt": "a cat", "negative_prompt": "snow"},
    )
    command = [
        "generate",
        "--jobs",
        str(path),
        "--output_dir",
        str(tmp_path / "out"),
        "--height",
        "16",
        "--width",
        "16",
    ]
    command += ["--pretrained_model_name_or_path", str(tiny_base), "--num_inference_steps", "1", "--batch_size", "2"]
    assert main(command) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == ["dog-000.png", "dog-001.png", "tiny-kl-000.png"]
    settings = [json.loads(Image.open(path).info["svfit"]) for path in paths]
    assert [(s["seed"], s["adapters"]) for s in settings] == [(5, {"dog": 0.8}), (6, {"dog": 0.8}), (0, {})]
    assert settings[2]["negative_prompt"] == "snow"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--jobs", "j.jsonl", "--prompt", "a"],
            'error: --prompt does not go with --jobs: write "prompt" into its lines.',
        ),
        (["--jobs", "j.jsonl", "--num_images", "2"], 'write "count" into its lines'),
        (["--jobs", "j.jsonl", "--adapter", "a"], 'write "adapters" into its lines'),
        (["--jobs", "j.jsonl"], "cannot be read"),
        (["--jobs", "j.jsonl", "--dtype", "bfloat16"], "too coarse"),
        (
            ["--jobs", "j.jsonl", "--adapter_memory", "nan"],
            "error: --adapter_memory is nan: give a number of MB above 0.",
        ),
        (["--prompt", "a", "--batch_size", "2"], "error: --batch_size goes with --jobs alone"),
        ([], "error: there is nothing to paint: give a --prompt, or a file of --jobs."),
    ],
)
def test_the_command_refuses(arguments, message, capsys, tmp_path):
    assert main(["generate", "--output_dir", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
