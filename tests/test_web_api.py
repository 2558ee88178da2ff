"""The page's endpoints, through Gradio's own client, and how the page is opened to others."""

import errno
import json
import shutil
import socket
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed")

from web_stand_ins import until

from svfit_dreambooth import TrainConfig, read_adapter, save_adapter, train
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web import page as web
from svfit_dreambooth.web.door import Hosts
from svfit_dreambooth.web.rooms.studio import AS_TRAINED, STRIP
from svfit_dreambooth.web.rooms.workspace import Workspace
from svfit_dreambooth.web.tabs.painting import STRENGTHS, Painter

SIZE = {"num_inference_steps": 2, "width": 16, "height": 16}


@pytest.fixture(scope="module")
def adapter_path(tiny_base, photo_folder, tmp_path_factory):
    config = TrainConfig(
        pretrained_model_name_or_path=str(tiny_base), instance_data_dir=str(photo_folder), resolution=16,
        instance_prompt="a photo of sks dog", max_train_steps=2, learning_rate=0.5, fixed_loss_examples=0,
        final_pictures=False, adapter_name="dog", output_dir=str(tmp_path_factory.mktemp("run")),
    )  # fmt: skip
    return train(config).adapter_path


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    """A page in this process, and a client of it."""
    from gradio_client import Client

    patch = pytest.MonkeyPatch()
    workspace = Workspace(tmp_path_factory.mktemp("home"))
    patch.setenv("GRADIO_TEMP_DIR", str(workspace.served))
    page, app = web.build_page(workspace, (), (str(tiny_base),))
    workspace.served.mkdir(parents=True)
    url = web.launch(page, workspace, Hosts(), quiet=True, share=False)
    client = Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))
    yield client, app, url
    client.close()
    page.close()
    patch.undo()


def test_import_paint_download(served, adapter_path, tiny_base):
    from gradio_client import handle_file

    client, _, _ = served
    assert client.predict(handle_file(adapter_path), api_name="/import_adapter") == "dog"
    (entry,) = client.predict(api_name="/list_adapters")
    assert entry["instance_prompt"] == "a photo of sks dog" and entry["bytes"] == adapter_path.stat().st_size
    assert Path(client.predict("dog", api_name="/download_adapter")).read_bytes() == adapter_path.read_bytes()
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
    ],
)
def test_mistakes_and_tricks_end_in_a_sentence(served, endpoint, arguments, sentence):
    with pytest.raises(Exception, match=sentence):
        served[0].predict(*arguments, api_name=endpoint)


def test_only_endpoints_with_names_are_shown(served):
    shown = served[0].view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(shown) == {
        "/generate", "/list_adapters", "/import_adapter", "/download_adapter", "/train", "/run_state", "/stop_run",
        "/resume_run", "/stop_painting",
    }  # fmt: skip


def gr_skip():
    import gradio as gr

    return gr.skip()


class Request:
    """What a handler sees of a browser."""

    username, session_hash, client = None, "a session", None

    def __init__(self, word):
        self.cookies = {"svfit_visitor": word}


def test_a_strip_over_strengths_and_its_settings_taken_up(served, adapter_path, tiny_base):
    _, app, _ = served
    painting, mine, theirs = Painter(app), Request("a" * 32), Request("b" * 32)
    visitor = app.visitor(mine)
    visitor.uploads.mkdir(parents=True)
    shutil.copy(adapter_path, visitor.uploads / "own.safetensors")
    form = ["a photo of sks dog", "", tiny_base.name, ["upload/own"], 1, 2, "", 5, False, "16", "16", STRENGTHS, False]
    *_, last_gallery, _ = [step for step in painting.generate(mine, *form, 1.0) if isinstance(step[1], list)] + [None]
    captions = [caption for _, caption in last_gallery[1]]
    assert captions[0] == "base · seed 5" and captions[-1] == "own 1.5 · seed 5" and len(captions) == len(STRIP)
    name = last_gallery[2][-1]
    taken = painting.reuse(name, mine)
    assert (taken[0], taken[6], taken[-1]) == ("a photo of sks dog", 5, {"upload/own": 1.5})
    import gradio as gr

    with pytest.raises(gr.Error, match="not there any more"):
        painting.reuse(name, theirs)
    with pytest.raises(gr.Error, match="no adapter called"):
        list(painting.generate(theirs, *form, 1.0))


