"""The tab that paints: orders, comparisons, what a page that is opened again finds, settings taken up."""

import errno
import html
import shutil
import zipfile
from pathlib import Path

import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="gradio is not installed")

from gradio.components.image_editor import AcceptBlobs, EditorData
from gradio.data_classes import FileData
from web_stand_ins import Request

from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.painting.sheets import contact_sheet
from svfit_dreambooth.web.rooms import library, pictures
from svfit_dreambooth.web.rooms.orders import AS_TRAINED, STRIP, Cell
from svfit_dreambooth.web.tabs import drawing
from svfit_dreambooth.web.tabs.compare import COMPARED, GRID, NOTHING, STRENGTHS, label
from svfit_dreambooth.web.tabs.drawing import canvas
from svfit_dreambooth.web.tabs.generate import _strength
from svfit_dreambooth.web.tabs.painting import Painter, begin_from
from svfit_dreambooth.web.tabs.reuse import SAMPLERS, take_up

# sampler, picture to begin with, how much is painted anew, clip skip, guidance rescale, VAE, bits, base trained on; axes of a grid
OWN = ["", "", "", "as it is", ""]
REST = ["the base's own", None, 0.6, *OWN, NOTHING, "", NOTHING, ""]


def test_a_strip_over_strengths_and_its_settings_taken_up(home, dog_adapter, tiny_base):
    painting, mine, theirs = Painter(home), Request("a" * 32), Request("b" * 32)
    visitor = home.visitor(mine)
    visitor.uploads.mkdir(parents=True)
    shutil.copy(dog_adapter, visitor.uploads / "own.safetensors")
    form = [
        "a photo of sks dog",
        "",
        tiny_base.name,
        ["upload/own"],
        1,
        2,
        "",
        5,
        False,
        "16",
        "16",
        STRENGTHS,
        False,
        *REST,
    ]
    *_, last_gallery, _ = [step for step in painting.generate(mine, *form, 1.0) if isinstance(step[1], list)] + [None]
    captions = [caption for _, caption in last_gallery[1]]
    assert captions[0] == "base · seed 5" and captions[-1] == "strength 1.5 · seed 5" and len(captions) == len(STRIP)
    name = last_gallery[2][-1]
    taken = painting.reuse([name], mine)
    assert (taken[0], taken[6], taken[-1]) == ("a photo of sks dog", 5, {"upload/own": 1.5})
    painting.fill_in(["upload/own"], "", "", mine)
    assert painting.open_page(mine)[6] == {"upload/own": 1.5}

    with pytest.raises(gr.Error, match="not there any more"):
        painting.reuse([name], theirs)
    with pytest.raises(gr.Error, match="no adapter called"):
        list(painting.generate(theirs, *form, 1.0))


def test_base_and_unusual_numbers_of_a_picture_are_taken_up(home, dog_adapter, tiny_base, monkeypatch):
    visitor, warned = home.visitor(Request("a" * 32)), []
    monkeypatch.setattr(gr, "Warning", warned.append)
    library.add(visitor.uploads, dog_adapter, name="taken-up")
    settings = {
        "prompt": "a dog", "negative_prompt": "", "num_inference_steps": 200, "guidance_scale": 7.5, "seed": 3,
        "width": 16, "height": 16,
        "scheduler": "euler_a", "clip_skip": 0, "quantize": "nf4", "vae": "better", "trained_on": tiny_base.name,
        "guidance_rescale": 0.7,
    }  # fmt: skip
    shutil.copytree(tiny_base / "vae", home.workspace.models / "better")
    for base, adapters, shown, missing in (
        (tiny_base.name, {"taken-up": 2.5}, AS_TRAINED, ""),
        (tiny_base.name, {}, tiny_base.name, ""),
        (DEFAULT_BASE, {"taken-up": 1.0}, DEFAULT_BASE, ""),
        (DEFAULT_BASE, {}, AS_TRAINED, ""),
        ("owner/name", {"taken-up": 1.0}, AS_TRAINED, "not here any more: the base owner/name."),
        ("gone", {"lost": 1.0}, AS_TRAINED, "not here any more: the adapter lost, the base gone."),
    ):
        taken = take_up(home, visitor, {**settings, "base_model": base, "adapters": adapters})
        assert taken[2].value == shown and "".join(warned).startswith(missing) and bool(warned) == bool(missing)
        assert taken[12:18] == ("euler_a", "0", "0.7", "better", "nf4", tiny_base.name)
        assert taken[18] is None  # it began with noise, and so does what comes
        warned.clear()
    odd = settings | {"vae": "/etc", "trained_on": "owner/gone", "strength": 0.4, "prompt_weights": True}
    odd["seed"] = 2**64 - 1
    del odd["guidance_rescale"]  # a picture that knows of none was painted with none
    taken = take_up(home, visitor, {**odd, "base_model": DEFAULT_BASE, "adapters": {}})
    assert (taken[14], taken[15], taken[17], taken[19]) == ("0", "", "", 0.4) and taken[18] == gr.skip()
    assert taken[6] == gr.skip()
    for missing in (
        f"the seed {2**64 - 1}, which",
        "the autoencoder /etc",
        "trained on, owner/gone",
        "picture that it began with",
        "weights of words",
    ):
        assert missing in warned[0]
    for strength, bounds in ((2.5, (0, 2.5)), (-1, (-1, 1.5)), (1, (0, 1.5))):
        slider = _strength("dog", "", strength, "dog")
        assert (slider.minimum, slider.maximum) == bounds


