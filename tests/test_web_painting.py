"""The tab that paints: orders, comparisons, what a page that is opened again finds, settings taken up."""

import errno
import shutil

import pytest

gr = pytest.importorskip("gradio", reason="gradio is not installed")

from web_stand_ins import Request

from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.web.rooms import library, pictures
from svfit_dreambooth.web.rooms.studio import AS_TRAINED, STRIP
from svfit_dreambooth.web.tabs.generate import _strength
from svfit_dreambooth.web.tabs.painting import STRENGTHS, Painter
from svfit_dreambooth.web.tabs.reuse import take_up


def test_a_strip_over_strengths_and_its_settings_taken_up(home, dog_adapter, tiny_base):
    painting, mine, theirs = Painter(home), Request("a" * 32), Request("b" * 32)
    visitor = home.visitor(mine)
    visitor.uploads.mkdir(parents=True)
    shutil.copy(dog_adapter, visitor.uploads / "own.safetensors")
    form = ["a photo of sks dog", "", tiny_base.name, ["upload/own"], 1, 2, "", 5, False, "16", "16", STRENGTHS, False]
    *_, last_gallery, _ = [step for step in painting.generate(mine, *form, 1.0) if isinstance(step[1], list)] + [None]
    captions = [caption for _, caption in last_gallery[1]]
    assert captions[0] == "base · seed 5" and captions[-1] == "own 1.5 · seed 5" and len(captions) == len(STRIP)
    name = last_gallery[2][-1]
    taken = painting.reuse(name, mine)
    assert (taken[0], taken[6], taken[-1]) == ("a photo of sks dog", 5, {"upload/own": 1.5})

    with pytest.raises(gr.Error, match="not there any more"):
        painting.reuse(name, theirs)
    with pytest.raises(gr.Error, match="no adapter called"):
        list(painting.generate(theirs, *form, 1.0))


def test_base_and_unusual_numbers_of_a_picture_are_taken_up(home, dog_adapter, tiny_base, monkeypatch):
    visitor, warned = home.visitor(Request("a" * 32)), []
    monkeypatch.setattr(gr, "Warning", warned.append)
    library.add(visitor.uploads, dog_adapter, name="taken-up")
    settings = {
        "prompt": "a dog", "negative_prompt": "", "num_inference_steps": 200, "guidance_scale": 7.5, "seed": 3,
        "width": 16, "height": 16,
    }  # fmt: skip
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
        warned.clear()
    for strength, bounds in ((2.5, (0, 2.5)), (-1, (-1, 1.5)), (1, (0, 1.5))):
        slider = _strength("dog", "", strength, "dog")
        assert (slider.minimum, slider.maximum) == bounds


def test_two_tabs_at_once_paint_in_one(public, tiny_base, monkeypatch):
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
        assert list(painter.follow(other)) == [(gr.skip(),) * 12]  # nothing is emptied


def test_the_form_that_paints_comes_back_to_its_visitor(public):
    painter, request = Painter(public), Request("a" * 32)
    form = ("a sks dog\non the beach", "rain", 3, 12, "7.5", 5, False, "64", "")
    painter.remember(request, *form)
    assert painter.open_page(request)[4] == form[0] and painter.recall(request) == form[1:]
    other = Request("b" * 32)
    assert painter.open_page(other)[4] == "" and set(map(str, painter.recall(other))) == {str(gr.skip())}
    (public.visitor(request).folder / "form.json").write_text("[" * 100_000)
    assert painter.open_page(request)[4] == ""


def test_a_full_disk_leaves_the_buttons_usable(public, tiny_base, monkeypatch):
    def keep(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures, "keep", keep)
    form, told = ["a dog", "", tiny_base.name, [], 1, 1, "", 5, False, "16", "16", "just paint", False], []
    painting = Painter(public)
    with pytest.raises(gr.Error, match="No space left on device"):
        told.extend(painting.generate(Request("a" * 32), *form))
    assert (told[-1][6].interactive, told[-1][7].interactive) == (True, False) and public.paintings._working == {}
