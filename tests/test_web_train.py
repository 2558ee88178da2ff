"""The tab that trains: photos, words and settings, what is said of them before a run, and the list of runs."""

import re
import shutil

import pytest
import torch
from PIL import Image

gr = pytest.importorskip("gradio", reason="gradio is not installed")

from flow_bases import tiny_klein
from web_stand_ins import Request

from svfit_dreambooth import TrainConfig, read_adapter, save_adapter
from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.photos.crops import as_pixel_values, crop_photo
from svfit_dreambooth.photos.reading import find_photos
from svfit_dreambooth.training.events import End, Painted, Start, Stepped
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.training.plan import prepare
from svfit_dreambooth.web import page as web
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms.bases import FOR_PHOTOS
from svfit_dreambooth.web.rooms.job import changing
from svfit_dreambooth.web.rooms.laid_out import add_photos, caption, mask, photo_files, set_mask
from svfit_dreambooth.web.rooms.queue import Queue
from svfit_dreambooth.web.rooms.workspace import Workspace
from svfit_dreambooth.web.tabs.draft import Draft
from svfit_dreambooth.web.tabs.forecast import estimate, time_of_runs_like
from svfit_dreambooth.web.tabs.form import ADVANCED
from svfit_dreambooth.web.tabs.runs import Runs


def act(runs, request, what, run):
    return runs.act(gr.EventData(None, {"act": what, "run": run}), request)


def test_an_adapter_is_said_to_be_left_where_there_is_one(public, photo_folder, dog_adapter):
    request = Request("a" * 32)
    visitor, runs = public.visitor(request), Runs(public, Draft(public))
    add_photos(visitor.photos, sorted(photo_folder.glob("*.png")))
    job = public.jobs.submit(visitor, "dog", {"instance_prompt": "a dog", "pretrained_model_name_or_path": "toybox"})
    assert act(runs, request, "remove", job.id)[-1] == "The run of dog was removed."
    runs.undo(job.id, request)
    library.add(visitor.library, dog_adapter)
    with changing(public.jobs.folder / job.id) as now:
        now.library_name, now.library_sha256 = "dog", library.sha256(visitor.library / "dog.safetensors")
    assert (
        act(runs, request, "remove", job.id)[-1] == "The run of dog was removed; its adapter is still in the library."
    )


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
    assert draft.show(request)[4:9] == ("dog_patch", "sks", "dog", DEFAULT_BASE, "faithful")
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
    assert f"{DEFAULT_BASE} is for trying out" in said and (FOR_PHOTOS in said) == download
    assert "trying out" not in draft.remark(FOR_PHOTOS, "", request)


def test_ticks_never_choose_a_run(public, photo_folder):
    request, draft = Request("a" * 32), Draft(public)
    runs, visitor = Runs(public, draft), public.visitor(request)
    add_photos(visitor.photos, sorted(photo_folder.glob("*.png")))
    form = ["sks", "dog", "toybox", "fast", *[None] * len(ADVANCED)]
    first, second = (runs.submit(request, name, *form) for name in ("first", "second"))
    assert first[0] != second[0] and "second</b> · waiting" in second[3]
    old = runs.tick(first[0], None, 0, request)  # was under way when Start was pressed
    assert len(old) == len(first) - 1 and "first" in old[2]  # what stands for the chosen run is not in its power
    new = runs.tick(second[0], old[1], 0, request)  # the next one repairs what that showed
    assert "second" in new[2]
    assert set(map(str, runs.tick(second[0], new[1], 0, request))) == {str(gr.skip())}
    assert "Choose a run" in runs.tick("gone", None, 0, request)[2]
    assert set(map(str, runs.tick(None, None, 0, request))) == {str(gr.skip())}  # the page is only just opening
    for other in (None, "gone"):
        assert runs.open_page(other, request)[0] == second[0]
    assert runs.open_page(first[0], request)[0] == first[0]  # the person was faster
    assert runs.submit(request, "second", *form)[0] == second[0] and len(public.jobs.listed(visitor)) == 2
    for shown, chosen in ((first, first), (act(runs, request, "look", first[0]), first), (second, second)):
        rows = shown[1].split('role="listitem"')
        assert [chosen[0] in row for row in rows if 'class="run chosen"' in row] == [True]
    assert rows[1].count("<img") == 1 and re.findall('data-act="([a-z]*)"', rows[1]) == ["look", "stop", "remove"]
    assert (
        "stopped" in act(runs, request, "stop", first[0])[3] and act(runs, request, "remove", second[0])[0] == first[0]
    )
    with pytest.raises(gr.Error, match="no such run"):
        act(runs, Request("b" * 32), "stop", first[0])


