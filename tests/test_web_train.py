"""The tab that trains: photos, words and settings, what is said of them before a run, and the list of runs."""

import shutil

import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="gradio is not installed")

from web_stand_ins import Request

from svfit_dreambooth.web import page as web
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms.bases import FOR_PHOTOS
from svfit_dreambooth.web.rooms.job import changing
from svfit_dreambooth.web.rooms.laid_out import add_photos
from svfit_dreambooth.web.rooms.workspace import Workspace
from svfit_dreambooth.web.tabs.draft import Draft
from svfit_dreambooth.web.tabs.form import ADVANCED
from svfit_dreambooth.web.tabs.runs import Runs


def test_an_adapter_is_said_to_be_left_where_there_is_one(public, photo_folder, dog_adapter):
    request = Request("a" * 32)
    visitor, runs = public.visitor(request), Runs(public, Draft(public))
    add_photos(visitor.photos, sorted(photo_folder.glob("*.png")))
    job = public.jobs.submit(visitor, "dog", {"instance_prompt": "a dog", "pretrained_model_name_or_path": "toybox"})
    assert runs.remove(job.id, request)[-1] == "The run of dog was removed."
    runs.undo(job.id, request)
    library.add(visitor.library, dog_adapter)
    with changing(public.jobs.folder / job.id) as now:
        now.library_name, now.library_sha256 = "dog", library.sha256(visitor.library / "dog.safetensors")
    assert runs.remove(job.id, request)[-1] == "The run of dog was removed; its adapter is still in the library."


def test_remarks_go_by_base_and_resolution_and_the_form_comes_back(public, tmp_path):
    request, draft = Request("e" * 32), Draft(public)
    assert draft.show(request)[4] == gr.skip()
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
    assert draft.show(request)[9:12] == ("300", "nonsense", gr.skip())  # Advanced too, as it was written
    assert "will be enlarged" in draft.show(request)[1]
    draft.take_bundled("dog_patch", "", request)
    assert draft.show(request)[4:9] == ("dog_patch", "sks", "dog", "toybox", "faithful")
    assert draft.show(Request("f" * 32))[4] == gr.skip()


@pytest.mark.parametrize("download", [True, False])
def test_photos_on_toybox_are_told_of_a_base_for_them(tmp_path, photo_folder, monkeypatch, download):
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


def test_ticks_never_choose_a_run(public, photo_folder):
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
    assert new[0] == gr.skip() and "second" in new[2]
    assert "Choose a run" in runs.tick(None, None, request)[2] and "Choose a run" in runs.tick("gone", None, request)[2]
    assert runs.open_page(first[0].value, request)[0].value == first[0].value  # the person was faster
    assert runs.open_page(None, request)[0].value == runs.open_page("gone", request)[0].value == second[0].value
    assert runs.submit(request, "second", *form)[0].value == second[0].value and len(public.jobs.listed(visitor)) == 2
    assert runs.remove(second[0].value, request)[0].value == first[0].value


def test_no_way_of_training_downloads_for_a_stranger(public, photo_folder, monkeypatch):
    from svfit_dreambooth.web.api import Endpoints

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
