"""One open base model that paints for everybody in turn: adapters are exchanged on it, the base stays.

A long order lets others in between its pictures.  On a GPU it leaves when a run needs the room, and when nobody has painted for a while.
"""

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svfit_dreambooth.bases.names import DEFAULT_BASE, check_held
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms.bases import OFF, Bases, check_on_hub
from svfit_dreambooth.web.rooms.turns import Line

MAX_PIXELS = 2048  # of a side
MAX_PICTURES = 64  # of one order
MAX_STEPS = 200
MAX_PROMPT = 4000  # characters
MAX_ORDERS = 8  # of one person that are painted or wait
MAX_ORDERS_ALL = 40
SLICE = 20.0  # seconds after which an order lets others have a turn
STRIP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
IDLE = 600.0  # seconds after which a base that nobody paints with leaves the GPU
AS_TRAINED = "the adapters' own"  # the base that the first adapter names, or the embedded one


@dataclass
class Order:
    """What is to be painted, once for each of `factors`: every strength times that number (0: the base alone)."""

    prompt: str
    base: str  # as `Bases` names it
    adapters: Sequence[tuple[Path, float]] = ()  # (file, strength)
    negative_prompt: str = ""
    num_images: int = 1
    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float | None = None  # None: the base's own
    width: int | None = None  # None: the base's own
    height: int | None = None
    factors: Sequence[float] = (1.0,)
    allow_other_base: bool = False


@dataclass
class Told:
    """What `paint` tells while it works: "waiting", "opening", "loading", "step" or "picture"."""

    kind: str
    picture: Any = None  # generation.Picture
    number: int = 0  # of the picture, from 0
    pictures: int = 0
    step: int = 0
    of: int = 0
    factor: float = 1.0