def test_two_tabs_at_once_paint_in_one(public, tiny_base, monkeypatch):
    painting, request = Painter(public), Request("a" * 32)
    form = ["a dog", "", tiny_base.name, [], 1, 1, "", 5, False, "16", "16", "just paint", False, *REST]
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
    form = ["a dog", "", tiny_base.name, [], 3, 5, "", 5, False, "16", "16", "just paint", False, *REST]
    first = painter.generate(request, *form)
    for step in first:
        if isinstance(step[1], list) and len(step[1]) == 1:
            first.close()  # the page is gone
    assert painter.open_page(request)[-1].interactive
    followed = list(painter.follow(request))
    assert "3 pictures done" in followed[-1][0] and len(followed[-1][2]) == 3
    for other in (request, Request("b" * 32)):
        assert list(painter.follow(other)) == [(gr.skip(),) * 13]  # nothing is emptied


def test_the_form_that_paints_comes_back_to_its_visitor(public, dog_adapter):
    painter, request = Painter(public), Request("a" * 32)
    form = (
        "a sks dog\non the beach", "rain", 3, 12, "7.5", 5, False, "64", "", "euler", "toybox", "1", "0.5", "better", "nf4", "mother", True,
    )  # fmt: skip
    painter.remember(request, *form)
    assert painter.open_page(request)[4] == form[0] and painter.recall(request) == form[1:]
    library.add(public.visitor(request).library, dog_adapter, name="dog")
    painter.fill_in(["library/dog", "upload/gone"], "", "", request)
    painter.remember_strength("library/dog", 0.8, request)
    painter.remember_strength("upload/gone", 0.5, request)
    opened = painter.open_page(request)
    assert opened[1].value == ["library/dog"] and opened[6] == {"library/dog": 0.8}
    other = Request("b" * 32)
    assert painter.open_page(other)[4] == "" and set(map(str, painter.recall(other))) == {str(gr.skip())}
    (public.visitor(request).folder / "form.json").write_text("[" * 100_000)
    assert painter.open_page(request)[4] == ""


def test_a_full_disk_leaves_the_buttons_usable(public, tiny_base, monkeypatch):
    def keep(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures, "keep", keep)
    form, told = ["a dog", "", tiny_base.name, [], 1, 1, "", 5, False, "16", "16", "just paint", False, *REST], []
    painting = Painter(public)
    with pytest.raises(gr.Error, match="No space left on device"):
        told.extend(painting.generate(Request("a" * 32), *form))
    assert (told[-1][6].interactive, told[-1][7].interactive) == (True, False) and public.paintings._working == {}


