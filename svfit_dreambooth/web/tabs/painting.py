"""What the painting tab does when something is pressed: orders to the studio, its answers to the page."""

import html
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms import library, pictures
from svfit_dreambooth.web.rooms.app import App
from svfit_dreambooth.web.rooms.memory import remember, remembered
from svfit_dreambooth.web.rooms.paintings import Made, Painting
from svfit_dreambooth.web.rooms.studio import AS_TRAINED, STRIP, Order, Told
from svfit_dreambooth.web.rooms.workspace import Visitor, library_of
from svfit_dreambooth.web.tabs.mistakes import number, plainly, whole
from svfit_dreambooth.web.tabs.reuse import ONCE, take_up

COMPARED, STRENGTHS = "beside the base model", "strengths 0 to 1.5"
FACTORS: dict[str, tuple[float, ...]] = {ONCE: (1.0,), COMPARED: (0.0, 1.0), STRENGTHS: STRIP}
SEEDS = 1_000_000  # a new one is chosen among: few enough digits to be told to a friend
REMEMBERED = (
    "prompt", "negative_prompt", "num_images", "num_inference_steps_painting", "guidance_scale", "seed_painting",
    "new_seed", "width", "height",
)  # fmt: skip
IDLE = '<div class="status" role="status"></div>'
UNSELECTED = '<div class="settings">Select a picture to see how it was made.</div>'


