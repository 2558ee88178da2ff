"""Pushing to the hub and loading from it, against a stand-in that is held to the real client's signatures."""

import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock, create_autospec

import pytest
import torch
import yaml
from conftest import tiny_pipeline
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.errors import LocalEntryNotFoundError, LocalTokenNotFoundError
from huggingface_hub.hf_api import ModelInfo
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from svfit_dreambooth import load_adapter, save_adapter
from svfit_dreambooth.adapter import source
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.adapter.source import find_adapter
from svfit_dreambooth.adapter.words import LearnedWord
from svfit_dreambooth.bases.families import find_projections
from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.commands.main import main
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.painting.generate import open_for_adapters
from svfit_dreambooth.sharing import hub
from svfit_dreambooth.sharing.hub import check_login, push_adapter
from svfit_dreambooth.sharing.model_card import model_card
from svfit_dreambooth.training.events import Start
from svfit_dreambooth.training.journal import RunFolder


class Hub:
    """Repositories as folders.  `api` takes only calls that the real client would take."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.private, self.online = folder, {}, True
        self.names = ("create_repo", "model_info", "upload_folder", "hf_hub_download", "snapshot_download", "whoami")
        self.api = Mock(spec_set=self.names)
        for name in self.names:
            held_to_signature = create_autospec(getattr(HfApi(), name), side_effect=getattr(self, name))
            setattr(self.api, name, held_to_signature)

    def was_called(self):
        return any(getattr(self.api, name).called for name in self.names)

    def check_online(self):
        if not self.online:
            raise ConnectionError("no route to the hub")

    def create_repo(self, repo_id, private, exist_ok):
        self.check_online()
        repo_id = repo_id if "/" in repo_id else f"somebody/{repo_id}"
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.private.setdefault(repo_id, private)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def model_info(self, repo_id, revision=None, files_metadata=False):
        self.check_online()
        files = [path for path in (self.folder / repo_id).rglob("*") if path.is_file()]
        names = [
            {"rfilename": str(path.relative_to(self.folder / repo_id)), "size": path.stat().st_size} for path in files
        ]
        return ModelInfo(id=repo_id, private=self.private.get(repo_id, False), siblings=names)

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)

    def hf_hub_download(self, repo_id, filename, revision):
        assert revision in (None, "main")
        return str(self.folder / repo_id / filename)

    def snapshot_download(self, repo_id, revision, allow_patterns, local_files_only):
        assert local_files_only
        if not (self.folder / repo_id).exists():
            raise LocalEntryNotFoundError("nothing of it is in the cache")
        return str(self.folder / repo_id)

    def whoami(self):
        return {"name": "somebody"}


@pytest.fixture
def stub(tmp_path, monkeypatch):
    stub = Hub(tmp_path / "hub")
    for module in (hub, source):
        monkeypatch.setattr(module, "HfApi", lambda: stub.api)
    return stub


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory):
    """An adapter of the tiny pipeline's UNet."""
    weights = {f"unet.{name}": layer.weight for name, (_, _, layer) in find_projections(tiny_pipeline().unet).items()}
    adapter = Adapter(
        shifts={name: torch.full((4,), 0.25) for name in weights},
        base_model="stable-diffusion-v1-5/stable-diffusion-v1-5@main",
        base_fingerprint=fingerprint(weights),
        instance_prompt='a photo of sks "dog": <b>',
        training={"steps": 30, "learning_rate": 0.05, "energy": None},
        title="dog",
    )
    return save_adapter(adapter, tmp_path_factory.mktemp("adapters") / "dog.safetensors")


@pytest.fixture
def run(tmp_path, adapter_file):
    """The folder of a finished run."""
    folder = tmp_path / "my run"
    folder.mkdir()
    shutil.copy(adapter_file, folder)
    told = PngInfo()
    told.add_text("secret", "/home/somebody")
    Image.new("RGB", (8, 8), "red").save(folder / "dog.png", pnginfo=told)
    (folder / "config.yaml").write_text("instance_data_dir: /home/somebody/photos\n")
    figures = {"base": {"subject": 0.25, "prompt": 0.5, "drift": None}, "adapter": {"subject": 0.75, "drift": 0.125}}
    events = [{"event": "step", "step": 1}, {"event": "end", "adapter": "dog.safetensors", "figures": figures}]
    lines = [json.dumps(event) for event in events] + ['{"event": "e']
    (folder / "progress.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def front_matter(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_push_and_load_again(stub, run):
    upload = push_adapter(run, "somebody/my-dog")
    assert upload.private and stub.private == {"somebody/my-dog": True}
    sent = stub.folder / "somebody" / "my-dog"
    assert {path.name for path in sent.iterdir()} == {"README.md", "dog.png", "dog.safetensors"} == set(upload.files)
    assert (sent / "dog.safetensors").read_bytes() == (run / "dog.safetensors").read_bytes()
    assert not any(b"/home/somebody" in path.read_bytes() for path in sent.iterdir())
    assert (sent / "README.md").read_text() == upload.card

    by_file, by_id = tiny_pipeline(), tiny_pipeline()
    load_adapter(by_file, run / "dog.safetensors")
    assert load_adapter(by_id, "somebody/my-dog@main", 1.0) == "dog"
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 7, 24)
    first, second = (pipeline.unet.eval()(*inputs).sample for pipeline in (by_file, by_id))
    assert torch.equal(first, second)
    with pytest.raises(SVFitError, match="dog.safetensors was trained on stable-diffusion-v1-5/"):
        open_for_adapters([("somebody/my-dog", 1.0)])  # found, read, and its base not downloaded unasked