def test_base_and_unusual_numbers_of_a_picture_are_taken_up(served, adapter_path, tiny_base, monkeypatch):
    import gradio as gr

    from svfit_dreambooth.web.rooms import library
    from svfit_dreambooth.web.tabs.generate import _strength
    from svfit_dreambooth.web.tabs.reuse import take_up

    _, app, _ = served
    visitor, warned = app.visitor(Request("a" * 32)), []
    monkeypatch.setattr(gr, "Warning", warned.append)
    library.add(visitor.uploads, adapter_path, name="taken-up")
    settings = {
        "prompt": "a dog", "negative_prompt": "", "num_inference_steps": 200, "guidance_scale": 7.5, "seed": 3,
        "width": 16, "height": 16,
    }  # fmt: skip
    for base, adapters, shown, missing in (
        (tiny_base.name, {"taken-up": 2.5}, AS_TRAINED, ""),
        (tiny_base.name, {}, tiny_base.name, ""),
        ("toybox", {"taken-up": 1.0}, "toybox", ""),
        ("toybox", {}, AS_TRAINED, ""),
        ("owner/name", {"taken-up": 1.0}, AS_TRAINED, "not here any more: the base owner/name."),
        ("gone", {"lost": 1.0}, AS_TRAINED, "not here any more: the adapter lost, the base gone."),
    ):
        taken = take_up(app, visitor, {**settings, "base_model": base, "adapters": adapters})
        assert taken[2].value == shown and "".join(warned).startswith(missing) and bool(warned) == bool(missing)
        warned.clear()
    for strength, bounds in ((2.5, (0, 2.5)), (-1, (-1, 1.5)), (1, (0, 1.5))):
        slider = _strength("dog", "", strength, "dog")
        assert (slider.minimum, slider.maximum) == bounds
    page = served[0].config["components"]
    assert [part["props"]["maximum"] for part in page if part["props"].get("elem_id") == "steps"] == [200]


@pytest.fixture
def public(tmp_path, tiny_base, monkeypatch):
    """What stands behind a page for strangers, which downloads nothing."""
    workspace = Workspace(tmp_path / "public", shared=False)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(workspace.served))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    _, app = web.build_page(workspace, (), (str(tiny_base),), download=False)
    return app


def test_adapters_of_the_command_line_are_for_all_but_theirs_to_paint_with_alone(
    tmp_path, tiny_base, adapter_path, monkeypatch
):
    import gradio as gr

    from svfit_dreambooth.web.api import Endpoints
    from svfit_dreambooth.web.rooms import library
    from svfit_dreambooth.web.tabs.library import Shelf

    workspace = Workspace(tmp_path / "home", shared=False)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(workspace.served))
    library.add(workspace.folder / "adapters", adapter_path, name="private")
    offered = shutil.copy(adapter_path, tmp_path / "mug.safetensors")
    read = read_adapter(offered)
    read.title = "another file than the private one"
    _, app = web.build_page(workspace, (save_adapter(read, offered),), (str(tiny_base),), download=False)
    request = Request("c" * 32)
    visitor = app.visitor(request)
    assert app.adapter_choices(visitor) == [("mug (offered)", "offered/mug")]
    assert Painter(app).open_page(request)[1].value == ["offered/mug"]
    assert app.adapter_file(visitor, "offered/mug").samefile(workspace.folder / "adapters" / "mug.safetensors")
    *_, painted = Endpoints(app).generate("a dog", {"mug": 1.0}, tiny_base.name, "", 1, 0, 1, 0, 16, 16, request)
    assert painted[0][1].startswith("mug 1")
    assert [entry["name"] for entry in Endpoints(app).list_adapters(request)] == ["mug"]
    for choice in ("offered/private", "library/mug", "library/private"):
        with pytest.raises(SVFitError, match="no adapter called"):
            app.adapter_file(visitor, choice)
    with pytest.raises(gr.Error, match="no adapter called"):
        Shelf(app).delete("mug", 0, request)
    library.add(visitor.library, adapter_path, name="mug")
    assert app.find_adapter(visitor, "mug") == visitor.library / "mug.safetensors"