def test_a_look_becomes_the_adapter_and_the_end_comes_back(home, photo_folder, dog_adapter):
    request = Request("a" * 32)
    visitor, runs = home.visitor(request), Runs(home, Draft(home))
    add_photos(visitor.photos, sorted(photo_folder.glob("*.png")))
    form = ["sks", "dog", "toybox", "fast", *[None] * len(ADVANCED)]
    id = runs.submit(request, "dog", *form)[0]
    job = home.jobs.find(visitor, id)
    folder = RunFolder(home.jobs.run_folder(job), "dog")
    adapter = read_adapter(dog_adapter)
    folder.note(Start(of=6))
    for step in (0, 2, 4, 6):
        folder.look(step).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 16)).save(folder.look(step))
        folder.note(Painted(step, folder.relative(folder.look(step))))
        if step == 0:  # one look alone is shown without a slider
            shown = runs.tick(id, None, None, request)
            assert not shown[4].visible and "Painted at step 0" in shown[6]
        if step:
            adapter.training["steps"] = step
            save_adapter(adapter, folder.look_adapter(step))
    with pytest.raises(gr.Error, match="dog is queued"):
        runs.use_step(id, 2, request)
    save_adapter(adapter, folder.adapter)
    folder.note(End(kept_step=4, step=6, adapter="dog.safetensors"))
    with changing(home.jobs.folder / id) as now:
        now.started = 1
    Queue(home.jobs).tend()

    def held():
        (name,) = library.names(visitor.library)
        return name, read_adapter(visitor.library / f"{name}.safetensors").training["steps"]

    library.rename(visitor.library, "dog", "bello")
    shown = runs.tick(id, None, None, request)
    assert (shown[4].minimum, shown[4].maximum, shown[4].step, shown[4].value) == (0, 6, 2, 4)
    assert shown[5] == 4 and "Painted at step 4" in shown[6] and not shown[7].interactive and held() == ("bello", 6)
    look, use, _ = runs.look(id, 2.9, request)
    assert "Painted at step 2" in look and use.interactive and not runs.look(id, 0, request)[1].visible
    assert "in the library: step 2" in runs.use_step(id, 2.9, request)[2] and held() == ("bello", 2)
    assert runs.try_it(id, request)[1].value == ["library/bello"]
    assert "in the library" not in runs.use_step(id, 4, request)[2] and held() == (
        "bello",
        6,
    )  # what the run itself left


