"""The open base that paints: adapters exchanged on it, turns, room for runs."""

import dataclasses
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from web_stand_ins import paint, until

from svfit_dreambooth import load_adapter, read_adapter, save_adapter
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.web.rooms import studio as room
from svfit_dreambooth.web.rooms.bases import Bases
from svfit_dreambooth.web.rooms.orders import AS_TRAINED, Cell, Order
from svfit_dreambooth.web.rooms.studio import Studio, working_dtype

SIZE = {"num_inference_steps": 2, "width": 16, "height": 16}


def pixels(picture):
    return np.asarray(picture.image, dtype=int)


def test_adapters_are_exchanged_on_an_open_base(workspace, tiny_base, dog_adapter, tmp_path):
    studio = Studio(Bases(workspace.models, (str(tiny_base),)))
    other = shutil.copy(dog_adapter, tmp_path / "mug.safetensors")
    order = {"prompt": "a photo of sks dog", "base": tiny_base.name, "seed": 3, **SIZE}
    told, (bare,) = paint(studio, Order(**order))
    assert [event.kind for event in told] == ["opening", "loading", "step", "step", "picture"]
    told, (weak, full) = paint(studio, Order(**order, adapters=[(dog_adapter, 1.0)], cells=(Cell(0.0), Cell(1.0))))
    assert "opening" not in [event.kind for event in told]
    assert np.array_equal(pixels(bare), pixels(weak)) and not np.array_equal(pixels(bare), pixels(full))
    _, (both,) = paint(studio, Order(**order, adapters=[(Path(other), 1.0), (dog_adapter, -1.0)]))
    assert both.settings["adapters"] == {"dog": -1.0, "mug": 1.0} or both.settings["adapters"] == {
        "mug": 1.0,
        "dog": -1.0,
    }
    assert np.abs(pixels(both) - pixels(bare)).max() <= 1
    _, (again,) = paint(studio, Order(**order, adapters=[(dog_adapter, 1.0)]))
    assert np.array_equal(pixels(again), pixels(full)) and again.settings["adapters"] == {"dog": 1.0}


def test_a_base_is_opened_as_asked_and_adapters_as_on_the_base_they_were_trained_on(
    workspace, tiny_base, tiny_base_v, dog_adapter
):
    workspace.models.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tiny_base, workspace.models / "better")
    studio = Studio(Bases(workspace.models, (str(tiny_base), str(tiny_base_v))))
    order = Order("a photo of sks dog", tiny_base_v.name, [(dog_adapter, 1.0)], seed=3, **SIZE)
    sibling = dataclasses.replace(order, trained_on=tiny_base.name)
    _, (painted,) = paint(studio, sibling)
    model = open_base_model(str(tiny_base_v))
    load_adapter(model.pipeline, dog_adapter, trained_on=open_base_model(str(tiny_base)))
    (expected,) = generate(model, [order.prompt], seed=3, **SIZE)
    assert np.abs(pixels(painted) - pixels(expected)).max() <= 1
    with pytest.raises(SVFitError, match="trained on"):
        paint(studio, order)  # the directions of the other base are gone again

    plain = dataclasses.replace(order, base=tiny_base.name)
    _, (skipped,) = paint(studio, dataclasses.replace(plain, clip_skip=1, autoencoder="better"))
    assert skipped.settings["clip_skip"] == 1 and skipped.settings["vae"] == "better"
    _, (own,) = paint(studio, plain)
    assert not {"clip_skip", "vae"} & own.settings.keys() and np.abs(pixels(own) - pixels(skipped)).max() > 1


def test_painting_stops_within_a_step(workspace, tiny_base):
    studio, cancelled = Studio(Bases(workspace.models, (str(tiny_base),))), threading.Event()

    def stop(event):
        if event.kind == "step" and (event.number, event.step) == (1, 1):
            cancelled.set()

    order = Order("a dog", tiny_base.name, num_images=3, **SIZE)
    told, painted = paint(studio, order, cancelled, stop)
    assert len(painted) == 1 and (told[-1].kind, told[-1].number, told[-1].step) == ("step", 1, 1)


def test_a_related_base_is_allowed_only_while_it_is_asked_for(workspace, tiny_base, tiny_base_v, dog_adapter):
    studio = Studio(Bases(workspace.models, (str(tiny_base), str(tiny_base_v))))
    order = Order("a dog", tiny_base_v.name, [(dog_adapter, 1.0)], **SIZE)
    _, lenient = paint(studio, dataclasses.replace(order, allow_other_base=True))
    with pytest.raises(SVFitError, match="base"):
        paint(studio, order)
    _, again = paint(studio, dataclasses.replace(order, allow_other_base=True))
    assert np.array_equal(pixels(lenient[0]), pixels(again[0]))
    own = dataclasses.replace(order, base=tiny_base.name)
    for allowed in (True, False, False):
        assert len(paint(studio, dataclasses.replace(own, allow_other_base=allowed))[1]) == 1


def test_a_base_on_a_gpu_makes_room_for_runs_and_after_a_while(workspace, tiny_base, monkeypatch):
    studio, order = Studio(Bases(workspace.models, (str(tiny_base),))), Order("a dog", tiny_base.name, **SIZE)
    paint(studio, order)
    studio.make_room()
    assert studio._model is not None  # on the CPU it stays
    monkeypatch.setattr(room, "on_gpu", lambda model: model is not None)
    weights = studio._model.pipeline.unet.conv_in
    studio.make_room()
    assert studio._model is None and weights.weight.device.type == "meta"

    def ask(event):
        if event.kind == "step":
            studio.make_room()

    told, painted = paint(studio, order, on_told=ask)
    assert told[0].kind == "opening" and len(painted) == 1 and studio._model is None
    monkeypatch.setattr(room, "IDLE", 0.05)
    paint(studio, order)
    until(lambda: studio._model is None)
    until(lambda: studio.line.is_free)
    assert (working_dtype("cuda"), working_dtype("cpu")) == ("float16", "float32")