def test_a_program_trains_on_its_own_photos_and_leaves_those_of_the_page(public, photo_folder):
    from svfit_dreambooth.web.api import Endpoints
    from svfit_dreambooth.web.rooms.laid_out import photo_files
    from svfit_dreambooth.web.tabs.draft import Draft, bundled_subjects

    request, photos = Request("d" * 32), sorted(photo_folder.glob("*.png"))[:2]
    visitor, toy = public.visitor(request), bundled_subjects()[0]
    Draft(public).take_bundled(toy, "", request)
    laid_out = {path.name: path.read_bytes() for path in visitor.photos.iterdir()}
    id = Endpoints(public).train([str(path) for path in photos], "dog", "sks", "dog", "toybox", "fast", 3, request)
    job = public.jobs.find(visitor, id)
    folder = public.workspace.jobs / id / "photos"
    assert job.options["instance_data_dir"] == str(folder)
    for given, taken in zip(photos, photo_files(folder), strict=True):
        assert Image.open(given).tobytes() == Image.open(taken).tobytes()
    assert {path.name: path.read_bytes() for path in visitor.photos.iterdir()} == laid_out
    assert {path.name for path in visitor.folder.iterdir()} == {"photos", "form.json"}


def test_an_adapter_is_said_to_be_left_where_there_is_one(public, photo_folder, adapter_path):
    from svfit_dreambooth.web.rooms import library
    from svfit_dreambooth.web.rooms.job import changing
    from svfit_dreambooth.web.rooms.laid_out import add_photos
    from svfit_dreambooth.web.tabs.draft import Draft
    from svfit_dreambooth.web.tabs.runs import Runs

    request = Request("a" * 32)
    visitor, runs = public.visitor(request), Runs(public, Draft(public))
    add_photos(visitor.photos, sorted(photo_folder.glob("*.png")))
    job = public.jobs.submit(visitor, "dog", {"instance_prompt": "a dog", "pretrained_model_name_or_path": "toybox"})
    assert runs.remove(job.id, request)[-1] == "The run of dog was removed."
    runs.undo(job.id, request)
    library.add(visitor.library, adapter_path)
    with changing(public.jobs.folder / job.id) as now:
        now.library_name, now.library_sha256 = "dog", library.sha256(visitor.library / "dog.safetensors")
    assert runs.remove(job.id, request)[-1] == "The run of dog was removed; its adapter is still in the library."


def test_remarks_go_by_base_and_resolution_and_the_form_comes_back(public, tmp_path):
    from svfit_dreambooth.web.tabs.draft import Draft

    request, draft = Request("e" * 32), Draft(public)
    assert draft.show(request)[4] == gr_skip()
    Image.radial_gradient("L").resize((200, 200)).save(tmp_path / "photo.png")
    *_, (_, _, remarks, _, _) = draft.add([str(tmp_path / "photo.png")], "owner/name", "", request)
    assert "smaller than the resolution of 512, will be enlarged: photo 1 (200x200)" in remarks
    assert not (tmp_path / "photo.png").exists()  # what was uploaded may tell where it was taken
    for base, resolution, warned in (
        ("toybox", "", False), ("", "", False), ("toybox", "256", True), ("owner/name", "192", False),
        ("owner/name", "nonsense", True),
    ):  # fmt: skip
        assert ("will be enlarged" in draft.remark(base, resolution, request)) == warned, (base, resolution)
    assert "will be enlarged" not in draft.show(request)[1]
    draft.remember(request, "my dog", "sks", "dog", "owner/name", "faithful", "300", "nonsense")
    assert draft.show(request)[4:9] == ("my dog", "sks", "dog", "owner/name", "faithful")
    assert draft.show(request)[9:12] == ("300", "nonsense", gr_skip())  # Advanced too, as it was written
    assert "will be enlarged" in draft.show(request)[1]
    draft.take_bundled("dog_patch", "", request)
    assert draft.show(request)[4:9] == ("dog_patch", "sks", "dog", "toybox", "faithful")
    assert draft.show(Request("f" * 32))[4] == gr_skip()