class Studio:
    """Holds at most one open base model."""

    def __init__(self, bases: Bases, dtype: str | None = None):
        self.bases = bases
        self.dtype = dtype  # in which the base works, by the names of devices.DTYPES; None: see `working_dtype`
        self.line = Line(MAX_ORDERS, MAX_ORDERS_ALL)
        self._room_wanted = threading.Event()  # by a run, while somebody paints
        self._idle = threading.Timer(IDLE, self.make_room)
        self._model: Any = None
        self._opened: tuple[str, str] | None = None  # (name, options)
        self._loaded: dict[tuple[str, int, int], str] = {}  # (path, time, size) of a file -> its name on the pipeline
        self._lenient: set[str] = set()  # those names whose base was not to be the adapter's own

    def paint(self, order: Order, tell: Callable[[Told], None], cancelled: threading.Event, person: str = "") -> None:
        """Paints `order`, telling of every step and picture; `cancelled` stops it within a denoising step.

        While others than `person` wait, they get a turn between two pictures.
        """
        check(order)
        with self.line.wish(person):
            each = order.num_images
            left = [(factor, i) for factor in order.factors for i in range(each)]
            while left and not cancelled.is_set():
                with self._turn(person, tell, cancelled) as mine:
                    if mine:
                        self._paint(order, left, len(order.factors) * each, tell, cancelled, person)

    def _paint(
        self, order: Order, left: list[tuple[float, int]], total: int, tell: Callable[[Told], None],
        cancelled: threading.Event, person: str,
    ) -> None:  # fmt: skip
        """Paints what is `left`, (factor, number) each, which it takes out, until the turn is over."""
        from svfit_dreambooth.adapter.file import read_adapter
        from svfit_dreambooth.painting.generate import generate

        adapters = [(path, read_adapter(path), strength) for path, strength in order.adapters]
        base, typed = order.base, True
        if base == AS_TRAINED:
            base, typed = (adapters[0][1].base_model, False) if adapters else (DEFAULT_BASE, True)
        model = self._open(base, typed, adapters[0][0].stem if adapters and not typed else None, tell)
        if cancelled.is_set():
            return
        tell(Told("loading"))
        strengths = self._exchange(model, adapters, order.allow_other_base)
        ends = time.monotonic() + SLICE
        over = False  # the turn, not the order

        def on_step(step: int, of: int) -> bool:
            tell(Told("step", number=total - len(left), pictures=total, step=step, of=of, factor=left[0][0]))
            return cancelled.is_set() or over

        def on_picture(picture: Any) -> None:
            nonlocal over
            factor, number = left[0][0], total - len(left)
            tell(Told("picture", picture=picture, number=number, pictures=total, factor=factor))
            left.pop(0)
            over = time.monotonic() > ends and self.line.others_wait(person)

        while left and not cancelled.is_set() and not over:
            factor, first = left[0]
            self._set(model, {name: strength * factor for name, strength in strengths.items()})
            generate(
                model,
                [order.prompt],
                num_images=order.num_images - first,
                seed=order.seed + first,
                num_inference_steps=order.num_inference_steps,
                guidance_scale=order.guidance_scale,
                negative_prompt=order.negative_prompt or None,
                height=order.height,
                width=order.width,
                on_picture=on_picture,
                on_denoising_step=on_step,
            )

    @contextmanager
    def bare(self, path: Path, person: str = "") -> Iterator[Any]:
        """The base that an adapter file names, without adapters, for nobody else meanwhile."""
        from svfit_dreambooth.adapter.file import read_adapter

        with self.line.wish(person), self._turn(person, lambda event: None, threading.Event()):
            model = self._open(read_adapter(path).base_model, False, path.stem, lambda event: None)
            self._exchange(model, [], False)
            yield model

    def make_room(self) -> None:
        """Takes the base off a GPU: now, or as soon as the pictures that are being painted are done."""
        self._room_wanted.set()
        if self.line.take_if_free():
            self._rest(None)

    @contextmanager
    def _turn(self, person: str, tell: Callable[[Told], None], cancelled: threading.Event) -> Iterator[bool]:
        """Waits for a turn; False: cancelled meanwhile."""
        if not self.line.take(person, cancelled, lambda: tell(Told("waiting"))):
            yield False
            return
        self._idle.cancel()
        try:
            yield not cancelled.is_set()
        finally:
            self._rest(person)

    def _rest(self, person: str | None) -> None:
        """Ends a turn; a base on a GPU leaves it if a run has asked for the room, else after a while."""
        try:
            if on_gpu(self._model):
                if self._room_wanted.is_set():
                    self._close()
                else:
                    self._idle = threading.Timer(IDLE, self.make_room)
                    self._idle.daemon = True
                    self._idle.start()
            self._room_wanted.clear()
        finally:
            self.line.give_back(person)

    def _open(self, name: str, typed: bool, adapter: str | None, tell: Callable[[Told], None]) -> Any:
        from svfit_dreambooth.bases.devices import DTYPES, default_device
        from svfit_dreambooth.bases.opening import is_cached, open_base_model

        try:
            place, options = self.bases.resolve(name, typed=typed)
        except SVFitError:
            if typed:
                raise
            check_held(name, str(adapter))
            raise SVFitError(
                f"{adapter} was trained on a base called {name!r}, which is not offered here: choose the base "
                f"yourself, or put its folder into {self.bases.models}."
            ) from None
        # a model that is open already serves both who typed its name and a file that names it
        key = (place, str(options.get("revision")))
        if self._opened != key:
            tell(Told("opening"))
            if options and not options["local_files_only"] and not is_cached(place, options["revision"]):
                check_on_hub(place, options["revision"])  # before the open one gives way
            self._close()
            try:
                model = open_base_model(place, **options)
            except SVFitError as error:
                if options.get("local_files_only"):
                    why = "what a file names is not downloaded unasked: type it as the base model under Generate."
                    why = why if self.bases.download else OFF
                    partly = "only partly" if is_cached(place, options["revision"]) else "not"
                    raise SVFitError(f"{name} is {partly} on this disk, and {why}") from error
                raise
            device = default_device()
            model.family.cast(DTYPES[self.dtype or working_dtype(device.type)])
            model.pipeline.to(device)
            self._model, self._opened = model, key
        return self._model

    def _close(self) -> None:
        import torch

        if self._model is not None:
            for module in self._model.pipeline.components.values():
                if isinstance(module, torch.nn.Module):
                    module.to("meta")  # gives its memory back, whoever still knows of it
        self._model, self._opened = None, None
        self._loaded.clear()
        self._lenient.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def _exchange(self, model: Any, adapters: Sequence[tuple[Path, Any, float]], any_base: bool) -> dict[str, float]:
        """Puts exactly `adapters` on the base; returns their names on the pipeline, with strengths."""
        from svfit_dreambooth.painting.loading import load_adapter

        wanted = {}
        for path, adapter, strength in adapters:
            stat = path.stat()
            wanted[(str(path), stat.st_mtime_ns, stat.st_size)] = (path, adapter, strength)
        for key in [key for key in wanted if self._loaded.get(key) in self._lenient and not any_base]:
            self._unload(model, key)  # what was let on then is looked at again
        # newcomers come before others leave, so that the directions stay in the layers
        strengths = {}
        leaving = {key: name for key, name in self._loaded.items() if key not in wanted}
        for key, (path, adapter, strength) in wanted.items():
            if key not in self._loaded:
                name, number = path.stem, 1
                while name in leaving.values() and number == 1:
                    old = next(old for old, taken in leaving.items() if taken == name)
                    self._unload(model, old)
                    del leaving[old]
                while name in self._loaded.values():
                    number += 1
                    name = f"{path.stem}-{number}"
                load_adapter(model.pipeline, adapter, 0.0, name, allow_other_base=any_base)
                self._loaded[key] = name
                if any_base:
                    self._lenient.add(name)
            strengths[self._loaded[key]] = strength
        for key in leaving:
            self._unload(model, key)
        return strengths

    def _unload(self, model: Any, key: tuple[str, int, int]) -> None:
        from svfit_dreambooth.painting.loading import unload_adapter

        unload_adapter(model.pipeline, self._loaded[key])
        self._lenient.discard(self._loaded.pop(key))

    def _set(self, model: Any, strengths: dict[str, float]) -> None:
        from svfit_dreambooth.painting.loading import set_adapters

        if strengths:
            set_adapters(model.pipeline, strengths)