def test_the_card_tells_what_the_run_knows(stub, run, capsys):
    assert main(["push", str(run), "somebody/my-dog", "--dry_run"]) == 0
    head, body = front_matter(capsys.readouterr().out.partition("somebody/my-dog: would be")[0])
    assert not stub.was_called() and not stub.folder.exists()
    assert head["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert head["license"] == "creativeml-openrail-m" and head["instance_prompt"] == 'a photo of sks "dog": <b>'
    assert head["widget"] == [{"text": head["instance_prompt"], "output": {"url": "dog.png"}}]
    assert "![Pictures of dog](dog.png)" in body and 'load_adapter(pipeline, "somebody/my-dog")' in body
    assert "128 singular values" in body and "| learning rate | 0.05 |" in body and "energy" not in body
    assert "| base | 0.250 | 0.500 | - |" in body and "| adapter | 0.750 | - | 0.125 |" in body
    assert "person's consent" in body and 'revision="main"' in body
    snippet = body.split("```python\n")[1].split("```")[0]
    compile(snippet, "README.md", "exec")


def test_the_card_of_an_unknown_base_makes_no_claims(run):
    adapter = Adapter({"unet.a.to_q": torch.ones(3)}, base_model="my-base", base_fingerprint={})
    head, body = front_matter(model_card(adapter, title="x", file_name="x", file_bytes=1, repository="a/b"))
    assert head["license"] == "other" and "base_model" not in head and "widget" not in head
    assert "shares its licence" in body and "Figures" not in body
    head, _ = front_matter(model_card(adapter, title="x", file_name="x", file_bytes=1, repository="a/b", licence="mit"))
    assert head["license"] == "mit"
    adapter.base_model = DEFAULT_BASE
    head, body = front_matter(model_card(adapter, title="x", file_name="x", file_bytes=1, repository="a/b"))
    assert head["license"] == "apache-2.0" and "base_model" not in head and "open_base_model().pipeline" in body


def test_the_card_says_what_the_file_says():
    adapter = Adapter({"unet.a.to_q": torch.ones(3)}, base_model=DEFAULT_BASE, base_fingerprint={})
    adapter.metadata |= {"modelspec.license": "CC BY 4.0", "modelspec.author": "Ann *Other*"}
    adapter.learned_words = [LearnedWord("sks", {"text_encoder": ["sks"]}, {"text_encoder": torch.ones(1, 24)})]
    head, body = front_matter(model_card(adapter, title="x", file_name="x", file_bytes=1, repository="a/b"))
    assert head["license"] == "other" and head["license_name"] == "CC BY 4.0"
    assert "Licence: `CC BY 4.0`.  The licence of the base model holds" in body and "Author: Ann \\*Other" in body
    assert "only 3 singular values of its weights and the embedding of a word were trained" in body
    assert "| learned words | sks |" in body
    adapter.metadata = {"combined_from": "[]"}
    assert "the sum of what other adapters change" in model_card(
        adapter, title="x", file_name="x", file_bytes=1, repository="a/b"
    )
    adapter.training = {"imported_from": "SVDiff"}
    assert "brought over from SVDiff" in model_card(adapter, title="x", file_name="x", file_bytes=1, repository="a/b")


def test_a_private_adapter_is_not_sent_to_a_public_repository(stub, run):
    stub.create_repo("somebody/seen", private=False, exist_ok=True)
    with pytest.raises(SVFitError, match="somebody/seen exists already and everybody can see it"):
        push_adapter(run, "somebody/seen")
    assert not list((stub.folder / "somebody" / "seen").iterdir())
    upload = push_adapter(run / "dog.safetensors", "somebody/seen", private=False, pictures=False)
    assert not upload.private and set(upload.files) == {"README.md", "dog.safetensors"}


def test_the_command(stub, run, capsys):
    assert main(["push", str(run), "--dry_run"]) == 0
    assert "# dog" in capsys.readouterr().out and not stub.folder.exists()
    assert main(["push", str(run)]) == 0
    text = capsys.readouterr().out
    assert "https://huggingface.co/somebody/dog: is seen by only you" in text and "training photos" in text
    assert 'load_adapter(pipeline, "somebody/dog")' in (stub.folder / "somebody" / "dog" / "README.md").read_text()
    assert main(["push", str(run / "nothing")]) == 2
    assert "is neither the folder of a run nor an adapter file" in capsys.readouterr().err


def test_a_run_is_pushed_by_what_it_noted_whatever_lies_beside(stub, run, capsys):
    shutil.copy(run / "dog.safetensors", run / "older.safetensors")
    RunFolder(run).note(Start(adapter_name="dog"))
    assert main(["push", str(run), "--dry_run"]) == 0
    assert "  dog.safetensors, " in capsys.readouterr().out


def test_a_folder_must_hold_one_adapter(stub, run):
    shutil.copy(run / "dog.safetensors", run / "other.safetensors")
    with pytest.raises(SVFitError, match=r"holds several adapters, dog.safetensors, other.safetensors: name the file"):
        push_adapter(run)
    with pytest.raises(SVFitError, match="holds no adapter"):
        push_adapter(stub.folder.parent)


def test_what_was_made_of_an_adapter_may_lie_beside_it(stub, run):
    """As after a training with `also`: a LoRA, and the leavings of a killed run."""
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 2)}, run / "dog-kohya.safetensors")
    shutil.copy(run / "dog.safetensors", run / ".dog.new.safetensors")
    (run / "broken.safetensors").write_bytes(b"x" * 100)
    assert set(push_adapter(run, "somebody/my-dog").files) == {"README.md", "dog.png", "dog.safetensors"}