@pytest.mark.parametrize("download", [True, False])
def test_photos_on_toybox_are_told_of_a_base_for_them(tmp_path, photo_folder, monkeypatch, download):
    from svfit_dreambooth.web.rooms.bases import FOR_PHOTOS
    from svfit_dreambooth.web.tabs.draft import Draft

    workspace = Workspace(tmp_path / "home")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(workspace.served))
    _, app = web.build_page(workspace, (), (), download=download)
    request, draft, photo = Request("e" * 32), Draft(app), min(photo_folder.glob("*.png"))
    assert (FOR_PHOTOS in app.studio.bases.for_training()) == download
    assert "trying out" not in draft.take_bundled("dog_patch", "", request)[1]
    draft.clear(request)
    assert draft.remark("toybox", "", request) == ""
    list(draft.add([shutil.copy(photo, tmp_path)], "toybox", "", request))
    said = draft.remark("toybox", "", request)
    assert "toybox is for trying out" in said and (FOR_PHOTOS in said) == download
    assert "trying out" not in draft.remark(FOR_PHOTOS, "", request)


def test_two_tabs_at_once_paint_in_one(public, tiny_base, monkeypatch):
    import gradio as gr

    painting, request = Painter(public), Request("a" * 32)
    form = ["a dog", "", tiny_base.name, [], 1, 1, "", 5, False, "16", "16", "just paint", False]
    first, order = painting.generate(request, *form), Painter._order

    def meanwhile(*arguments):  # the other tab gets that far while this one reads its form
        monkeypatch.setattr(Painter, "_order", order)
        next(first)
        return order(*arguments)

    monkeypatch.setattr(Painter, "_order", meanwhile)
    second = painting.generate(request, *form)
    assert next(second)[7].interactive  # Stop, which the sentence that follows names
    with pytest.raises(gr.Error, match="still being painted"):
        next(second)
    assert painting.open_page(request)[-1].interactive
    assert "1 picture done" in [step[0] for step in first][-1] and public.paintings._working == {}
    assert not painting.open_page(request)[-1].interactive and "Stopping" not in painting.stop(request)[0]


def test_a_page_that_is_reloaded_finds_its_painting_again(public, tiny_base):
    painter, request = Painter(public), Request("a" * 32)
    form = ["a dog", "", tiny_base.name, [], 3, 5, "", 5, False, "16", "16", "just paint", False]
    first = painter.generate(request, *form)
    for step in first:
        if isinstance(step[1], list) and len(step[1]) == 1:
            first.close()  # the page is gone
    assert painter.open_page(request)[-1].interactive
    followed = list(painter.follow(request))
    assert "3 pictures done" in followed[-1][0] and len(followed[-1][2]) == 3
    for other in (request, Request("b" * 32)):
        assert list(painter.follow(other)) == [(gr_skip(),) * 12]  # nothing is emptied