def working_dtype(device: str) -> str:
    """The precision in which the base paints on such a device: on CUDA half, as diffusers' own examples have it."""
    return "float16" if device == "cuda" else "float32"


def on_gpu(model: Any) -> bool:
    """Does an open base take memory of a GPU?"""
    return model is not None and model.pipeline.device.type != "cpu"


def check(order: Order) -> None:
    """Raises SVFitError for an order that would never end or fit."""
    if not order.prompt.strip():
        raise SVFitError("the prompt is empty: say what to paint, such as “a photo of sks dog on the beach”.")
    for what, text in (("prompt", order.prompt), ("negative prompt", order.negative_prompt)):
        if len(text) > MAX_PROMPT:
            raise SVFitError(f"the {what} has {len(text):,} characters: {MAX_PROMPT:,} are the most.")
    for name, value, most in (
        ("number of pictures", order.num_images, MAX_PICTURES),
        ("number of steps", order.num_inference_steps, MAX_STEPS),
        ("width", order.width or 1, MAX_PIXELS),
        ("height", order.height or 1, MAX_PIXELS),
    ):
        if not 1 <= value <= most:
            raise SVFitError(f"the {name} is {value}: it must be between 1 and {most}.")
    if len({path for path, _ in order.adapters}) < len(order.adapters):
        raise SVFitError("an adapter is chosen twice: raise its strength instead.")
