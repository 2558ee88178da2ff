"""What the painting tab does when something is pressed: orders to the studio, its answers to the page."""

import html
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import save_png
from svfit_dreambooth.web.rooms import library, pictures
from svfit_dreambooth.web.rooms.app import App
from svfit_dreambooth.web.rooms.libraries import libraries
from svfit_dreambooth.web.rooms.memory import remember, remembered
from svfit_dreambooth.web.rooms.orders import AS_TRAINED, Cell, Order, Told
from svfit_dreambooth.web.rooms.paintings import Made, Painting
from svfit_dreambooth.web.rooms.workspace import Visitor, library_of, place_to_serve
from svfit_dreambooth.web.tabs.compare import GRID, STRENGTHS, arranged, cells, label, sheet
from svfit_dreambooth.web.tabs.drawing import drawn_over
from svfit_dreambooth.web.tabs.form import PAINTING, bits_of, in_form_words
from svfit_dreambooth.web.tabs.gallery import UNSELECTED, Pictures
from svfit_dreambooth.web.tabs.mistakes import number, plainly, whole
from svfit_dreambooth.web.tabs.reuse import LARGEST_SEED, SAMPLERS, take_up

SEEDS = 1_000_000  # a new one is chosen among: few enough digits to be told to a friend
REMEMBERED = (
    "prompt", "negative_prompt", "num_images", "num_inference_steps_painting", "guidance_scale", "seed_painting",
    "new_seed", "width", "height", "scheduler", "base_painting", "clip_skip_painting", "guidance_rescale", "vae_painting",
    "quantize_painting", "trained_on", "other_base",
)  # fmt: skip
CHOSEN = "adapters_painting"  # as what the chosen adapters are remembered, one a line
STRENGTH = "strength of "  # and an adapter: as what its strength is
IDLE = '<div class="status" role="status"></div>'
FIELDS = 25  # of the form; what follows are the strengths of the chosen adapters


