"""What a visitor lays out for the next run: photos, words, settings; and what it would take."""

import dataclasses
import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from svfit_dreambooth.bases.names import DEFAULT_BASE, SUBJECTS_FOLDER, as_asked
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.presets import DEFAULT
from svfit_dreambooth.web.rooms.app import App
from svfit_dreambooth.web.rooms.bases import FOR_PHOTOS
from svfit_dreambooth.web.rooms.jobs import Job
from svfit_dreambooth.web.rooms.laid_out import (
    add_photos,
    bundled,
    bundled_subjects,
    caption,
    photo_files,
    photo_remarks,
    remove_photo,
    remove_photos,
    rotate_photo,
    set_caption,
    set_mask,
    take_bundled,
    thumbnail,
    touched,
)
from svfit_dreambooth.web.rooms.memory import remember, remembered
from svfit_dreambooth.web.rooms.windows import training_windows
from svfit_dreambooth.web.rooms.workspace import Visitor
from svfit_dreambooth.web.tabs.drawing import drawn_over, to_draw_on
from svfit_dreambooth.web.tabs.form import (
    ADVANCED,
    LABELS,
    NUMBERS,
    VAE,
    as_written,
    bits_of,
    check_base,
    worded,
)
from svfit_dreambooth.web.tabs.mistakes import number, plainly, whole

REMEMBERED = ("name", "word", "kind", "base", "preset", *ADVANCED)
RESOLUTION = 512  # pixels at which bases train at least; an SDXL at 1024, which is known when it is open
EMBEDDED_RESOLUTION = 64
NAMES = {field.name for field in dataclasses.fields(TrainConfig)}  # options that a run knows


