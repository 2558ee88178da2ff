"""The page's endpoints: through Gradio's own client, and for strangers."""

import json
import shutil
from pathlib import Path

import httpx
import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="gradio is not installed")

from web_stand_ins import Request, empty_library, until

from svfit_dreambooth import read_adapter, save_adapter
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web import page as web
from svfit_dreambooth.web.api import Endpoints
from svfit_dreambooth.web.door import Hosts
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms.laid_out import photo_files
from svfit_dreambooth.web.rooms.workspace import Workspace
from svfit_dreambooth.web.tabs.draft import Draft, bundled_subjects
from svfit_dreambooth.web.tabs.library import Shelf
from svfit_dreambooth.web.tabs.painting import Painter

SIZE = {"num_inference_steps": 2, "width": 16, "height": 16}


@pytest.fixture(scope="module")
def address(tiny_base, tmp_path_factory):
    """Where a page in this process listens, and what is behind it."""

    patch = pytest.MonkeyPatch()
    workspace = Workspace(tmp_path_factory.mktemp("home"))
    patch.setenv("GRADIO_TEMP_DIR", str(workspace.served))
    page, app = web.build_page(workspace, (), (str(tiny_base),))
    workspace.served.mkdir(parents=True)
    url = web.launch(page, workspace, Hosts(), quiet=True, share=False)
    yield url, app
    page.close()
    patch.undo()


@pytest.fixture
def served(address, tmp_path):
    """A client of the page, whose library begins empty for every test, and what is behind the page."""
    from gradio_client import Client

    url, app = address
    empty_library(app.workspace)
    client = Client(url, verbose=False, httpx_kwargs={"timeout": 120}, download_files=str(tmp_path / "downloads"))
    yield client, app
    client.close()


def test_a_program_asks_for_all_that_the_page_offers(served, dog_adapter, tiny_base, photo_folder):
    from gradio_client import handle_file

    client, app = served
    shutil.copytree(tiny_base / "vae", app.workspace.models / "better")
    client.predict(handle_file(dog_adapter), api_name="/import_adapter")
    wishes = {"clip_skip": "1", "pretrained_vae_model_name_or_path": "better", "trained_on": tiny_base.name}
    wishes["guidance_rescale"] = "0.7"
    (picture,) = client.predict("a dog", {"dog": 1.0}, tiny_base.name, api_name="/generate", **wishes, **SIZE)
    settings = json.loads(Image.open(picture["image"]).text["svfit"])
    assert (settings["clip_skip"], settings["vae"], settings["trained_on"]) == (1, "better", tiny_base.name)
    assert settings["guidance_rescale"] == 0.7

    photos = [handle_file(path) for path in sorted(photo_folder.glob("*.png"))[:1]]

    def train(**options):
        return client.predict(photos, "dog", "sks", "dog", tiny_base.name, "fast", 3, options, api_name="/train")

    id = train(clip_skip=1, pretrained_vae_model_name_or_path="better", learning_rate=1e-3, random_flip=True, rank=8)
    job = next(job for job in app.jobs.all() if job.id == id)
    assert {name: job.options.get(name) for name in ("clip_skip", "learning_rate", "random_flip", "rank")} == {
        "clip_skip": 1, "learning_rate": 1e-3, "random_flip": True, "rank": "8",
    }  # fmt: skip
    assert job.options["pretrained_vae_model_name_or_path"] == str(app.workspace.models / "better")
    for options, sentence in (
        ({"output_dir": "/etc"}, "there is no option called 'output_dir' here: use max_train_steps"),
        ({"clip_skip": "much"}, "clip_skip is 'much': it must be a number"),
        ({"clip_skip": 7}, "clip_skip is 7: of the layers"),
        ({"quantize": "int3"}, "quantize is 'int3': use one of int8, fp8, nf4"),
        ({"rank": ["8"]}, r"rank is \['8'\]: write a text"),
        ({"pretrained_vae_model_name_or_path": "/etc"}, "'/etc' is no base model that is offered here"),
    ):
        with pytest.raises(Exception, match=sentence):
            train(**options)


