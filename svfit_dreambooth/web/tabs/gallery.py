"""The visitor's pictures: found, chosen, one or several, downloaded, deleted, taken as an adapter's picture."""

import html
import shutil
import zipfile
from pathlib import Path
from typing import Any

import gradio as gr

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms import library, pictures
from svfit_dreambooth.web.rooms.app import App
from svfit_dreambooth.web.rooms.workspace import Visitor, place_to_serve
from svfit_dreambooth.web.tabs.cards import readable
from svfit_dreambooth.web.tabs.mistakes import plainly

UNSELECTED = '<div class="settings">Select a picture to see how it was made.</div>'
CHOSEN = "✓ "  # before the caption of a picture that is chosen among several


class Pictures:
    """The handlers; names are of files in the visitor's folder, in the gallery's order."""

    def __init__(self, app: App):
        self.app = app
        self._packed: dict[str, str] = {}  # visitor's word -> what was last packed for them

    def shown(self, visitor: Visitor, names: list[str], chosen: list[str] = []) -> list[tuple[str, str]]:  # noqa: B006
        """What a gallery shows."""
        items = []
        for name in names:
            path = visitor.pictures / name
            try:
                caption = pictures.caption(pictures.read_settings(path))
            except (SVFitError, OSError):
                caption = ""
            if path.is_file():
                items.append((self.app.serve(path), CHOSEN * (name in chosen) + caption))
        return items

    @plainly
    def select(
        self, event: gr.SelectData, names: list[str], chosen: list[str], several: bool, request: gr.Request
    ) -> tuple[Any, ...]:
        """Gallery, chosen, details and the four buttons, for the picture that was clicked.

        `several`: a click puts it among those that are chosen, or takes it out; else it alone is.
        """
        visitor = self.app.visitor(request)
        index = event.index if isinstance(event.index, int) else 0
        path = pictures.find(visitor.pictures, names[index] if index < len(names) else None)
        if not several:
            return gr.skip(), [path.name], _details(path), *self._buttons(visitor, [path.name])
        chosen = [name for name in chosen if name != path.name] if path.name in chosen else [*chosen, path.name]
        gallery = gr.Gallery(self.shown(visitor, names, chosen), selected_index=None)
        text = f'<div class="settings"><b>{len(chosen)}</b> chosen</div>'
        return gallery, chosen, text, *self._buttons(visitor, chosen)

    @plainly
    def choose_several(self, several: bool, names: list[str], request: gr.Request) -> tuple[Any, ...]:
        """Gallery, chosen, details and the four buttons after the way of choosing was changed."""
        visitor = self.app.visitor(request)
        gallery = gr.Gallery(self.shown(visitor, names), allow_preview=not several, preview=False, selected_index=None)
        return gallery, [], UNSELECTED, *self._buttons(visitor, [])

    def _buttons(self, visitor: Visitor, chosen: list[str]) -> tuple[Any, ...]:
        """Reuse, download, cover, delete."""
        one, some = gr.Button(interactive=len(chosen) == 1), gr.Button(interactive=bool(chosen))
        file = None
        if len(chosen) == 1:
            file = self.app.serve(visitor.pictures / chosen[0])
        elif chosen:
            file = str(place_to_serve(self.app.workspace, "pictures.zip"))
            if earlier := self._packed.pop(visitor.word, None):
                shutil.rmtree(Path(earlier).parent, ignore_errors=True)  # every click packs anew
            self._packed[visitor.word] = file
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
                for name in chosen:
                    packed.write(pictures.find(visitor.pictures, name), name)
        label = f"Download {len(chosen)}" if len(chosen) > 1 else "Download PNG"
        return one, gr.DownloadButton(label, value=file, interactive=bool(chosen)), one, some

    @plainly
    def delete(self, chosen: list[str], names: list[str], request: gr.Request) -> tuple[Any, ...]:
        """Gallery, names, chosen, details and the four buttons after the chosen pictures are gone."""
        visitor = self.app.visitor(request)
        for path in [pictures.find(visitor.pictures, name) for name in chosen]:
            path.unlink()
        left = [name for name in names if name not in chosen]
        gallery = gr.Gallery(self.shown(visitor, left), selected_index=None, preview=False)
        return gallery, left, [], UNSELECTED, *self._buttons(visitor, [])

    @plainly
    def cover(self, chosen: list[str], request: gr.Request) -> None:
        """The selected picture becomes that of the adapter it was made with."""
        visitor = self.app.visitor(request)
        path = pictures.find(visitor.pictures, next(iter(chosen), None))
        adapters = pictures.read_settings(path)["adapters"]
        if len(adapters) != 1:
            raise SVFitError("this picture was not made with exactly one adapter: choose another one.")
        library.set_picture(visitor.library, next(iter(adapters)), path)
        gr.Info(html.escape(f"{next(iter(adapters))} shows this picture in the library now."))

    @plainly
    def find(self, words: str, request: gr.Request) -> tuple[Any, ...]:
        """Gallery, names, chosen, details and the four buttons: earlier pictures that `words` are said of, newest first."""
        return self._earlier(self.app.visitor(request), words, pictures.EARLIER)

    @plainly
    def more(self, words: str, names: list[str], request: gr.Request) -> tuple[Any, ...]:
        """The same, with more of them."""
        return self._earlier(self.app.visitor(request), words, len(names) + pictures.EARLIER)

    def _earlier(self, visitor: Visitor, words: str, most: int) -> tuple[Any, ...]:
        names = pictures.earlier(visitor.pictures, most, words)
        if not names:
            gr.Info(html.escape(f"no picture speaks of “{words}”." if words.strip() else "there are no pictures yet."))
        gallery = gr.Gallery(self.shown(visitor, names), selected_index=None, preview=False)
        return gallery, names, [], UNSELECTED, *self._buttons(visitor, [])


def _details(path: Path) -> str:
    lines = pictures.describe(pictures.read_settings(path))
    text = " · ".join(f"<b>{html.escape(name)}</b> {html.escape(readable(value, 2000))}" for name, value in lines)
    return f'<div class="settings">{text}</div>'