def test_a_grid_over_two_axes(home, dog_adapter, tiny_base):
    painter, request = Painter(home), Request("a" * 32)
    folder = home.visitor(request).library
    for name in ("dog", "mug"):
        library.add(folder, dog_adapter, name=name)
    common = ["a dog", "", tiny_base.name, ["library/dog", "library/mug"], 4, 2, "", 5, False, "16", "16", GRID, False]

    sheets = []

    def painted(*axes):
        *_, last = painter.generate(request, *common, *REST[:-4], *axes, 1.0, 0.5)
        sheets.append(last[-1])
        return [caption for _, caption in last[1]], [
            pictures.read_settings(home.visitor(request).pictures / n) for n in last[2]
        ]

    captions, settings = painted("adapter", "", "strength", "0.5 1")
    assert captions[0] == "dog · strength 0.5 · seed 5" and captions[3] == "mug · seed 5"
    assert [one["adapters"] for one in settings] == [
        {"dog": 0.5, "mug": 0.0}, {"dog": 1.0, "mug": 0.0}, {"dog": 0.0, "mug": 0.25}, {"dog": 0.0, "mug": 0.5},
    ]  # fmt: skip
    captions, settings = painted("sampling steps", "1, 3", NOTHING, "ignored")
    assert captions == ["1 steps · seed 5", "3 steps · seed 5"]
    assert [one["num_inference_steps"] for one in settings] == [1, 3]
    (grid, strip) = (Image.open(sheet.value["path"]) for sheet in sheets)
    assert grid.size[0] == strip.size[0] and grid.size[1] > 1.9 * strip.size[1] - 60  # two rows of two, and one
    for axes, sentence in (
        ((NOTHING, "", NOTHING, ""), "a grid needs one axis or two that differ"),
        (("guidance", "1", "guidance", "2"), "a grid needs one axis or two that differ"),
        (("strength", "0,5 1", NOTHING, ""), "“strength” is '0,5 1': write 0.5 for a half, and a space"),
        (("guidance", "much", NOTHING, ""), "“guidance” is 'much': write a number"),
        (("sampling steps", "1.5", NOTHING, ""), "write whole numbers"),
        (("guidance", "", NOTHING, ""), "write 1 to 12 numbers, such as 3, 5, 7.5"),
        (("guidance", "1 2 3 4 5 6 7 8 9 10 11 12", "strength", "1 2 3 4 5 6"), "number of pictures in all is 72"),
    ):
        with pytest.raises(gr.Error, match=html.escape(sentence)):
            painted(*axes)


def test_several_pictures_beside_the_base_are_a_sheet_with_a_row_for_each_seed(
    home, dog_adapter, tiny_base, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        "svfit_dreambooth.painting.sheets.contact_sheet", lambda *a: drawn.append(a) or contact_sheet(*a)
    )
    library.add(home.visitor(Request("a" * 32)).library, dog_adapter, name="dog")
    form = ["a dog", "", tiny_base.name, ["library/dog"], 2, 1, "", 5, False, "16", "16", COMPARED, False, *REST, 0.5]
    *_, last = Painter(home).generate(Request("a" * 32), *form)
    assert [caption for _, caption in last[1]] == [
        "base · seed 5", "dog 0.5 · seed 5", "base · seed 6", "dog 0.5 · seed 6",
    ]  # fmt: skip
    ((rows, captions, _),) = drawn
    assert [label for label, _ in rows] == ["seed 5 · a dog", "seed 6 · a dog"] and captions == ["base", "dog 0.5"]
    made = [Image.open(path).convert("RGB").tobytes() for path, _ in last[1]]
    assert [picture.tobytes() for _, row in rows for picture in row] == made and len(set(made)) == 4
    assert Image.open(last[-1].value["path"]).size[1] > Image.open(last[-1].value["path"]).size[0]


def test_what_stands_under_a_picture_is_the_strength_that_it_was_painted_at():
    dog, mug = (Path("dog"), 0.8), (Path("mug"), 0.4)
    assert label(Cell(0.5), Cell(), [dog]) == "strength 0.4" and label(Cell(0.0), Cell(), [dog]) == "base"
    assert label(Cell(0.5), Cell(), [dog, mug]) == "strengths × 0.5"
    assert label(Cell(0.5, only=1), Cell(), [dog, mug]) == "mug · strength 0.2"


def test_pictures_are_found_chosen_and_deleted_several_at_once(home, tiny_base, monkeypatch):
    monkeypatch.setattr(pictures, "EARLIER", 2)
    painter, request = Painter(home), Request("a" * 32)
    folder, gallery = home.visitor(request).pictures, painter.pictures
    for prompt, seed in (("a red dog", 1), ("a mug", 2), ("a blue dog", 3)):
        form = [prompt, "", tiny_base.name, [], 1, 1, "", seed, False, "16", "16", "just paint", False, *REST]
        list(painter.generate(request, *form))
    assert painter.said_before(request).choices == [(said, said) for said in ("a blue dog", "a mug", "a red dog")]
    names = gallery.find("", request)[1]
    assert len(names) == 2 and len(gallery.more("", names, request)[1]) == 3
    dogs = gallery.find("DOG a", request)[1]
    assert [pictures.read_settings(folder / name)["prompt"] for name in dogs] == ["a blue dog", "a red dog"]
    assert gallery.find("seed 2", request)[1] == [] and len(gallery.find("2 mug", request)[1]) == 1

    def click(index, chosen, several):
        event = gr.SelectData(None, {"index": index, "value": None})
        return gallery.select(event, dogs, chosen, several, request)

    one = click(0, [], False)
    assert one[1] == dogs[:1] and "a blue dog" in one[2] and one[4].value["path"].endswith(dogs[0])
    two = click(1, dogs[:1], True)
    assert two[1] == dogs and [button.interactive for button in two[3:]] == [False, True, False, True]
    assert sum(caption.startswith("✓") for _, caption in two[0].constructor_args["value"]) == 2
    with zipfile.ZipFile(two[4].value["path"]) as packed:
        assert packed.namelist() == dogs
    again = gallery._buttons(home.visitor(request), dogs)[1].value["path"]
    assert Path(again).is_file() and not Path(two[4].value["path"]).exists()
    assert click(1, dogs, True)[1] == dogs[:1]
    with pytest.raises(gr.Error, match="not there any more"):
        gallery.delete(["../secret"], dogs, request)
    assert gallery.delete(dogs, dogs, request)[1] == [] and len(list(folder.glob("*.png"))) == 1


