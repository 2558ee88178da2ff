"""One open base model that paints for everybody in turn: adapters are exchanged on it, the base stays.

What different people ask of one base at the same time is painted in one batch, a picture of each.  A long order lets
others in between its pictures.  On a GPU the base leaves when a run needs the room, and when nobody has painted for a while.
"""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svfit_dreambooth.bases.names import check_held
from svfit_dreambooth.bases.quantizing import empty
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms.bases import OFF, Bases, check_on_hub
from svfit_dreambooth.web.rooms.libraries import libraries
from svfit_dreambooth.web.rooms.loaded import Loaded
from svfit_dreambooth.web.rooms.orders import Order, Told, check
from svfit_dreambooth.web.rooms.tickets import Ticket
from svfit_dreambooth.web.rooms.together import paint_together
from svfit_dreambooth.web.rooms.turns import Line

MAX_ORDERS = 8  # of one person that are painted or wait
MAX_ORDERS_ALL = 40
SLICE = 20.0  # seconds after which an order lets others have a turn
TOGETHER = 4  # pictures of different people that are painted at once
IDLE = 600.0  # seconds after which a base that nobody paints with leaves the GPU


class Studio:
    """Holds at most one open base model."""

    def __init__(self, bases: Bases, dtype: str | None = None):
        self.bases = bases
        self.dtype = dtype  # in which the base works, by the names of devices.DTYPES; None: see `working_dtype`
        self.line = Line(MAX_ORDERS, MAX_ORDERS_ALL)
        self._tickets: list[Ticket] = []
        self._changing = threading.Lock()  # held while the list of tickets changes
        self._room_wanted = threading.Event()  # by a run, while somebody paints
        self._idle = threading.Timer(IDLE, self.make_room)
        self._model: Any = None
        self._opened: tuple[Any, ...] | None = None  # (name, options)
        self._loaded = Loaded()

    def paint(self, order: Order, tell: Callable[[Told], None], cancelled: threading.Event, person: str = "") -> None:
        """Paints `order`, telling of every step and picture; `cancelled` stops it within a denoising step.

        While others than `person` wait, they get a turn between two pictures; what they ask of the same base in the same
        way is painted along.
        """
        check(order)
        libraries()
        with self.line.wish(person):
            ticket = Ticket(order, tell, cancelled, person)
            with self._changing:
                self._tickets.append(ticket)
            try:
                while not ticket.is_set():
                    with self._turn(person, lambda: ticket.tell("waiting"), ticket) as mine:
                        if mine:
                            self._paint(ticket)
            finally:
                with self._changing:
                    self._tickets.remove(ticket)

    def _paint(self, ticket: Ticket) -> None:
        """Paints what is left of an order, until the turn is over."""
        order = ticket.order
        model = self._open(ticket.base, ticket.typed, order.adapters[0][0].stem if order.adapters else None, ticket)
        if ticket.is_set():
            return
        ticket.tell("loading")
        ends = time.monotonic() + SLICE
        while not ticket.is_set():
            companions = self._companions(ticket)
            if companions:
                paint_together(model, self._loaded, [ticket, *companions])
            else:
                self._paint_alone(model, ticket, ends)
            if time.monotonic() > ends and self.line.others_wait(ticket.person):
                return

    def _paint_alone(self, model: Any, ticket: Ticket, ends: float) -> None:
        """Paints the pictures of the next cell, until others may have a turn or can be painted along."""
        from svfit_dreambooth.painting.generate import generate
        from svfit_dreambooth.painting.loading import set_adapters

        order, (cell, first), over = ticket.order, ticket.left[0], False
        names = self._loaded.exchange(model, ticket.adapters, order.allow_other_base)
        if names:
            set_adapters(model.pipeline, dict(zip(names, order.strengths(cell), strict=True)))

        def on_step(step: int, of: int) -> bool:
            ticket.tell("step", step=step, of=of)
            return ticket.cancelled.is_set() or over

        def on_picture(picture: Any) -> None:
            nonlocal over
            ticket.done(picture)
            over = time.monotonic() > ends and self.line.others_wait(ticket.person) or bool(self._companions(ticket))

        generate(
            model,
            [order.prompt],
            num_images=order.num_images - first,
            seed=order.seed + first,
            negative_prompt=order.negative_prompt or None,
            on_picture=on_picture,
            on_denoising_step=on_step,
            **order.settings(cell),
        )

    def _companions(self, ticket: Ticket) -> list[Ticket]:
        """Orders that wait, of which a picture each can be painted in one batch with the next one of `ticket`."""
        if ticket.alone or not ticket.left:
            return []
        with self._changing:
            waiting = [
                other for other in self._tickets if other is not ticket and not other.alone and not other.is_set()
            ]
        return [other for other in waiting if self._alike(ticket, other)][: TOGETHER - 1]

    def _alike(self, one: Ticket, other: Ticket) -> bool:
        left = other.left[:1]  # which another thread never takes away: only the one whose turn it is paints
        if not left or one.order.allow_other_base != other.order.allow_other_base:
            return False
        if one.order.settings(one.left[0][0]) != other.order.settings(left[0][0]):
            return False
        try:
            place, options = self.bases.resolve(other.base, typed=other.typed)
        except SVFitError:  # it is told when it has its turn
            return False
        return (place, str(options.get("revision")), *other.order.opened) == self._opened

    @contextmanager
    def bare(self, path: Path, person: str = "") -> Iterator[Any]:
        """The base that an adapter file names, without adapters, for nobody else meanwhile."""
        libraries()
        from svfit_dreambooth.adapter.file import read_adapter

        with self.line.wish(person), self._turn(person, lambda: None, threading.Event()):
            model = self._open(read_adapter(path).base_model, False, path.stem)
            self._loaded.exchange(model, [], False)
            yield model

    def make_room(self) -> None:
        """Takes the base off a GPU: now, or as soon as the pictures that are being painted are done."""
        self._room_wanted.set()
        if self.line.take_if_free():
            self._rest(None)

    @contextmanager
    def _turn(self, person: str, on_wait: Callable[[], None], cancelled: Any) -> Iterator[bool]:
        """Waits for a turn; False: cancelled meanwhile."""
        if not self.line.take(person, cancelled, on_wait):
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

    def _open(self, name: str, typed: bool, adapter: str | None, ticket: Ticket | None = None) -> Any:
        from svfit_dreambooth.bases.devices import DTYPES, default_device
        from svfit_dreambooth.bases.hub import is_cached
        from svfit_dreambooth.bases.opening import exchange_autoencoder, open_base_model
        from svfit_dreambooth.bases.outline import check_wishes

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
        autoencoder, quantize, trained_on = wishes = ("", None, "") if ticket is None else ticket.order.opened
        key = (place, str(options.get("revision")), *wishes)
        if self._opened != key:
            if ticket is not None:
                ticket.tell("opening")
            if options and not options["local_files_only"] and not is_cached(place, options["revision"]):
                check_on_hub(place, options["revision"])  # before the open one gives way
            vae = self.bases.resolve_autoencoder(autoencoder) if autoencoder else None
            sibling, its_revision = self.bases.resolve_for_run(trained_on) if trained_on else (None, None)
            check_wishes(
                place, revision=options.get("revision"), pretrained_vae_model_name_or_path=vae, quantize=quantize
            )
            self._close()
            quiet = not self.bases.download
            try:
                model = open_base_model(place, **options, quantize=quantize)
            except SVFitError as error:
                if options.get("local_files_only"):
                    why = "what a file names is not downloaded unasked: type it as the base model under Generate."
                    why = why if self.bases.download else OFF
                    partly = "only partly" if is_cached(place, options["revision"]) else "not"
                    raise SVFitError(f"{name} is {partly} on this disk, and {why}") from error
                raise
            exchange_autoencoder(model, vae, quiet)
            directions = None
            if sibling is not None:
                directions = open_base_model(sibling, revision=its_revision, one_at_a_time=True, local_files_only=quiet)
            device = default_device()
            model.family.cast(DTYPES[self.dtype or working_dtype(device.type)])
            model.pipeline.to(device)
            self._model, self._opened = model, key
            self._loaded.directions_of(model, directions)
        return self._model

    def _close(self) -> None:
        import torch

        if self._model is not None:
            for module in self._model.pipeline.components.values():
                if isinstance(module, torch.nn.Module):
                    empty(module)
        self._model, self._opened = None, None
        self._loaded.clear()
        gc.collect()
        torch.cuda.empty_cache()


def working_dtype(device: str) -> str:
    """The precision in which the base paints on such a device: on CUDA half, as diffusers' own examples have it."""
    return "float16" if device == "cuda" else "float32"


def on_gpu(model: Any) -> bool:
    """Does an open base take memory of a GPU?"""
    return model is not None and model.pipeline.device.type != "cpu"