def test_the_form_that_paints_comes_back_to_its_visitor(public):
    painter, request = Painter(public), Request("a" * 32)
    form = ("a sks dog\non the beach", "rain", 3, 12, "7.5", 5, False, "64", "")
    painter.remember(request, *form)
    assert painter.open_page(request)[4] == form[0] and painter.recall(request) == form[1:]
    other = Request("b" * 32)
    assert painter.open_page(other)[4] == "" and set(map(str, painter.recall(other))) == {str(gr_skip())}
    (public.visitor(request).folder / "form.json").write_text("[" * 100_000)
    assert painter.open_page(request)[4] == ""


def test_ticks_never_choose_a_run(public, photo_folder):
    from svfit_dreambooth.web.rooms.laid_out import add_photos
    from svfit_dreambooth.web.tabs.draft import Draft
    from svfit_dreambooth.web.tabs.form import ADVANCED
    from svfit_dreambooth.web.tabs.runs import Runs

    request, draft = Request("a" * 32), Draft(public)
    runs, visitor = Runs(public, draft), public.visitor(request)
    add_photos(visitor.photos, sorted(photo_folder.glob("*.png")))
    form = ["sks", "dog", "toybox", "fast", *[None] * len(ADVANCED)]
    first = runs.submit(request, "first", *form)
    second = runs.submit(request, "second", *form)
    assert first[0].value != second[0].value and "second" in second[2]
    old = runs.tick(first[0].value, None, request)  # was under way when Start was pressed
    assert "value" not in old[0].constructor_args and "first" in old[2]
    new = runs.tick(second[0].value, old[1], request)  # the next one repairs what that showed
    assert new[0] == gr_skip() and "second" in new[2]
    assert "Choose a run" in runs.tick(None, None, request)[2] and "Choose a run" in runs.tick("gone", None, request)[2]
    assert runs.open_page(first[0].value, request)[0].value == first[0].value  # the person was faster
    assert runs.open_page(None, request)[0].value == runs.open_page("gone", request)[0].value == second[0].value
    assert runs.submit(request, "second", *form)[0].value == second[0].value and len(public.jobs.listed(visitor)) == 2
    assert runs.remove(second[0].value, request)[0].value == first[0].value


def test_painting_from_a_program_is_stopped(served, tiny_base):
    client, app, _ = served
    options = {"base": tiny_base.name, "num_images": 64, "num_inference_steps": 200, "width": 16, "height": 16}
    for stop in (lambda job: client.predict(api_name="/stop_painting"), lambda job: job.cancel()):
        job = client.submit("a dog", {}, api_name="/generate", **options)
        until(lambda job=job: job.outputs())
        assert not app.studio.line.is_free
        stop(job)
        until(lambda: app.studio.line.is_free)
    assert client.predict(api_name="/stop_painting") == 0


def test_a_full_disk_leaves_the_buttons_usable(public, tiny_base, monkeypatch):
    import gradio as gr

    from svfit_dreambooth.web.rooms import pictures

    def keep(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures, "keep", keep)
    form, told = ["a dog", "", tiny_base.name, [], 1, 1, "", 5, False, "16", "16", "just paint", False], []
    painting = Painter(public)
    with pytest.raises(gr.Error, match="No space left on device"):
        told.extend(painting.generate(Request("a" * 32), *form))
    assert (told[-1][6].interactive, told[-1][7].interactive) == (True, False) and public.paintings._working == {}


def test_no_way_of_training_downloads_for_a_stranger(public, photo_folder, monkeypatch):
    import gradio as gr

    from svfit_dreambooth.web.api import Endpoints
    from svfit_dreambooth.web.rooms.laid_out import add_photos
    from svfit_dreambooth.web.tabs.draft import Draft
    from svfit_dreambooth.web.tabs.form import ADVANCED
    from svfit_dreambooth.web.tabs.runs import Runs

    request, photos = Request("a" * 32), sorted(photo_folder.glob("*.png"))
    draft, visitor = Draft(public), public.visitor(request)
    add_photos(visitor.photos, photos)
    form = ["sks", "dog", "stranger/model", "fast", *[None] * len(ADVANCED)]
    for call in (
        lambda: Runs(public, draft).submit(request, "dog", *form),
        lambda: Runs(public, draft).estimate(request, *form),
        lambda: Endpoints(public).train(photos, "dog", "sks", "dog", "stranger/model", "fast", 0, request),
    ):
        with pytest.raises(gr.Error, match="stranger/model is not on this disk, and downloads are off here"):
            call()
    monkeypatch.setattr("svfit_dreambooth.training.plan.prepare", lambda *a, **k: pytest.fail("opened"))
    options = {"pretrained_model_name_or_path": "stranger/model", "instance_prompt": "a photo of sks dog"}
    said = draft.estimate(visitor, options)[0]
    assert said == "memory: told when stranger/model is on this disk; a run downloads it first"