def test_captions_and_masks_are_kept_beside_the_photos_and_go_with_the_run(public, photo_folder):
    request = Request("a" * 32)
    draft, visitor = Draft(public), public.visitor(request)
    runs = Runs(public, draft)
    add_photos(visitor.photos, sorted(photo_folder.glob("*.png"))[:2])
    first, second = photo_files(visitor.photos)
    shown = draft.select(gr.SelectData(None, {"index": 1, "value": None}), request)
    assert (shown[0], shown[3].value, shown[3].label) == (1, "", "Caption of photo 2")
    thumbs, _ = draft.say("  a sks dog\nasleep ", 1, "toybox", "", request)
    assert caption(second) == "a sks dog asleep" and [one["caption"] for one in thumbs.value] == [
        "photo 1",
        "photo 2 ✎",
    ]
    with pytest.raises(gr.Error, match="the caption has 2,000 characters"):
        draft.say("a" * 2000, 1, "toybox", "", request)
    with Image.open(first) as photo:
        before, layer = photo.convert("RGB"), Image.new("RGBA", photo.size)
    layer.paste("red", (0, 0, 8, 8))
    draft.draw({"layers": [layer]}, 0, "toybox", "", request)
    assert mask(first).getbbox() == (0, 0, 8, 8) and Image.open(first).convert("RGB").tobytes() == before.tobytes()
    dark = draft.edit(0, request)["background"].convert("L").histogram()
    draft.draw({"layers": [Image.new("RGBA", (4, 4))]}, 0, "toybox", "", request)
    assert sum(dark[:64]) > sum(draft.edit(0, request)["background"].convert("L").histogram()[:64])  # outside the mask
    draft.draw({"layers": [layer]}, 0, "toybox", "", request)
    form = ["sks", "dog", "toybox", "fast", *[None] * len(ADVANCED)]
    ids = [runs.submit(request, "dog", *form)[0]]
    folder = public.jobs.folder / ids[0] / "photos"
    photos = find_photos(folder)
    assert [photo.captions for photo in photos] == [(), ("a sks dog asleep",)] and photos[0].mask is not None
    draft.say("", 1, "toybox", "", request)
    ids.append(runs.submit(request, "dog", *form)[0])
    draft.draw({"layers": [Image.new("RGBA", (4, 4))]}, 0, "toybox", "", request)
    ids.append(runs.submit(request, "dog", *form)[0])
    assert mask(first) is None and len(set(ids)) == 3  # each of them another run
    draft.say("a sks dog", 0, "toybox", "", request)
    draft.remove(0, "toybox", "", request)
    assert [path.name for path in visitor.photos.glob("[!.]*")] == [second.name]


def test_what_training_sees_of_a_photo_is_what_it_cuts_out(public, photo_folder, tiny_base, tmp_path):
    request, draft = Request("a" * 32), Draft(public)
    visitor = public.visitor(request)
    gradient = Image.linear_gradient("L").resize((40, 400)).convert("RGB").rotate(90, expand=True)  # 400 x 40
    gradient.save(tmp_path / "wide.png")
    add_photos(visitor.photos, [tmp_path / "wide.png"])
    options = {"center_crop": False, "resolution": 16, "seed": 3}
    plan = prepare(
        TrainConfig(
            pretrained_model_name_or_path=str(tiny_base), instance_data_dir=str(visitor.photos), instance_prompt="a dog",
            output_dir=str(tmp_path), dry_run=True, **options,
        ),
        weightless=True,
    )  # fmt: skip
    crops = crop_photo(gradient, plan.training_size(plan.photos[0]), crops=4, seed=3, index="001.png")
    seen = draft.windows(0, tiny_base.name, "16", "3", request)
    assert len(seen) == len(crops.pixel_values) > 1
    for (picture, told), values in zip(seen, crops.pixel_values, strict=True):
        width, height = picture.size
        assert told == f"{width} × {height} pixels, 17% of the photo" and width > height
        assert torch.equal(as_pixel_values(picture), values)
    half = Image.new("L", (400, 40))
    half.paste(255, (0, 0, 400, 20))
    set_mask(photo_files(visitor.photos)[0], half)
    picture, _ = draft.windows(0, tiny_base.name, "16", "3", request)[0]
    assert picture.getpixel((0, picture.height - 1)) == (0x77, 0x77, 0x77)
    with pytest.raises(gr.Error, match="“Resolution” 17 is not a multiple of 2"):
        draft.windows(0, tiny_base.name, "17", "", request)