class Painter:
    """The handlers, for all visitors."""

    def __init__(self, app: App):
        self.app = app
        self.pictures = Pictures(app)

    @plainly
    def open_page(self, request: gr.Request) -> tuple[Any, ...]:
        """Base models, adapters, pictures, their names, prompt, what was filled in, strengths, whether there is work to stop."""
        visitor = self.app.visitor(request)
        choices, form = self.app.adapter_choices(visitor), remembered(visitor.folder)
        chosen = str(form.get(CHOSEN) or "").splitlines()
        value = self.app.offers() or [one for one in chosen if one in [value for _, value in choices]]
        words = self.words(visitor, value)
        names = pictures.earlier(visitor.pictures)
        return (
            gr.Dropdown([AS_TRAINED, *self.app.studio.bases.names()]),
            gr.Dropdown(choices, value=value),
            self.pictures.shown(visitor, names),
            names,
            form.get("prompt") or words,
            words,
            {one: strength for one in value if isinstance(strength := form.get(STRENGTH + one), int | float)},
            gr.Button(interactive=bool(self.app.paintings.of(visitor))),
        )

    @plainly
    def remember(self, request: gr.Request, *values: Any) -> None:
        """Keeps the values of REMEMBERED for when the page is opened again."""
        remember(self.app.visitor(request).folder, dict(zip(REMEMBERED, values, strict=True)))

    @plainly
    def remember_strength(self, choice: str, strength: float, request: gr.Request) -> None:
        remember(self.app.visitor(request).folder, {STRENGTH + choice: strength})

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
        """Prompt and what was filled in: the adapter's words, unless the person wrote something.  The choice is kept."""
        remember(self.app.visitor(request).folder, {CHOSEN: "\n".join(values or [])})
        if prompt.strip() and prompt.strip() != filled.strip():
            return gr.skip(), gr.skip()
        words = self.words(self.app.visitor(request), values or [])
        return words, words

    @plainly
    def generate(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Status, gallery, names in it, selected, details, seed, and six buttons."""
        visitor = self.app.visitor(request)
        order = self._order(visitor, *values)
        try:
            painting = self.app.paintings.begin(visitor, order)
        except SVFitError:
            yield (*[gr.skip()] * 7, gr.Button(interactive=bool(self.app.paintings.of(visitor))), *[gr.skip()] * 5)
            raise
        yield from self._watch(painting)

    @plainly
    def follow(self, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """The same for a page that opens while pictures are being painted: they were asked for before it was reloaded."""
        working = self.app.paintings.of(self.app.visitor(request))
        yield (gr.skip(),) * 13  # a generator that yields nothing would empty all fields
        for painting in working[:1]:
            yield from self._watch(painting)

    def _watch(self, painting: Painting) -> Iterator[tuple[Any, ...]]:
        """What `generate` shows until a painting is over; whoever stops looking ends nothing at once."""
        keep, off, order = gr.skip(), gr.Button(interactive=False), painting.order
        busy = (gr.Button(interactive=False), gr.Button(interactive=True))
        empty = gr.Gallery([], selected_index=None, preview=False)  # not the large view of an earlier picture
        yield (
            _status("Starting"),
            empty,
            [],
            [],
            UNSELECTED,
            order.seed,
            *busy,
            off,
            off,
            off,
            off,
            gr.DownloadButton(visible=False),
        )
        seen, count = 0, 0
        while not painting.over:
            if (number := painting.look(seen)) == seen:
                continue
            seen, gallery, names = number, keep, keep
            if len(painting.made) > count:
                count = len(painting.made)
                made = arranged(painting.made[:count], order.cells)
                gallery = [(self.app.serve(one.path), _caption(one, order)) for one in made]
                names = [one.path.name for one in made]
            yield (_progress(painting.said), gallery, names, *[keep] * 10)
        made = arranged(painting.made, order.cells)
        idle = (gr.Button(interactive=True), gr.Button(interactive=False))
        text = f"{len(made)} picture{'s' * (len(made) != 1)}"
        text = f"Stopped after {text}." if len(made) < order.num_images * len(order.cells) else f"{text} done."
        gallery = [(self.app.serve(one.path), _caption(one, order)) for one in made]
        names = [one.path.name for one in made]
        status = _status(text) if painting.failure is None else IDLE
        yield (status, gallery, names, *[keep] * 3, *idle, *[keep] * 4, self._sheet(made, order))
        if painting.failure is not None:
            if isinstance(painting.failure, SVFitError):
                raise SVFitError(in_form_words(str(painting.failure), painting.failure.parameters, PAINTING))
            raise painting.failure

    def _sheet(self, made: list[Made], order: Order) -> Any:
        """The button that downloads a comparison as one picture; none where there was nothing to compare."""
        if len(made) < 2 or len(order.cells) < 2:
            return gr.DownloadButton(visible=False)
        place = place_to_serve(self.app.workspace, f"{made[0].path.stem}-sheet.png")
        save_png(sheet(made, order), place)
        return gr.DownloadButton(value=str(place), visible=True)

    def _order(self, visitor: Visitor, *values: Any) -> Order:
        """The form as an order."""
        (
            prompt, negative, base, adapters, count, steps, guidance, seed, new_seed, width, height, mode, relatives,
            sampler, begin, anew, skip, rescale, autoencoder, bits, trained_on, *axes,
        ) = values[:FIELDS]  # fmt: skip
        adapters = adapters or []
        if len(values) - FIELDS != len(adapters):
            raise SVFitError("the adapters have just changed: press Generate again.")
        compared = cells(mode, list(zip(axes[::2], axes[1::2], strict=True)), len(adapters))
        order = Order(
            prompt=(prompt or "").strip(),
            base=base or AS_TRAINED,
            adapters=[
                (self.app.adapter_file(visitor, choice), float(strength))
                for choice, strength in zip(adapters, values[FIELDS:], strict=True)
            ],
            negative_prompt=(negative or "").strip(),
            num_images=int(count),
            seed=random.randrange(SEEDS) if new_seed or seed is None else _seed(seed),
            num_inference_steps=whole("Sampling steps", steps),
            guidance_scale=number("Guidance", guidance),
            guidance_rescale=number("Guidance rescale", rescale),
            width=whole("Width", width),
            height=whole("Height", height),
            scheduler=sampler if sampler in SAMPLERS else None,
            clip_skip=whole("Clip skip", skip),
            autoencoder=(autoencoder or "").strip(),
            quantize=bits_of(bits),
            trained_on=(trained_on or "").strip(),
            begin=begin_from(begin, float(anew)),
            cells=compared,
            allow_other_base=bool(relatives),
        )
        if mode in (STRENGTHS, GRID):
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
    def reuse(self, chosen: list[str], request: gr.Request) -> tuple[Any, ...]:
        return self._taken_up(request, pictures.find(self.app.visitor(request).pictures, next(iter(chosen), None)))

    @plainly
    def reuse_file(self, upload: str, request: gr.Request) -> tuple[Any, ...]:
        return self._taken_up(request, Path(upload))

    def _taken_up(self, request: gr.Request, picture: Path) -> tuple[Any, ...]:
        """The form by the settings in a picture; its strengths are remembered, as if they had been chosen."""
        visitor = self.app.visitor(request)
        *form, strengths = take_up(self.app, visitor, pictures.read_settings(picture))
        remember(visitor.folder, {STRENGTH + choice: strength for choice, strength in strengths.items()})
        return *form, strengths

    @plainly
    def said_before(self, request: gr.Request) -> Any:
        """The dropdown of earlier prompts."""
        return gr.Dropdown(pictures.prompts(self.app.visitor(request).pictures), value=None)

    @plainly
    def upload(self, file: str, values: list[str] | None, request: gr.Request) -> Any:
        """The dropdown with an uploaded adapter chosen; only this visitor can use it."""
        visitor = self.app.visitor(request)
        name = library.add(visitor.uploads, Path(file))
        return gr.Dropdown(self.app.adapter_choices(visitor), value=[*(values or []), f"upload/{name}"])


def _seed(value: float) -> int:
    """A seed as it was typed.  Raises SVFitError for one that would not be the same when it comes back."""
    if not 0 <= value <= LARGEST_SEED:
        raise SVFitError(
            f"“Seed” is {value:.0f}: write a whole number from 0 to {LARGEST_SEED}, or tick “A new seed each time”."
        )
    return int(value)


def begin_from(drawn: dict[str, Any] | None, anew: float) -> Any:
    """What painting begins with, as the editor gives it: a picture, and what was drawn over it as the mask; None: noise."""
    if not drawn or drawn.get("background") is None:
        return None
    libraries()
    from svfit_dreambooth.painting.from_picture import Begin

    picture = drawn["background"].convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return Begin(on_white, anew, drawn_over(drawn))


def _caption(made: Made, order: Order) -> str:
    different = label(made.cell, Cell(), order.adapters) if len(order.cells) > 1 else ""
    text = pictures.caption(made.settings, different)
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