class Painter:
    """The handlers, for all visitors."""

    def __init__(self, app: App):
        self.app = app

    @plainly
    def open_page(self, request: gr.Request) -> tuple[Any, ...]:
        """Base models, adapters, pictures, their names, prompt, what was filled in, and whether there is work to stop."""
        visitor = self.app.visitor(request)
        choices, value = self.app.adapter_choices(visitor), self.app.offers()
        words = self.words(visitor, value)
        form = remembered(visitor.folder)
        names = pictures.earlier(visitor.pictures)
        return (
            gr.Dropdown([AS_TRAINED, *self.app.studio.bases.names()]),
            gr.Dropdown(choices, value=value),
            self._gallery(visitor, names),
            names,
            form.get("prompt") or words,
            words,
            gr.Button(interactive=bool(self.app.paintings.of(visitor))),
        )

    @plainly
    def remember(self, request: gr.Request, *values: Any) -> None:
        """Keeps the values of REMEMBERED for when the page is opened again."""
        remember(self.app.visitor(request).folder, dict(zip(REMEMBERED, values, strict=True)))

    @plainly
    def recall(self, request: gr.Request) -> tuple[Any, ...]:
        """The values of REMEMBERED but the first, which `open_page` brings."""
        form = remembered(self.app.visitor(request).folder)
        return tuple(form.get(name, gr.skip()) for name in REMEMBERED[1:])

    def at_the_start(self) -> tuple[list[tuple[str, str]], list[str]]:
        """Adapters offered and chosen while it is not known yet who asks."""
        workspace = self.app.workspace
        if not workspace.shared:
            return [], []
        choices = [(name, f"library/{name}") for name in library.names(library_of(workspace, ""))]
        return choices, self.app.offers()

    def words(self, visitor: Visitor, choices: list[str]) -> str:
        """The prompt of the first adapter that has one."""
        for choice in choices:
            path = self.app.adapter_file(visitor, choice)
            if prompt := library.entry(path.parent, path.stem).instance_prompt:
                return prompt
        return ""

    @plainly
    def fill_in(self, values: list[str] | None, prompt: str, filled: str, request: gr.Request) -> tuple[Any, Any]:
        """Prompt and what was filled in: the adapter's words, unless the person wrote something."""
        if prompt.strip() and prompt.strip() != filled.strip():
            return gr.skip(), gr.skip()
        words = self.words(self.app.visitor(request), values or [])
        return words, words

    @plainly
    def generate(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Status, gallery, names in it, selected, details, seed, and five buttons."""
        visitor = self.app.visitor(request)
        order = self._order(visitor, *values)
        try:
            painting = self.app.paintings.begin(visitor, order)
        except SVFitError:
            yield (*[gr.skip()] * 7, gr.Button(interactive=bool(self.app.paintings.of(visitor))), *[gr.skip()] * 4)
            raise
        yield from self._watch(painting)

    @plainly
    def follow(self, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """The same for a page that opens while pictures are being painted: they were asked for before it was reloaded."""
        working = self.app.paintings.of(self.app.visitor(request))
        yield (gr.skip(),) * 12  # a generator that yields nothing would empty all fields
        for painting in working[:1]:
            yield from self._watch(painting)

    def _watch(self, painting: Painting) -> Iterator[tuple[Any, ...]]:
        """What `generate` shows until a painting is over; whoever stops looking ends nothing at once."""
        keep, off, order = gr.skip(), gr.Button(interactive=False), painting.order
        busy = (gr.Button(interactive=False), gr.Button(interactive=True))
        empty = gr.Gallery([], selected_index=None, preview=False)  # not the large view of an earlier picture
        yield (_status("Starting"), empty, [], None, UNSELECTED, order.seed, *busy, off, off, off, off)
        seen, count = 0, 0
        while not painting.over:
            if (number := painting.look(seen)) == seen:
                continue
            seen, gallery, names = number, keep, keep
            if len(painting.made) > count:
                count = len(painting.made)
                made = _arranged(painting.made[:count], order.factors)
                gallery = [(self.app.serve(one.path), _caption(one, order)) for one in made]
                names = [one.path.name for one in made]
            yield (_progress(painting.said), gallery, names, *[keep] * 9)
        made = _arranged(painting.made, order.factors)
        idle = (gr.Button(interactive=True), gr.Button(interactive=False))
        text = f"{len(made)} picture{'s' * (len(made) != 1)}"
        text = f"Stopped after {text}." if len(made) < order.num_images * len(order.factors) else f"{text} done."
        gallery = [(self.app.serve(one.path), _caption(one, order)) for one in made]
        names = [one.path.name for one in made]
        status = _status(text) if painting.failure is None else IDLE
        yield (status, gallery, names, *[keep] * 3, *idle, *[keep] * 4)
        if painting.failure is not None:
            raise painting.failure

    def _order(self, visitor: Visitor, *values: Any) -> Order:
        """The form as an order."""
        (prompt, negative, base, adapters, count, steps, guidance, seed, new_seed, width, height, mode, relatives) = (
            values[:13]
        )
        adapters = adapters or []
        if len(values) - 13 != len(adapters):
            raise SVFitError("the adapters have just changed: press Generate again.")
        if mode not in FACTORS:
            raise SVFitError(f"there is no comparison called {mode!r}: choose one of those offered.")
        if mode != ONCE and not adapters:
            raise SVFitError("there is nothing to compare without an adapter: choose one.")
        order = Order(
            prompt=(prompt or "").strip(),
            base=base or AS_TRAINED,
            adapters=[
                (self.app.adapter_file(visitor, choice), float(strength))
                for choice, strength in zip(adapters, values[13:], strict=True)
            ],
            negative_prompt=(negative or "").strip(),
            num_images=int(count),
            seed=random.randrange(SEEDS) if new_seed or seed is None else int(seed) % 2**63,
            num_inference_steps=int(steps),
            guidance_scale=number("Guidance", guidance),
            width=whole("Width", width),
            height=whole("Height", height),
            factors=FACTORS[mode],
            allow_other_base=bool(relatives),
        )
        if mode == STRENGTHS:
            order.num_images = 1
        return order

    @plainly
    def stop(self, request: gr.Request) -> tuple[str, Any]:
        """Status and button; ends the visitor's painting, of whichever tab, within one denoising step."""
        working = self.app.paintings.of(self.app.visitor(request))
        for painting in working:
            painting.set()
        return _status("Stopping") if working else IDLE, gr.Button(interactive=False)

    @plainly
    def select(self, event: gr.SelectData, names: list[str], request: gr.Request) -> tuple[Any, ...]:
        """Selected, details, and the four buttons, for the picture that was clicked."""
        visitor = self.app.visitor(request)
        index = event.index if isinstance(event.index, int) else 0
        path = pictures.find(visitor.pictures, names[index] if index < len(names) else None)
        lines = pictures.describe(pictures.read_settings(path))
        text = " · ".join(f"<b>{html.escape(name)}</b> {html.escape(value)}" for name, value in lines)
        on = gr.Button(interactive=True)
        download = gr.DownloadButton(value=self.app.serve(path), interactive=True)
        return path.name, f'<div class="settings">{text}</div>', on, download, on, on

    @plainly
    def reuse(self, name: str, request: gr.Request) -> tuple[Any, ...]:
        visitor = self.app.visitor(request)
        return take_up(self.app, visitor, pictures.read_settings(pictures.find(visitor.pictures, name)))

    @plainly
    def reuse_file(self, upload: str, request: gr.Request) -> tuple[Any, ...]:
        return take_up(self.app, self.app.visitor(request), pictures.read_settings(Path(upload)))

    @plainly
    def delete(self, name: str, names: list[str], request: gr.Request) -> tuple[Any, ...]:
        """Gallery, names, selected, details and the four buttons after a picture is gone."""
        visitor = self.app.visitor(request)
        pictures.find(visitor.pictures, name).unlink()
        left = [other for other in names if other != name]
        off = gr.Button(interactive=False)
        return self._gallery(visitor, left), left, None, UNSELECTED, off, gr.DownloadButton(interactive=False), off, off

    @plainly
    def cover(self, name: str, request: gr.Request) -> None:
        """The selected picture becomes that of the adapter it was made with."""
        visitor = self.app.visitor(request)
        path = pictures.find(visitor.pictures, name)
        adapters = pictures.read_settings(path)["adapters"]
        if len(adapters) != 1:
            raise SVFitError("this picture was not made with exactly one adapter: choose another one.")
        library.set_picture(visitor.library, next(iter(adapters)), path)
        gr.Info(html.escape(f"{next(iter(adapters))} shows this picture in the library now."))

    @plainly
    def history(self, request: gr.Request) -> tuple[Any, ...]:
        """Gallery and names: what was painted before."""
        visitor = self.app.visitor(request)
        names = pictures.earlier(visitor.pictures)
        if not names:
            gr.Info("There are no pictures yet: press Generate.")
        return self._gallery(visitor, names), names

    @plainly
    def upload(self, file: str, values: list[str] | None, request: gr.Request) -> Any:
        """The dropdown with an uploaded adapter chosen; only this visitor can use it."""
        visitor = self.app.visitor(request)
        name = library.add(visitor.uploads, Path(file))
        return gr.Dropdown(self.app.adapter_choices(visitor), value=[*(values or []), f"upload/{name}"])

    def _gallery(self, visitor: Visitor, names: list[str]) -> list[tuple[str, str]]:
        items = []
        for name in names:
            path = visitor.pictures / name
            try:
                items.append((self.app.serve(path), pictures.caption(pictures.read_settings(path))))
            except (SVFitError, OSError):
                if path.is_file():
                    items.append((self.app.serve(path), ""))
        return items


def _arranged(made: list[Made], factors: Sequence[float]) -> list[Made]:
    """Beside the base: each base picture before the adapter's of the same seed."""
    if tuple(factors) != FACTORS[COMPARED]:
        return made
    base, adapted = ([one for one in made if one.factor == factor] for factor in factors)
    pairs = [one for pair in zip(base, adapted, strict=False) for one in pair]
    return pairs + base[len(adapted) :]


def _caption(made: Made, order: Order) -> str:
    text = pictures.caption(made.settings, made.factor if len(order.factors) > 1 else 1.0)
    return "blacked out by the content filter · " + text if made.filtered else text


def _status(text: str, share: float | None = None) -> str:
    bar = "" if share is None else f'<div class="bar"><i style="width:{share:.1%}"></i></div>'
    return f'<div class="status" role="status"><div class="head"><span>{html.escape(text)}</span></div>{bar}</div>'


def _progress(event: Told) -> str:
    if event.kind == "starting":
        return _status("Starting")
    if event.kind == "waiting":
        return _status("Waiting: somebody else's pictures are being painted")
    if event.kind == "opening":
        return _status("Opening the base model")
    if event.kind == "loading":
        return _status("Putting the adapters on")
    done = event.number + (1 if event.kind == "picture" else event.step / max(event.of, 1))
    text = f"Picture {event.number + 1} of {event.pictures}"
    return _status(text + (f" · step {event.step} of {event.of}" if event.of else ""), done / event.pictures)