def test_import_paint_download(served, dog_adapter, tiny_base):
    from gradio_client import handle_file

    client, _ = served
    assert client.predict(handle_file(dog_adapter), api_name="/import_adapter") == "dog"
    (entry,) = client.predict(api_name="/list_adapters")
    assert entry["instance_prompt"] == "a photo of sks dog" and entry["bytes"] == dog_adapter.stat().st_size
    assert Path(client.predict("dog", api_name="/download_adapter")).read_bytes() == dog_adapter.read_bytes()
    options = {"base": tiny_base.name, "seed": 7, "num_images": 2, **SIZE}
    pictures = client.predict("a photo of sks dog", {"dog": 0.5}, api_name="/generate", **options)
    settings = [json.loads(Image.open(picture["image"]).text["svfit"]) for picture in pictures]
    assert [one["seed"] for one in settings] == [7, 8]
    assert all(one["adapters"] == {"dog": 0.5} for one in settings)
    assert pictures[0]["caption"] == "dog 0.5 · seed 7"


@pytest.mark.parametrize(
    ("endpoint", "arguments", "sentence"),
    [
        ("/download_adapter", ("../../secret",), "no adapter called"),
        ("/generate", ("a dog", {"../dog": 1.0}), "no adapter called"),
        ("/generate", ("a dog", {}, "/etc"), "no base model that is offered here"),
        ("/generate", ("a dog", {}, "toybox", "", 1000), "number of pictures is 1000"),
        ("/run_state", ("../../etc",), "no such run"),
        ("/download_adapter", ("<b>'x'",), "no adapter called \"<b>'x'\""),  # plain text, not markup
        ("/generate", ("a dog", ["dog"]), r"adapters is \['dog'\]: write"),
        ("/generate", ("a dog", {"dog": "much"}), "strength of 'dog' is 'much': it must be a number"),
        ("/generate", ("a dog", {}, "toybox", "", 1.5), "num_images is 1.5: it must be a whole number"),
        ("/generate", ("d" * 5000,), "the prompt has 5,000 characters"),
        (
            "/generate",
            ("a dog", {}, "toybox", "", 1, 0, 1, 0, 0, 0, "fast"),
            "scheduler is 'fast': use one of ddim, euler",
        ),
        ("/generate", {"prompt": "a dog", "clip_skip": "much"}, "clip_skip is 'much': it must be a number"),
        ("/generate", {"prompt": "a dog", "clip_skip": "9"}, "clip_skip is 9: of the layers"),
        ("/generate", {"prompt": "a dog", "quantize": "int3"}, "quantize is 'int3': use one of int8"),
        ("/generate", {"prompt": "a dog", "trained_on": "/etc"}, "'/etc' is no base model that is offered here"),
        (
            "/generate",
            {"prompt": "a dog", "pretrained_vae_model_name_or_path": "../x"},
            "'../x' is no base model that is",
        ),
    ],
)
def test_mistakes_and_tricks_end_in_a_sentence(served, dog_adapter, endpoint, arguments, sentence):
    library.add(served[1].visitor(Request("f" * 32)).library, dog_adapter)
    with pytest.raises(Exception, match=sentence):
        if isinstance(arguments, dict):
            served[0].predict(**arguments, api_name=endpoint)
        served[0].predict(*arguments, api_name=endpoint)


def test_the_server_fetches_nothing_for_a_client(served):
    """Neither a file that is given by its address, nor one that is asked for by its address."""
    client, _ = served
    for host in ("example.org", "huggingface.co"):  # which Gradio lets through without a look
        file = {"path": f"https://{host}/dog.safetensors", "meta": {"_type": "gradio.FileData"}}
        with pytest.raises(Exception, match=f"'https://{host}/dog.safetensors' is not fetched here: upload the file"):
            client.predict(file, api_name="/import_adapter")
    answer = httpx.get(f"{client.src}gradio_api/file=https://example.org/dog.png")
    assert answer.status_code == 403 and "example.org" in answer.text