class Draft:
    """The handlers; the photos are in the visitor's folder, the rest is in the form."""

    def __init__(self, app: App):
        self.app = app

    @plainly
    def add(
        self, files: list[str] | None, base: str, resolution: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """How far it is; at the end the drop zone, emptied, then thumbnails, remarks and the selected photo."""
        visitor, files, keep = self.app.visitor(request), files or [], gr.skip()
        touched(visitor.photos)
        for i, file in enumerate(files, 1):
            if len(files) > 1:
                yield keep, keep, f"Looking at photo {i} of {len(files)} …", keep, keep
            for sentence in add_photos(visitor.photos, [Path(file)]):
                gr.Warning(html.escape(sentence), duration=12)
            Path(file).unlink(missing_ok=True)  # tells of place and camera
        yield (None, *self._shown(visitor, base, resolution))

    @plainly
    def take_bundled(self, subject: str | None, resolution: str, request: gr.Request) -> tuple[Any, ...]:
        """The photos of a bundled toy, in place of what was there; then the words that suit it."""
        visitor = self.app.visitor(request)
        if subject not in bundled_subjects():
            raise SVFitError(f"there is no toy called {subject!r}: choose one of those offered.")
        take_bundled(visitor.photos, subject)
        words = (subject, "sks", subject.partition("_")[0], DEFAULT_BASE)
        remember(visitor.folder, dict(zip(REMEMBERED, words, strict=False)))
        return (*self._shown(visitor, DEFAULT_BASE, resolution), *words)

    @plainly
    def rotate(self, selected: int | None, base: str, resolution: str, request: gr.Request) -> tuple[Any, ...]:
        """Thumbnails, remarks, selected, actions; then mask and windows, closed: they are others now."""
        visitor = self.app.visitor(request)
        path = self._selected(visitor, selected)
        rotate_photo(path)
        touched(visitor.photos)
        thumbs, text, _, buttons = self._shown(visitor, base, resolution)
        return thumbs, text, selected, buttons, *[gr.Accordion(open=False)] * 2

    @plainly
    def remove(self, selected: int | None, base: str, resolution: str, request: gr.Request) -> tuple[Any, ...]:
        visitor = self.app.visitor(request)
        remove_photo(self._selected(visitor, selected))
        touched(visitor.photos)
        return self._shown(visitor, base, resolution)

    @plainly
    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        visitor = self.app.visitor(request)
        remove_photos(visitor.photos)
        return self._shown(visitor)

    @plainly
    def show(self, request: gr.Request) -> tuple[Any, ...]:
        """For a page that opens: thumbnails, remarks, and that none is selected; then what is remembered of the form."""
        visitor = self.app.visitor(request)
        form = remembered(visitor.folder)
        base = form.get("base") or DEFAULT_BASE
        return (*self._shown(visitor, str(base)), *(form.get(field, gr.skip()) for field in REMEMBERED))

    @plainly
    def remark(self, base: str, resolution: str, request: gr.Request) -> str:
        """What is to be said of the photos, for that base at that resolution."""
        return self._remarks(self.app.visitor(request), base, resolution)

    @plainly
    def remember(self, request: gr.Request, *values: Any) -> None:
        """Keeps the values of REMEMBERED for when the page is opened again."""
        remember(self.app.visitor(request).folder, dict(zip(REMEMBERED, values, strict=False)))

    @plainly
    def select(self, event: gr.SelectData, request: gr.Request) -> tuple[Any, ...]:
        """The number of the photo that was clicked, the buttons that turn and remove it, its caption, and its mask."""
        path = self._selected(self.app.visitor(request), event.index)
        name = f"photo {event.index + 1}"
        said = gr.Textbox(caption(path), label=f"Caption of {name}", visible=True)
        closed = gr.Accordion(f"Mask of {name}", visible=True, open=False)
        seen = gr.Accordion(f"What training sees of {name}", visible=True, open=False)
        return event.index, gr.Button(interactive=True), gr.Button(interactive=True), said, closed, seen

    @plainly
    def edit(self, selected: int | None, request: gr.Request) -> dict[str, Any]:
        """The selected photo, dark where its mask leaves it out, for an editor that is seen: hidden ones show nothing."""
        return to_draw_on(self._selected(self.app.visitor(request), selected))

    @plainly
    def windows(self, selected: int | None, base: str, resolution: str, seed: str, request: gr.Request) -> Any:
        """What training sees of the selected photo."""
        path = self._selected(self.app.visitor(request), selected)
        with worded():
            side, fixed = whole("Resolution", resolution), whole("Seed", seed) or 0
            return training_windows(path, self.app.studio.bases, base or DEFAULT_BASE, side, fixed)

    @plainly
    def say(self, text: str, selected: int | None, base: str, resolution: str, request: gr.Request) -> tuple[Any, ...]:
        """Keeps the caption of the selected photo; thumbnails and remarks then."""
        visitor = self.app.visitor(request)
        path = self._selected(visitor, selected)
        if text != caption(path):
            set_caption(path, text)
            touched(visitor.photos)
        return self._shown(visitor, base, resolution)[:2]

    @plainly
    def draw(
        self, drawn: dict[str, Any] | None, selected: int | None, base: str, resolution: str, request: gr.Request
    ) -> tuple[Any, ...]:
        """Makes what was drawn over the selected photo its mask; thumbnails and remarks then."""
        visitor = self.app.visitor(request)
        set_mask(self._selected(visitor, selected), drawn_over(drawn))
        touched(visitor.photos)
        return self._shown(visitor, base, resolution)[:2]

    @staticmethod
    def prompt_for(word: str, kind: str) -> str:
        """The prompt of the photos."""
        return " ".join(f"a photo of {word} {kind}".split())

    def options(self, photos: Path, word: str, kind: str, base: str, preset: str | None, *advanced: Any) -> dict:
        """The form as options of a run on the folder `photos`; what is left empty is left to the run.  Raises SVFitError for bad words."""
        for text, what, example in ((word, "Its word", "sks"), (kind, "What it is", "dog")):
            if not (text or "").strip():
                raise SVFitError(f"“{what}” is empty: write a word, such as {example}.")
            if len(text) > 60:
                raise SVFitError(f"“{what}” has {len(text)} characters: one to three words are enough.")
        place, revision = self.app.studio.bases.resolve_for_run(base or DEFAULT_BASE)
        options: dict[str, Any] = {
            "pretrained_model_name_or_path": place,
            "revision": revision,
            "instance_prompt": self.prompt_for(word, kind),
            "class_prompt": " ".join(f"a photo of a {kind}".split()),
            "preset": preset,
        }
        for name, value in zip(ADVANCED, advanced, strict=True):
            options[name] = number(LABELS[name], value) if name in NUMBERS else value
        if str(options[VAE] or "").strip():
            options[VAE] = self.app.studio.bases.resolve_autoencoder(options[VAE])
        options["quantize"] = bits_of(options["quantize"])
        if prompts := [line.strip() for line in (options["validation_prompts"] or "").splitlines() if line.strip()]:
            options["validation_prompts"] = prompts
        if not (options["with_prior_preservation"] or options["keep_base"]):
            del options["class_prompt"]
        subject = bundled(photos)
        if subject is not None and place == DEFAULT_BASE:
            options["instance_data_dir"] = str(SUBJECTS_FOLDER / subject)  # so that the run's judge knows the toy
        given = {n: value for n, value in options.items() if n in NAMES and value is not None and value != ""}
        given = {name: value for name, value in given.items() if value is not False}  # 0 is an answer, False is none
        check_base(given)
        return given

    def take_up(self, visitor: Visitor, job: Job) -> tuple[Any, ...]:
        """Thumbnails, remarks, selected, actions and the form, as they were for a run; photos where none are laid out."""
        options = job.options
        if not photo_files(visitor.photos):
            subject = Path(str(options.get("instance_data_dir"))).name
            if subject in bundled_subjects():
                take_bundled(visitor.photos, subject)
            else:
                add_photos(visitor.photos, photo_files(self.app.jobs.folder / job.id / "photos"))
        words = job.instance_prompt.removeprefix("a photo of ").partition(" ")
        base = self.app.studio.bases.shown(job.base, options.get("revision"))
        if VAE in options:
            options = options | {VAE: self.app.studio.bases.shown(options[VAE], autoencoder=True)}
        advanced = [as_written(options.get(name), name) for name in ADVANCED]
        form = (job.name, words[0], words[2], base, options.get("preset") or DEFAULT, *advanced)
        remember(visitor.folder, dict(zip(REMEMBERED, form, strict=True)))
        return (*self._shown(visitor, base, str(options.get("resolution") or "")), *form)

    def _shown(self, visitor: Visitor, base: str = DEFAULT_BASE, resolution: str = "") -> tuple[Any, ...]:
        paths = photo_files(visitor.photos)
        thumbs = [
            (self.app.serve(thumbnail(path)), f"photo {i}" + " ✎" * bool(caption(path)))
            for i, path in enumerate(paths, 1)
        ]
        text = self._remarks(visitor, base, resolution)
        return gr.Gallery(thumbs, visible=bool(paths)), text, None, gr.Row(visible=bool(paths))

    def _remarks(self, visitor: Visitor, base: str, resolution: str) -> str:
        lines = photo_remarks(visitor.photos, trained_at(base, resolution))
        if lines and as_asked(base or DEFAULT_BASE) == DEFAULT_BASE and bundled(visitor.photos) is None:
            such = f", such as {FOR_PHOTOS}, a download of some GB that wants a GPU" * self.app.studio.bases.download
            lines.append(
                f"{DEFAULT_BASE} is for trying out and knows only toys of 64 pixels: for photos choose another base{such}"
            )
        return "" if not lines else f"**{lines[0]}**" + "".join(f"\n- {html.escape(line)}" for line in lines[1:])

    def _selected(self, visitor: Visitor, selected: int | None) -> Path:
        paths = photo_files(visitor.photos)
        if not isinstance(selected, int) or not 0 <= selected < len(paths):
            raise SVFitError("select a photo first.")
        return paths[selected]


def trained_at(base: str, resolution: str) -> int:
    """Pixels of a side at which the form, as far as it is filled in, would train."""
    try:
        asked = number("Resolution", resolution)
    except SVFitError:  # said when the run is to start
        asked = None
    return int(asked or 0) or (EMBEDDED_RESOLUTION if as_asked(base or DEFAULT_BASE) == DEFAULT_BASE else RESOLUTION)
