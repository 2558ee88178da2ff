"""The tab of adapters: a card each, to use, download, rename and delete; import; several into one."""

import html
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gradio as gr

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import file_name
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms.app import App
from svfit_dreambooth.web.rooms.libraries import libraries
from svfit_dreambooth.web.tabs.cards import card
from svfit_dreambooth.web.tabs.export import build_export
from svfit_dreambooth.web.tabs.generate import OPEN, PRIVATE, GenerateTab
from svfit_dreambooth.web.tabs.mistakes import numbers, plainly

EMPTY = (
    '<div class="empty"><b>No adapters yet.</b><br>Train one from your photos, or import a file that somebody '
    "gave you.</div>"
)


class Shelf:
    """The handlers; what they know is the app."""

    def __init__(self, app: App):
        self.app = app

    @plainly
    def load_files(self, files: list[str] | None, changed: int, request: gr.Request) -> tuple[int, None]:
        """Puts uploaded adapters into the library."""
        folder = self.app.visitor(request).library
        names, refused = [], []
        for file in files or []:
            try:
                names.append(library.add(folder, Path(file)))
            except SVFitError as error:
                refused.append(str(error))
        if names:
            gr.Info(html.escape(f"in the library now: {', '.join(names)}"))
        if refused and not names:
            raise SVFitError(" ".join(refused))
        for sentence in refused:
            gr.Warning(html.escape(sentence), duration=12)
        return changed + 1, None

    @plainly
    def use(self, name: str, request: gr.Request) -> tuple[Any, Any]:
        """The painting tab, with that adapter chosen."""
        visitor = self.app.visitor(request)
        library.find(visitor.library, name)
        return gr.Tabs(selected="generate"), gr.Dropdown(self.app.adapter_choices(visitor), value=[f"library/{name}"])

    @plainly
    def rename(self, name: str, new_name: str, changed: int, request: gr.Request) -> int:
        library.rename(self.app.visitor(request).library, name, new_name)
        return changed + 1

    @plainly
    def delete(self, name: str, changed: int, request: gr.Request) -> tuple[Any, ...]:
        token = library.delete(self.app.visitor(request).library, name)
        return changed + 1, (token, name), gr.Row(visible=True), html.escape(f"{name} was deleted.")

    @plainly
    def undo(self, deleted: tuple[str, str] | None, changed: int, request: gr.Request) -> tuple[Any, ...]:
        if deleted is None:
            raise SVFitError("there is nothing to bring back.")
        library.restore(self.app.visitor(request).library, deleted[0])
        return changed + 1, None, gr.Row(visible=False)

    @plainly
    def combine(self, names: list[str], strengths: str, new_name: str, changed: int, request: gr.Request) -> Any:
        """Adds several adapters into a new file of the library."""
        libraries()
        from svfit_dreambooth.adapter.file import read_adapter, save_adapter
        from svfit_dreambooth.sharing.combine import combine_adapters

        folder = self.app.visitor(request).library
        if len(names or []) < 2:
            raise SVFitError("choose two or more adapters to add.")
        factors = _strengths(strengths, len(names))
        files, adapters = [library.find(folder, name) for name in names], []
        for file, factor in zip(files, factors, strict=True):
            adapter = read_adapter(file)
            adapter.title = adapter.title or file.stem
            adapters.append((adapter, factor))
        with ExitStack() as base:  # which is opened only where nothing else tells whether it is the adapters' own
            result = combine_adapters(adapters, open_base=lambda: base.enter_context(self.app.studio.bare(files[0])))
        name = file_name(new_name or "-".join(names), "name of the sum")
        if name.casefold() in {other.casefold() for other in library.names(folder)}:
            raise SVFitError(f"there is an adapter called {name!r} already: choose another name.")
        save_adapter(result, folder / f"{name}{library.SUFFIX}")
        gr.Info(html.escape(f"{name} is in the library."))
        return changed + 1

    def look(self, request: gr.Request) -> list[tuple[str, int]]:
        """What the cards show: they are drawn anew, which loses a click on an old one, only where this is new."""
        folder = self.app.visitor(request).library
        return sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("[!.]*.*"))

    def card_names(self, request: gr.Request) -> Any:
        """For a dropdown."""
        return gr.Dropdown(library.names(self.app.visitor(request).library))