def test_only_endpoints_with_names_are_shown(served):
    shown = served[0].view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(shown) == {
        "/generate", "/list_adapters", "/import_adapter", "/download_adapter", "/train", "/run_state", "/stop_run",
        "/resume_run", "/stop_painting",
    }  # fmt: skip


def test_adapters_of_the_command_line_are_for_all_but_theirs_to_paint_with_alone(
    tmp_path, tiny_base, dog_adapter, monkeypatch
):
    workspace = Workspace(tmp_path / "home", shared=False)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(workspace.served))
    library.add(workspace.folder / "adapters", dog_adapter, name="private")
    offered = shutil.copy(dog_adapter, tmp_path / "mug.safetensors")
    read = read_adapter(offered)
    read.title = "another file than the private one"
    _, app = web.build_page(workspace, (save_adapter(read, offered),), (str(tiny_base),), download=False)
    request = Request("c" * 32)
    visitor = app.visitor(request)
    assert app.adapter_choices(visitor) == [("mug (offered)", "offered/mug")]
    assert Painter(app).open_page(request)[1].value == ["offered/mug"]
    assert app.adapter_file(visitor, "offered/mug").samefile(workspace.folder / "adapters" / "mug.safetensors")
    *_, painted = Endpoints(app).generate(
        "a dog", {"mug": 1.0}, tiny_base.name, "", 1, 0, 1, 0, 16, 16, "", "", "", "", "", "", request
    )
    assert painted[0][1].startswith("mug 1")
    assert [entry["name"] for entry in Endpoints(app).list_adapters(request)] == ["mug"]
    for choice in ("offered/private", "library/mug", "library/private"):
        with pytest.raises(SVFitError, match="no adapter called"):
            app.adapter_file(visitor, choice)
    with pytest.raises(gr.Error, match="no adapter called"):
        Shelf(app).delete("mug", 0, request)
    library.add(visitor.library, dog_adapter, name="mug")
    assert app.find_adapter(visitor, "mug") == visitor.library / "mug.safetensors"


def test_a_program_trains_on_its_own_photos_and_leaves_those_of_the_page(public, photo_folder):
    request, photos = Request("d" * 32), sorted(photo_folder.glob("*.png"))[:2]
    visitor, toy = public.visitor(request), bundled_subjects()[0]
    Draft(public).take_bundled(toy, "", request)
    laid_out = {path.name: path.read_bytes() for path in visitor.photos.iterdir()}
    id = Endpoints(public).train([str(path) for path in photos], "dog", "sks", "dog", "toybox", "fast", 3, {}, request)
    job = public.jobs.find(visitor, id)
    folder = public.workspace.jobs / id / "photos"
    assert job.options["instance_data_dir"] == str(folder)
    for given, taken in zip(photos, photo_files(folder), strict=True):
        assert Image.open(given).tobytes() == Image.open(taken).tobytes()
    assert {path.name: path.read_bytes() for path in visitor.photos.iterdir()} == laid_out
    assert {path.name for path in visitor.folder.iterdir()} == {"photos", "form.json"}


def test_painting_from_a_program_is_stopped(served, tiny_base):
    client, app = served
    options = {"base": tiny_base.name, "num_images": 64, "num_inference_steps": 200, "width": 16, "height": 16}
    for stop in (lambda job: client.predict(api_name="/stop_painting"), lambda job: job.cancel()):
        job = client.submit("a dog", {}, api_name="/generate", **options)
        until(lambda job=job: job.outputs())
        assert not app.studio.line.is_free
        stop(job)
        until(lambda: app.studio.line.is_free)
    assert client.predict(api_name="/stop_painting") == 0
