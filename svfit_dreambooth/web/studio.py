"""One open base model that paints for everybody in turn: adapters are exchanged on it, the base stays.

What is opened is what a person chose: toybox, a model that the app's owner offers by name, or a hub id.  A name in an
adapter file opens only what is on this disk already, and never a path.
"""

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svfit_dreambooth.config import TOYBOX
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.options import base_name

MAX_PIXELS = 2048  # of a side
MAX_PICTURES = 64  # of one order
MAX_STEPS = 200
STRIP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
OFF = "downloads are off here: choose a base that is offered."
AS_TRAINED = "the adapters' own"  # the base that the first adapter names, or toybox


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
class Bases:
    """The base models that may be opened."""

    models: Path  # folder whose entries are offered by name
    extra: tuple[str, ...] = ()  # folders, files and hub ids that the owner named on the command line
    download: bool = True  # a hub id that a person typed may be fetched

    def names(self) -> list[str]:
        """What is offered without typing."""
        inside = [path.name for path in sorted(self.models.glob("*")) if _is_model(path)]
        return [TOYBOX, *inside, *(_shown(name) for name in self.extra)]

    def resolve(self, name: str, *, typed: bool) -> tuple[str, dict[str, Any]]:
        """What to open for `name`, and with which options of open_base_model.

        `typed`: a person asked for it, rather than a file.  Raises SVFitError for what is not offered.
        """
        from svfit_dreambooth.base_model import HUB_ID

        name = name.strip()
        if name == TOYBOX:
            return TOYBOX, {}
        for extra in self.extra:
            if name in (extra, _shown(extra)):
                return extra, {}
        models = [path for path in sorted(self.models.glob("*")) if _is_model(path)]
        for called in (lambda path: path.name, base_name, lambda path: path.stem):
            for path in models:
                if name == called(path):
                    return str(path), {}
        repository, _, revision = name.partition("@")
        if not HUB_ID.fullmatch(repository) or repository.startswith(".") or Path(repository).exists():
            raise SVFitError(
                f"{name!r} is no base model that is offered here: put its folder into {self.models}, start the page "
                "with --base FOLDER, or give a hub id such as owner/name."
            )
        if not typed:
            return repository, {"revision": revision or None, "local_files_only": True}
        return repository, {"revision": revision or None, "local_files_only": not self.download}

    def offline(self, place: str) -> bool:
        """Must whoever opens `place`, as `resolve` gave it, ask no network?  So with a hub id that only a visitor named."""
        return not self.download and place != TOYBOX and place not in self.extra and not Path(place).exists()

    def resolve_for_run(self, name: str) -> tuple[str, str | None]:
        """What a run opens for the `name` that a person typed: place and revision.

        Raises SVFitError for what is not offered, and for a hub id that is not on this disk where none is downloaded.
        """
        from huggingface_hub import try_to_load_from_cache

        place, options = self.resolve(name, typed=True)
        revision = options.get("revision")
        if options.get("local_files_only"):
            try:
                cached = try_to_load_from_cache(place, "model_index.json", revision=revision)
            except ValueError:  # no hub id after all
                cached = None
            if not isinstance(cached, str):
                raise SVFitError(f"{name.strip()} is not on this disk, and {OFF}")
        return place, revision


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

    def __init__(self, bases: Bases, dtype: str = "float32"):
        self.bases = bases
        self.dtype = dtype  # in which the base works, by the names of generation.DTYPES
        self._lock = threading.Lock()
        self._model: Any = None
        self._opened: tuple[str, str] | None = None  # (name, options)
        self._loaded: dict[tuple[str, int, int], str] = {}  # (path, time, size) of a file -> its name on the pipeline

    def paint(self, order: Order, tell: Callable[[Told], None], cancelled: threading.Event) -> None:
        """Paints `order`, telling of every step and picture; `cancelled` stops it within a denoising step."""
        check(order)
        with self._turn(tell, cancelled) as free:
            if not free:
                return
            from svfit_dreambooth.adapter import read_adapter
            from svfit_dreambooth.generation import generate

            adapters = [(path, read_adapter(path), strength) for path, strength in order.adapters]
            base, typed = order.base, True
            if base == AS_TRAINED:
                base, typed = (adapters[0][1].base_model, False) if adapters else (TOYBOX, True)
            model = self._open(base, typed, adapters[0][0].stem if adapters and not typed else None, tell)
            if cancelled.is_set():
                return
            tell(Told("loading"))
            strengths = self._exchange(model, adapters, order.allow_other_base)
            total = order.num_images * len(order.factors)
            done = 0
            for factor in order.factors:
                self._set(model, {name: strength * factor for name, strength in strengths.items()})

                def on_step(step: int, of: int, factor: float = factor) -> bool:
                    tell(Told("step", number=done, pictures=total, step=step, of=of, factor=factor))
                    return cancelled.is_set()

                def on_picture(picture: Any, factor: float = factor) -> None:
                    nonlocal done
                    tell(Told("picture", picture=picture, number=done, pictures=total, factor=factor))
                    done += 1

                generate(
                    model,
                    [order.prompt],
                    num_images=order.num_images,
                    seed=order.seed,
                    num_inference_steps=order.num_inference_steps,
                    guidance_scale=order.guidance_scale,
                    negative_prompt=order.negative_prompt or None,
                    height=order.height,
                    width=order.width,
                    on_picture=on_picture,
                    on_denoising_step=on_step,
                )
                if cancelled.is_set():
                    return

    @contextmanager
    def bare(self, path: Path) -> Iterator[Any]:
        """The base that an adapter file names, without adapters, for nobody else meanwhile."""
        from svfit_dreambooth.adapter import read_adapter

        with self._lock:
            model = self._open(read_adapter(path).base_model, False, path.stem, lambda event: None)
            self._exchange(model, [], False)
            yield model

    @contextmanager
    def _turn(self, tell: Callable[[Told], None], cancelled: threading.Event) -> Iterator[bool]:
        """Waits until nobody else paints; False: cancelled meanwhile."""
        if not self._lock.acquire(blocking=False):
            tell(Told("waiting"))
            while not self._lock.acquire(timeout=0.1):
                if cancelled.is_set():
                    yield False
                    return
        try:
            yield not cancelled.is_set()
        finally:
            self._lock.release()

    def _open(self, name: str, typed: bool, adapter: str | None, tell: Callable[[Told], None]) -> Any:
        from svfit_dreambooth.base_model import cast_pipeline, open_base_model
        from svfit_dreambooth.generation import DTYPES, default_device

        try:
            place, options = self.bases.resolve(name, typed=typed)
        except SVFitError:
            if typed:
                raise
            raise SVFitError(
                f"{adapter} was trained on a base called {name!r}, which is not offered here: choose the base "
                f"yourself, or put its folder into {self.bases.models}."
            ) from None
        # a model that is open already serves both who typed its name and a file that names it
        key = (place, str(options.get("revision")))
        if self._opened != key:
            tell(Told("opening"))
            self._close()
            try:
                model = open_base_model(place, **options)
            except SVFitError as error:
                if options.get("local_files_only"):
                    why = "what a file names is not downloaded unasked: type it as the base model under Generate."
                    why = why if self.bases.download else OFF
                    raise SVFitError(f"{name} is not on this disk, and {why}") from error
                raise
            cast_pipeline(model.pipeline, DTYPES[self.dtype])
            model.pipeline.to(default_device())
            self._model, self._opened = model, key
        return self._model

    def _close(self) -> None:
        self._model, self._opened = None, None
        self._loaded.clear()
        gc.collect()

    def _exchange(self, model: Any, adapters: Sequence[tuple[Path, Any, float]], any_base: bool) -> dict[str, float]:
        """Puts exactly `adapters` on the base; returns their names on the pipeline, with strengths."""
        from svfit_dreambooth.pipeline import load_adapter, unload_adapter

        wanted = {}
        for path, adapter, strength in adapters:
            stat = path.stat()
            wanted[(str(path), stat.st_mtime_ns, stat.st_size)] = (path, adapter, strength)
        # newcomers come before others leave, so that the directions stay in the layers
        strengths = {}
        leaving = {key: name for key, name in self._loaded.items() if key not in wanted}
        for key, (path, adapter, strength) in wanted.items():
            if key not in self._loaded:
                name, number = path.stem, 1
                while name in leaving.values() and number == 1:
                    old = next(old for old, taken in leaving.items() if taken == name)
                    unload_adapter(model.pipeline, name)
                    del leaving[old], self._loaded[old]
                while name in self._loaded.values():
                    number += 1
                    name = f"{path.stem}-{number}"
                load_adapter(model.pipeline, adapter, 0.0, name, allow_other_base=any_base)
                self._loaded[key] = name
            strengths[self._loaded[key]] = strength
        for key, name in leaving.items():
            unload_adapter(model.pipeline, name)
            del self._loaded[key]
        return strengths

    def _set(self, model: Any, strengths: dict[str, float]) -> None:
        from svfit_dreambooth.pipeline import set_adapters

        if strengths:
            set_adapters(model.pipeline, strengths)


def check(order: Order) -> None:
    """Raises SVFitError for an order that would never end or fit."""
    if not order.prompt.strip():
        raise SVFitError("the prompt is empty: say what to paint, such as “a photo of sks dog on the beach”.")
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


def _is_model(path: Path) -> bool:
    return path.name[0] != "." and ((path / "model_index.json").is_file() or path.suffix == ".safetensors")


def _shown(name: str) -> str:
    """A base of the command line, as the page and the adapters trained on it call it."""
    path = Path(name)
    return base_name(path) if path.exists() else name