def build_library(app: App, tabs: gr.Tabs, tab: gr.Tab, generate_tab: GenerateTab) -> None:
    shelf = Shelf(app)
    changed, deleted, seen = gr.State(0), gr.State(None), gr.State(None)
    with gr.Row():
        load = gr.UploadButton(
            "Import adapter files",
            file_count="multiple",
            file_types=[".safetensors"],
            elem_id="import",
            size="md",
            min_width=220,
            scale=0,
        )
    with gr.Row(visible=False, elem_classes="undo") as undo_row:
        said = gr.Markdown(elem_classes="note")
        undo = gr.Button("Undo", size="sm", elem_id="undo", min_width=80, scale=0)

    @gr.render(triggers=[seen.change], show_progress="hidden")
    def cards(request: gr.Request) -> None:
        found, broken = library.entries(app.visitor(request).library)
        for name, sentence in broken:
            with gr.Row():
                gr.HTML(f'<div class="note warn">{html.escape(sentence)}</div>')
                remove = gr.Button("Delete", size="sm", min_width=80, scale=0)
            remove.click(shelf.delete, [gr.State(name), changed], [changed, deleted, undo_row, said], **PRIVATE)
        if not found:
            gr.HTML(EMPTY)
            return
        with gr.Column(elem_classes="cards"):
            for entry in found:
                _card(app, shelf, entry, tabs, generate_tab, changed, deleted, undo_row, said)

    for trigger in (tab.select, changed.change):
        trigger(shelf.look, None, seen, **PRIVATE)
    load.upload(shelf.load_files, [load, changed], [changed, load], **PRIVATE)
    undo.click(shelf.undo, [deleted, changed], [changed, deleted, undo_row], **PRIVATE)
    with gr.Accordion("Add several into one", open=False):
        gr.Markdown("One file that acts as several together, for subjects of the same base.", elem_classes="note")
        with gr.Row():
            parts = gr.Dropdown([], multiselect=True, label="Adapters")
            factors = gr.Textbox(label="Strengths", placeholder="1, 1: one for each, in order")
            sum_name = gr.Textbox(label="Name of the sum", placeholder="dog-and-mug")
        add = gr.Button("Add them", size="sm")
    add.click(shelf.combine, [parts, factors, sum_name, changed], changed, **PRIVATE)
    for dropdown in (parts, build_export(app)):
        for trigger in (tab.select, changed.change):
            trigger(shelf.card_names, None, dropdown, **PRIVATE)


def _card(
    app: App, shelf: Shelf, entry: library.Entry, tabs: Any, generate_tab: GenerateTab, changed: Any, deleted: Any,
    undo_row: Any, said: Any,
) -> None:  # fmt: skip
    with gr.Column(elem_classes="card"):
        gr.HTML(card(entry, app.url(entry.picture) if entry.picture else None))
        name = gr.State(entry.name)
        with gr.Row(visible=False, elem_classes="rename") as renaming:
            new_name = gr.Textbox(
                entry.name, show_label=False, container=False, min_width=120, scale=3, **OPEN, label="New name"
            )
            save = gr.Button("Save", size="sm", min_width=60, scale=1)
        with gr.Row(elem_classes="actions"):
            use = gr.Button("Use", size="sm", variant="primary")
            gr.DownloadButton("Download", value=app.serve(entry.path), size="sm")
            rename = gr.Button("Rename", size="sm")
            delete = gr.Button("Delete", size="sm")
    use.click(shelf.use, name, [tabs, generate_tab.adapters], **PRIVATE)
    rename.click(lambda: gr.Row(visible=True), None, renaming, **PRIVATE)
    for trigger in (save.click, new_name.submit):
        trigger(shelf.rename, [name, new_name, changed], changed, **PRIVATE)
    delete.click(shelf.delete, [name, changed], [changed, deleted, undo_row, said], **PRIVATE)


def _strengths(text: str, count: int) -> list[float]:
    """`count` of them; none written: 1 each."""
    found = [float(value) for value in numbers("strengths", text)] or [1.0] * count
    if len(found) != count:
        raise SVFitError(f"the strengths are {text!r}: write {count} numbers, such as {', '.join(['1'] * count)}.")
    return found