def test_figures_of_another_run_are_left_out(stub, run, capsys):
    os.rename(run / "dog.safetensors", run / "cat.safetensors")
    assert main(["push", str(run), "--dry_run"]) == 0
    assert "## Training" in (out := capsys.readouterr().out) and "## Figures" not in out


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "has no safetensors file"),
        ({"a.safetensors": 10, "b.safetensors": 10}, "several safetensors files, a.safetensors, b.safetensors"),
        ({"sub/a.safetensors": 10, "model.bin": 5}, "has no safetensors file"),
        ({"model.safetensors": 100_000_001}, "has 100 MB: an SVFit adapter is far smaller"),
    ],
)
def test_other_repositories_are_refused_before_anything_is_downloaded(stub, files, sentence):
    stub.create_repo("somebody/model", private=True, exist_ok=True)
    for name, size in files.items():
        path = stub.folder / "somebody" / "model" / name
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(size)
    with pytest.raises(SVFitError, match=sentence):
        find_adapter("somebody/model")
    stub.api.hf_hub_download.assert_not_called()


def test_without_the_hub_the_last_download_serves(stub, run, caplog):
    push_adapter(run, "somebody/my-dog")
    stub.online = False
    assert find_adapter("somebody/my-dog") == stub.folder / "somebody" / "my-dog" / "dog.safetensors"
    assert "the hub does not answer" in caplog.text
    with pytest.raises(
        SVFitError, match="cat is no file on this disk, and the repository of that name cannot be opened: its files are"
    ):
        find_adapter("somebody/cat")
    with pytest.raises(SVFitError, match="no route to the hub"):
        push_adapter(run, "somebody/my-dog")


def test_the_real_client_offline(tmp_path, monkeypatch):
    """Its cache as a download leaves it, and HF_HUB_OFFLINE=1, which conftest sets."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--somebody--dog"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    file = folder / "snapshots" / ("0" * 40) / "dog.safetensors"
    file.touch()
    assert find_adapter("somebody/dog") == file
    with pytest.raises(
        SVFitError, match="that name cannot be opened: its files are not on this disk, .* HF_HUB_OFFLINE forbids"
    ):
        find_adapter("somebody/cat")


def test_files_on_this_disk_come_first_and_paths_are_no_ids(stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/dog").touch()
    for name in ("runs/dog", "runs/cat.safetensors", "./runs/cat", "/runs/cat", "a/b/c", "../cat", "cat"):
        assert find_adapter(name) == Path(name)
    assert not stub.was_called()


def test_login(stub):
    assert check_login() == "somebody"
    stub.api.whoami.side_effect = LocalTokenNotFoundError("no token")
    with pytest.raises(SVFitError, match="nobody is logged in"):
        check_login()
    stub.api.whoami.side_effect = ConnectionError("down")
    with pytest.raises(SVFitError, match=r"the hub cannot be reached \(down\)"):
        check_login()