def test_what_a_run_takes_is_told_without_opening_the_base_here(public, photo_folder, tiny_base, monkeypatch):
    import gradio as gr

    from svfit_dreambooth.web.rooms.laid_out import add_photos
    from svfit_dreambooth.web.tabs.draft import Draft
    from svfit_dreambooth.web.tabs.form import ADVANCED
    from svfit_dreambooth.web.tabs.runs import Runs

    request = Request("a" * 32)
    runs, visitor = Runs(public, Draft(public)), public.visitor(Request("a" * 32))
    add_photos(visitor.photos, sorted(photo_folder.glob("*.png")))
    monkeypatch.setattr("svfit_dreambooth.bases.opening.open_base_model", lambda *a, **k: pytest.fail("opened here"))

    def form(**changes):
        return ["sks", "dog", tiny_base.name, "fast", *(changes.get(name) for name in ADVANCED)]

    said = runs.estimate(request, *form(resolution="16"))
    assert "memory: about" in said and "time: told after the first steps" in said
    with pytest.raises(gr.Error, match="“Resolution”"):
        runs.estimate(request, *form(resolution="17"))
    for field, value, sentence in (
        ("learning_rate", "fast", "“Learning rate” is &#x27;fast&#x27;: write a number"),
        ("max_train_steps", "0", "“Steps”"),
        ("rank", "many", "“Rank”"),
        ("train_batch_size", "-1", "“Batch”"),
    ):
        for act in (lambda f: runs.estimate(request, *f), lambda f: runs.submit(request, "dog", *f)):
            with pytest.raises(gr.Error, match=sentence):
                act(form(**{field: value}))
    assert public.jobs.listed(visitor) == []


def test_lora_of_a_library_adapter(served, adapter_path, tiny_base, monkeypatch):
    from svfit_dreambooth.web.rooms import library
    from svfit_dreambooth.web.tabs.export import LAYOUTS, LoraMaker

    _, app, _ = served
    visitor = app.visitor(Request("a" * 32))
    library.add(visitor.library, adapter_path, name="for-lora")
    layout = next(name for name, value in LAYOUTS.items() if value == "diffusers")
    maker = LoraMaker(app)
    said, _ = maker.plan("for-lora", layout, "", Request("a" * 32))
    assert "LoRA" in said or "rank" in said
    said, button = maker.make("for-lora", layout, "", False, Request("a" * 32))
    assert "compared with the adapter" in said and Path(button.value["path"]).stat().st_size > 1000