def test_the_settings_of_a_run_are_taken_up_again(public, photo_folder):
    request = Request("a" * 32)
    draft, visitor = Draft(public), public.visitor(request)
    runs = Runs(public, draft)
    add_photos(visitor.photos, sorted(photo_folder.glob("*.png")))
    advanced = dict.fromkeys(ADVANCED) | {
        "max_train_steps": "30", "learning_rate": "1e-3", "rank": "full", "random_flip": True, "mixed_precision": "no",
        "validation_prompts": "a photo of sks dog on the moon\n\n a sks dog ",
    }  # fmt: skip
    form = ("sks", "brown dog", DEFAULT_BASE, "faithful", *advanced.values())
    id = runs.submit(request, "dog", *form)[0]
    options = public.jobs.find(visitor, id).options
    assert options["validation_prompts"] == ["a photo of sks dog on the moon", "a sks dog"]
    folder = RunFolder(public.jobs.run_folder(public.jobs.find(visitor, id)), "dog")
    for event in (
        Start(time=0.0, of=30),
        *(Stepped(n, 30, 0.5, seconds=4.0 * n) for n in range(1, 31)),
        End(time=150.0),
    ):
        folder.note(event)
    other = runs.submit(request, "like it", *form)
    assert "1 run before it · about 2 min, going by dog" in other[3]  # before its first step
    slower = options | {"keep_base": True, "class_prompt": "a photo of a dog"}
    assert time_of_runs_like(public, visitor, options, 30) and time_of_runs_like(public, visitor, slower, 30) is None
    draft.clear(request)
    thumbs, _, _, _, *taken = runs.again(id, request)
    assert len(thumbs.value) == len(photo_files(visitor.photos)) > 0 and taken[:5] == ["dog", *form[:4]]
    assert draft.show(request)[4:] == tuple(taken)  # also when the page is opened again
    assert runs.submit(request, *taken)[0] == id  # the very same, so no second one


def test_what_a_base_has_no_use_for_is_said_before_the_start(public, photo_folder, tiny_base):
    request = Request("a" * 32)
    draft, visitor = Draft(public), public.visitor(request)
    runs, models = Runs(public, draft), public.studio.bases.models
    add_photos(visitor.photos, sorted(photo_folder.glob("*.png")))
    tiny_klein().save_pretrained(models / "klein")
    shutil.copytree(tiny_base / "vae", models / "better-vae")
    (models / "one.safetensors").touch()

    def form(base, **changes):
        return ["sks", "dog", base, "fast", *(changes.get(name) for name in ADVANCED)]

    for base, changes, sentence in (
        (tiny_base.name, {"clip_skip": "9"}, "^'“Clip skip” is 9: of the layers of this base"),
        ("klein", {"clip_skip": "1"}, "“Clip skip” 1 is for Stable Diffusion"),
        ("klein", {"pretrained_vae_model_name_or_path": "better-vae"}, "“Another autoencoder .VAE.” .* is for Stable"),
        (tiny_base.name, {"pretrained_vae_model_name_or_path": "/etc"}, "no base model that is offered here"),
        ("one.safetensors", {"quantize": "int8"}, "“Base in fewer bits” int8 needs a diffusers folder"),
        (tiny_base.name, {"quantize": "int9"}, "“Base in fewer bits” is .*int9.*: choose one of those"),
    ):
        with pytest.raises(gr.Error, match=sentence):
            runs.submit(request, "dog", *form(base, **changes))
    assert not public.jobs.listed(visitor)
    id = runs.submit(
        request, "dog", *form(tiny_base.name, clip_skip="1", pretrained_vae_model_name_or_path="better-vae")
    )[0]
    options = public.jobs.find(visitor, id).options
    assert options["clip_skip"] == 1 and options["pretrained_vae_model_name_or_path"] == str(models / "better-vae")
    *_, skip, vae, bits = runs.again(id, request)
    assert (skip, vae, bits) == ("1", "better-vae", "as it is")


def test_no_way_of_training_downloads_for_a_stranger(public, photo_folder, monkeypatch):
    from svfit_dreambooth.web.api import Endpoints

    request, photos = Request("a" * 32), sorted(photo_folder.glob("*.png"))
    draft, visitor = Draft(public), public.visitor(request)
    add_photos(visitor.photos, photos)
    form = ["sks", "dog", "stranger/model", "fast", *[None] * len(ADVANCED)]
    for call in (
        lambda: Runs(public, draft).submit(request, "dog", *form),
        lambda: Runs(public, draft).estimate(request, *form),
        lambda: Endpoints(public).train(photos, "dog", "sks", "dog", "stranger/model", "fast", 0, {}, request),
    ):
        with pytest.raises(gr.Error, match="stranger/model is not on this disk, and downloads are off here"):
            call()
    monkeypatch.setattr("svfit_dreambooth.training.plan.prepare", lambda *a, **k: pytest.fail("opened"))
    options = {"pretrained_model_name_or_path": "stranger/model", "instance_prompt": "a photo of sks dog"}
    said = estimate(public, visitor, options)[0]
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
