"""What README.md and docs/ tell people to type: it parses, it runs, and what it points at is there."""

import argparse
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import tiny_pipeline, tiny_unet
from flow_bases import tiny_klein
from PIL import Image
from test_loading import make_adapter
from transformers import ViTConfig, ViTForImageClassification

from svfit_dreambooth import save_adapter
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.names import DEFAULT_BASE, SUBJECTS_FOLDER
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.commands.arguments import OPTION_NAMES, parse_runs
from svfit_dreambooth.commands.fleet import add_fleet
from svfit_dreambooth.commands.main import _parser, main, main_train
from svfit_dreambooth.commands.subjects import add_subjects

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAIN, COMMAND = "python train_dreambooth_svfit.py", "python -m svfit_dreambooth "
# Other programs, and what takes hours or serves: of our own scripts it is looked whether they are there.
OTHERS = ("python3 -m venv", "pip install", "hf auth login", "accelerate launch", "torchrun", "ray start")
SCRIPTS = ("python app.py", "python benchmarks/", "python examples/", "python -m toybox")
HUB = {"stable-diffusion-v1-5/stable-diffusion-v1-5": "toybox", "owner/my-dog:0.8": "dog.safetensors:0.8"}
SIBLINGS = {  # a distilled base and the one that it was made from; what was trained there
    "black-forest-labs/FLUX.2-klein-4B": "FLUX.2-klein",
    "black-forest-labs/FLUX.2-klein-base-4B": "FLUX.2-klein-base",
    "dog.safetensors": "klein_dog.safetensors",
}
NOT_WITHOUT_THE_HUB = ("push runs/my_dog", "push runs/my_dog owner/my-dog")
NETWORKS = ("--dino_path", "--clip_path")  # toybox has its judge
QUICK = {  # so few that a test has the time
    "train": ["--max_train_steps=2", "--num_inference_steps=1", "--num_class_images=2", "--mixed_precision=no"],
    "generate": ["--num_images=1", "--num_inference_steps=2"],  # of which --strength takes a part
    "jobs": ["--num_inference_steps=1"],
    "evaluate": ["--num_images=1", "--num_inference_steps=1"],
}