@pytest.mark.parametrize("seed", [-1, 2**53, 2**64])
def test_a_seed_that_would_not_come_back_the_same_is_refused(public, tiny_base, seed):
    form = ["a dog", "", tiny_base.name, [], 1, 1, "", seed, False, "16", "16", "just paint", False, *REST]
    with pytest.raises(gr.Error, match=f"“Seed” is {seed}: write a whole number from 0 to {2**53 - 1}"):
        list(Painter(public).generate(Request("a" * 32), *form))


def test_what_is_drawn_over_a_picture_is_the_mask():
    photo = Image.new("RGBA", (20, 10), "red")
    assert begin_from(None, 0.5) is None and begin_from({"background": None, "layers": []}, 0.5) is None
    empty, drawn = Image.new("RGBA", photo.size), Image.new("RGBA", photo.size)
    assert begin_from({"background": photo, "layers": [empty]}, 0.5).mask is None
    drawn.paste("white", (0, 0, 5, 5))
    begin = begin_from({"background": photo, "layers": [drawn, empty]}, 0.5)
    assert (begin.strength, begin.image.mode, begin.mask.getbbox()) == (0.5, "RGB", (0, 0, 5, 5))
    clear = begin_from({"background": empty, "layers": []}, 0.5)
    assert clear.image.getpixel((0, 0)) == (255, 255, 255)  # what is transparent lies on white, as photos do


def test_what_comes_out_of_an_editor_is_never_large_in_memory(tmp_path, monkeypatch):
    editor, path = canvas(), tmp_path / "large.png"
    Image.radial_gradient("L").resize((5000, 2500)).save(path)
    file = FileData(path=str(path))
    got = editor.preprocess(EditorData(background=file, layers=[file], composite=None))
    assert got["background"].size == got["layers"][0].size == (drawing.LARGEST, drawing.LARGEST // 2)
    assert got["background"].mode == "RGBA" and got["composite"] is None
    monkeypatch.setattr(drawing, "MOST_PIXELS", 5000 * 2500 - 1)
    with pytest.raises(gr.Error, match="the picture has 5000 × 2500 pixels: scale it down first"):
        editor.preprocess(EditorData(background=file, layers=[], composite=None))
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(gr.Error, match="no readable picture"):
        editor.preprocess(EditorData(background=file, layers=[], composite=None))
    assert editor.get_block_name() == "imageeditor"


def test_drawings_that_no_event_asks_for_do_not_fill_the_memory(monkeypatch):
    editor = canvas()
    monkeypatch.setattr(drawing, "MOST_BYTES", 25)

    def send(id, index="null", kind="background"):
        told = {"type": kind, "index": index, "id": id}  # as it comes in: not as what it is declared to be
        editor.accept_blobs(AcceptBlobs.model_construct(data=told, files=[("file", b"0123456789")]))

    for id in ("a", "b", "c"):
        send(id)
    assert list(editor.blob_storage) == ["b", "c"]
    send("c", "1", "layer")
    assert list(editor.blob_storage) == ["c"] and editor.blob_storage["c"].layers == [None, b"0123456789"]
    with pytest.raises(gr.Error, match="at most 8 layers"):
        send("c", str(10**9), "layer")
    with pytest.raises(gr.Error, match="draw it again"):  # rather than to paint as if nothing were drawn
        editor.preprocess(EditorData(background=None, layers=[], composite=None, id="a"))


def test_the_form_knows_all_samplers():
    from svfit_dreambooth.painting import samplers

    assert list(SAMPLERS) == list(samplers.SAMPLERS)