def test_a_name_in_a_file_opens_nothing_new(workspace, tiny_base, dog_adapter, tmp_path):
    adapter = read_adapter(dog_adapter)
    for name, sentence in (("someone/model", "not downloaded unasked"), ("tiny-kl", "not offered here")):
        adapter.base_model = name
        path = save_adapter(adapter, tmp_path / "stranger.safetensors")
        with pytest.raises(SVFitError, match=sentence):
            paint(Studio(Bases(workspace.models)), Order("a dog", AS_TRAINED, [(path, 1.0)], **SIZE))
    (workspace.models).mkdir(parents=True)
    (workspace.models / "tiny-kl").symlink_to(tiny_base)
    _, painted = paint(Studio(Bases(workspace.models)), Order("a dog", AS_TRAINED, [(path, 1.0)], **SIZE))
    assert len(painted) == 1


def test_a_long_order_lets_others_in_between_and_paints_the_same(workspace, tiny_base, dog_adapter, monkeypatch):
    studio, never = Studio(Bases(workspace.models, (str(tiny_base),))), threading.Event()
    long = Order("a dog", tiny_base.name, [(dog_adapter, 1.0)], num_images=3, cells=(Cell(0.0), Cell(1.0)), **SIZE)
    expected = [pixels(picture) for picture in paint(studio, long)[1]]
    monkeypatch.setattr(room, "SLICE", 0.0)
    painted, other = [], threading.Thread()

    def tell(event):
        nonlocal other
        if event.kind == "picture":
            painted.append(("long", pixels(event.picture)))
            if len(painted) == 2:
                other = threading.Thread(
                    target=studio.paint, args=(Order("a mug", tiny_base.name, **SIZE), told, never, "b")
                )
                other.start()
                until(lambda: studio.line.others_wait("a"))

    def told(event):
        if event.kind == "picture":
            painted.append(("short", None))

    studio.paint(long, tell, never, "a")
    other.join()
    assert [who for who, _ in painted] == ["long"] * 2 + ["short"] + ["long"] * 4
    for (_, one), other_one in zip([one for one in painted if one[0] == "long"], expected, strict=True):
        assert np.array_equal(one, other_one)


@pytest.mark.parametrize("memory", ["enough", "too little"])
def test_what_different_people_ask_of_one_base_is_painted_in_one_batch(
    workspace, tiny_base, dog_adapter, tmp_path, monkeypatch, memory
):
    from svfit_dreambooth.painting import batches

    studio = Studio(Bases(workspace.models, (str(tiny_base),)))
    mug = Path(shutil.copy(dog_adapter, tmp_path / "dog.safetensors"))  # somebody else's, of the same name
    orders = {
        "a": Order("a dog", tiny_base.name, [(dog_adapter, 1.0)], num_images=2, seed=3, **SIZE),
        "b": Order("a mug", tiny_base.name, [(mug, -0.5)], seed=9, **SIZE),
        "c": Order("a cat", tiny_base.name, [(mug, 0.5), (dog_adapter, 0.5)], seed=4, **SIZE),
        "d": Order("a cat", tiny_base.name, seed=4, **{**SIZE, "num_inference_steps": 1}),
    }
    alone = {who: paint(studio, order)[1] for who, order in orders.items()}
    sizes, whole = [], batches.paint_batch

    def paint_batch(model, batch, *arguments, **common):
        sizes.append(len(batch))
        if memory == "too little":
            raise RuntimeError("out of memory")
        return whole(model, batch, *arguments, **common)

    monkeypatch.setattr(batches, "paint_batch", paint_batch)
    told, threads = {who: [] for who in orders}, []

    def tell(event):  # the others come while the first picture is painted
        told["a"].append(event)
        if event.kind == "step" and not threads:
            for who in "bcd":
                arguments = orders[who], told[who].append, threading.Event(), who
                threads.append(threading.Thread(target=studio.paint, args=arguments))
                threads[-1].start()
            until(lambda: len(studio._tickets) == 4)

    studio.paint(orders["a"], tell, threading.Event(), "a")
    for thread in threads:
        thread.join()
    assert sizes == [3] and studio.line.is_free and studio._tickets == []
    for who, pictures in alone.items():
        painted = [event.picture for event in told[who] if event.kind == "picture"]
        assert [one.settings for one in painted] == [one.settings for one in pictures]
        for one, other in zip(painted, pictures, strict=True):
            assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_who_stops_in_a_batch_stops_nobody_else(workspace, tiny_base):
    studio, gone = Studio(Bases(workspace.models, (str(tiny_base),))), threading.Event()
    painted, threads = [], []

    def others(event):
        painted.extend([event.picture] if event.kind == "picture" else [])

    def tell(event):
        if event.kind == "step" and not threads:
            order = Order("a cat", tiny_base.name, num_images=2, **SIZE)
            threads.append(threading.Thread(target=studio.paint, args=(order, others, threading.Event(), "b")))
            threads[0].start()
            until(lambda: len(studio._tickets) == 2)
        if event.kind == "step" and event.number == 1:  # within the batch
            gone.set()

    studio.paint(Order("a dog", tiny_base.name, num_images=9, **SIZE), tell, gone, "a")
    threads[0].join()
    assert len(painted) == 2 and studio.line.is_free