def blocks(page, language):
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page):
    """The commands of a page, one string each."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split("&&")]
    return [part for part in parts if part]


def arguments(command):
    return shlex.split(command)[3 if command.startswith(COMMAND) else 2 :]


def of_pages(found):
    return [pytest.param(page, id=page.stem) for page in PAGES if found(page)]


@pytest.mark.parametrize("page", of_pages(commands))
def test_commands_are_known_and_parse(page):
    for command in commands(page):
        if command.startswith(TRAIN):
            parse_runs([word for word in arguments(command) if not word.startswith("--config")], "train", add_subjects)
        elif command.startswith(COMMAND + "fleet"):
            parse_runs(arguments(command)[1:], "fleet", add_fleet)
        elif command.startswith(COMMAND):
            _parser().parse_args(arguments(command))
        elif command.startswith(SCRIPTS):
            assert (ROOT / shlex.split(command)[1]).exists() or command.startswith(SCRIPTS[-1]), command
        else:
            assert command.startswith((*OTHERS, ". .venv", ".venv/bin")), f"{page.name} tells to type {command!r}"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the files that the pages speak of, made for toybox."""
    pipeline = open_base_model("toybox").pipeline
    for number, name in enumerate(
        ["dog", "mug", "hat", "early", "late", "output/dog_patch", "output/dog", "runs/my_dog/my_dog"]
    ):
        adapter = make_adapter(pipeline, seed=number, rank=4, components=("unet",))
        adapter.instance_prompt, adapter.base_model = "a photo of sks dog", DEFAULT_BASE
        save_adapter(adapter, tmp_path / f"{name}.safetensors")
    for folder in ("photos/my_dog", "more_photos_of_the_dog"):
        shutil.copytree(SUBJECTS_FOLDER / "dog_patch", tmp_path / folder)
    for name in ("dog.png", "holiday.jpg"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    for name in ("photos/my_mug", "subjects/zwx mug", "subjects/cat"):
        shutil.copytree(SUBJECTS_FOLDER / "dog_patch", tmp_path / name)
    (lines,) = blocks(ROOT / "docs/painting.md", "json")
    (tmp_path / "jobs.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def siblings(workplace):
    """Two bases of one family there, and an adapter trained on the second."""
    distilled, base = tiny_klein(seed=1, is_distilled=True), tiny_klein(is_distilled=False)
    distilled.save_pretrained(workplace / "FLUX.2-klein")
    base.save_pretrained(workplace / "FLUX.2-klein-base")
    adapter = make_adapter(base, rank=4, components=("transformer",))
    adapter.base_model = "FLUX.2-klein-base"
    save_adapter(adapter, workplace / "klein_dog.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("siblings")
@pytest.mark.parametrize("page", of_pages(lambda page: any(c.startswith((TRAIN, COMMAND)) for c in commands(page))))
def test_commands_run(page, workplace, capsys):
    for command in commands(page):
        words = arguments(command) if command.startswith((TRAIN, COMMAND)) else []
        here = SIBLINGS if "--trained_on" in words else HUB
        words = [here.get(word, word) for word in words]
        for flag in NETWORKS:
            if flag in words:
                del words[words.index(flag) : words.index(flag) + 2]
        if command.startswith(TRAIN):
            code = main_train([*words, *QUICK["train"]])
        elif words and words[0] == "fleet":
            continue  # test_fleet.py
        elif words and " ".join(words) not in NOT_WITHOUT_THE_HUB and words[0] != "import":  # SVDiff's: test_svdiff.py
            code = main([*words, *QUICK.get("jobs" if "--jobs" in words else words[0], [])])
        else:
            continue
        assert code == 0, f"{command}\n{capsys.readouterr().err}"


def prelude(page):
    """What a page takes for granted."""
    if page.stem == "training":
        return {"base": BaseModel("tiny", tiny_pipeline())}
    if page.stem != "peft":
        return {}
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    return {"model": ViTForImageClassification(config), "base": ViTForImageClassification(config), "unet": tiny_unet()}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page, id=page.stem, marks=[pytest.mark.slow] if page.stem in ("README", "painting", "many-subjects") else []
        )
        for page in PAGES
        if blocks(page, "python") and page.stem != "web"  # a client of a running server: test_web_browser.py
    ],
)
def test_python_runs(page, workplace):
    names = prelude(page)
    for block in blocks(page, "python"):
        exec(block.replace("TrainConfig(", "TrainConfig(max_train_steps=2, num_inference_steps=1, "), names)  # noqa: S102 - our own pages


# ---------------------------------------------------------------- what pages point at


def anchors(page):
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", of_pages(lambda page: True))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name} points at {target}"
        assert not anchor or anchor in anchors(place), f"{page.name} points at {target}"


def test_every_page_is_in_the_index():
    readme = PAGES[0].read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []
    assert len(readme.splitlines()) < 200


def known_flags():
    """All flags of our commands, scripts and page, and those of other programs that pages name."""
    sources = [*ROOT.glob("svfit_dreambooth/web/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("toybox/*.py")]
    (commands,) = _parser()._subparsers._group_actions
    flags = {
        flag for command in commands.choices.values() for action in command._actions for flag in action.option_strings
    }
    for add in (add_subjects, add_fleet):
        add(more := argparse.ArgumentParser())
        flags |= {flag for action in more._actions for flag in action.option_strings}
    flags |= {flag for path in sources for flag in re.findall(r'add_argument\(\s*"(--\w+)"', path.read_text())}
    own = set(OPTION_NAMES) | {f"no_{name}" for name in OPTION_NAMES} | {"config"}
    return flags | {f"--{name}" for name in own} | {"--help", "--num_processes", "--nproc_per_node"}


@pytest.mark.parametrize("page", of_pages(lambda page: True))
def test_flags_that_are_spoken_of_exist(page):
    named = set(re.findall(r"(?<![\w-])--[a-z]\w*", page.read_text(encoding="utf-8")))
    named -= {"--check"}  # of ruff
    named -= {"--head", "--port", "--block", "--num"}  # of Ray
    named -= {"--nodes", "--ntasks", "--exclude", "--gpus", "--cpus", "--signal"}  # of Slurm
    assert named <= known_flags()