def test_what_the_page_cannot_do_alone_it_offers(served, tiny_base, photo_folder, tmp_path):
    import gradio as gr

    from svfit_dreambooth.web.rooms import library
    from svfit_dreambooth.web.tabs.export import LAYOUTS, LoraMaker
    from svfit_dreambooth.web.tabs.library import Shelf

    _, app, _ = served
    request, folder = Request("a" * 32), app.visitor(Request("a" * 32)).library
    for name, options in (("word", {"learned_word": "sks"}), ("keys", {"target_modules": ["to_k"]})):
        config = TrainConfig(
            pretrained_model_name_or_path=str(tiny_base), instance_data_dir=str(photo_folder), resolution=16,
            instance_prompt="a photo of sks dog", max_train_steps=1, fixed_loss_examples=0, final_pictures=False,
            adapter_name=name, output_dir=str(tmp_path / name), **options,
        )  # fmt: skip
        library.add(folder, train(config).adapter_path)
    layout = next(iter(LAYOUTS))
    with pytest.raises(gr.Error, match="^'word has learned the word sks, .* tick “Leave out learned words”"):
        LoraMaker(app).make("word", layout, "", False, request)
    assert "compared with the adapter" in LoraMaker(app).make("word", layout, "", True, request)[0]
    assert Shelf(app).combine(["word", "keys"], "", "of different layers", 0, request) == 1
    assert app.studio.line.is_free
    both = read_adapter(folder / "of-different-layers.safetensors")
    assert set(both.shifts) == set(read_adapter(folder / "word.safetensors").shifts)


def test_adapters_are_added_into_one(served, adapter_path):
    from svfit_dreambooth.web.rooms import library
    from svfit_dreambooth.web.tabs.library import Shelf

    _, app, _ = served
    request = Request("a" * 32)
    folder = app.visitor(request).library
    for name in ("one", "two"):
        library.add(folder, adapter_path, name=name)
    assert Shelf(app).combine(["one", "two"], "0.5 0.25", "both", 3, request) == 4
    shifts, sums = read_adapter(adapter_path).shifts, read_adapter(folder / "both.safetensors").shifts
    assert all(abs(sums[name] - 0.75 * shift).max() < 2e-3 for name, shift in shifts.items())


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.*see whether the disk is full"),
        (MemoryError(), "the memory is full"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "the memory is full"),
        (ZeroDivisionError("secret"), r"nobody foresaw \(ZeroDivisionError\)"),
        (SVFitError("say <b>dog</b>."), "say &lt;b&gt;dog&lt;/b&gt;."),
    ],
)
def test_whatever_goes_wrong_is_said_in_words(error, sentence, capsys):
    import gradio as gr

    from svfit_dreambooth.web.tabs.mistakes import plainly

    def handler():
        raise error

    def generator():
        yield 1
        raise error

    for call in (plainly(handler), lambda: list(plainly(generator)())):
        with pytest.raises(gr.Error, match=sentence):
            call()


def test_a_port_that_is_taken_is_told(tmp_path, monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(web, "WARM_UP_AFTER", 10_000)
        monkeypatch.setattr("svfit_dreambooth.web.rooms.queue.Queue.start", lambda self: None)
        monkeypatch.setenv("GRADIO_TEMP_DIR", "")
        assert web.main(["--data_dir", str(tmp_path), "--port", str(port)]) == 2
    assert f"cannot be opened at 127.0.0.1, port {port}: choose another" in capsys.readouterr().err


def test_the_page_is_open_to_nobody_else_unless_told(tmp_path, monkeypatch, capsys):
    import gradio as gr

    launched = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: launched.update(options) or (None, "", None))
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda self: None)
    monkeypatch.setattr(web, "WARM_UP_AFTER", 10_000)
    monkeypatch.setattr("svfit_dreambooth.web.rooms.queue.Queue.start", lambda self: None)
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    assert web.main(["--data_dir", str(tmp_path)]) == 0
    assert (launched["server_name"], launched["share"], launched["allowed_paths"]) == ("127.0.0.1", False, [])
    assert capsys.readouterr().err == ""
    assert web.main(["--data_dir", str(tmp_path), "--listen"]) == 0
    assert launched["server_name"] == "0.0.0.0" and "add --auth NAME:PASSWORD" in capsys.readouterr().err
    assert web.main(["--data_dir", str(tmp_path), "--listen", "--auth", "me:word"]) == 0
    assert launched["auth"] == [("me", "word")] and capsys.readouterr().err == ""
    assert web.main(["--auth", "me"]) == 2
    assert "--auth reads NAME:PASSWORD" in capsys.readouterr().err
