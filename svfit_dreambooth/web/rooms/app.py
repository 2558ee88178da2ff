"""What all tabs of the page share: who asks, and what is at hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms.jobs import Jobs
from svfit_dreambooth.web.rooms.paintings import Paintings
from svfit_dreambooth.web.rooms.queue import Queue
from svfit_dreambooth.web.rooms.studio import Studio
from svfit_dreambooth.web.rooms.workspace import COOKIE, WORD, Visitor, Workspace, library_of, network, serve, word_for


@dataclass
class App:
    """What the handlers of a page work with."""

    workspace: Workspace
    studio: Studio
    jobs: Jobs
    queue: Queue
    paintings: Paintings
    offered: Sequence[str] = ()  # names of adapters in the computer's library that all may paint with

    def visitor(self, request: gr.Request) -> Visitor:
        """Who asks: an account where there are passwords, else a browser by its cookie, else one client's session."""
        if request.username:
            word = word_for(f"account {request.username}")
            return self.workspace.visitor(word, word)
        person = word_for(f"network {network(request.client)}")
        word = dict(request.cookies or {}).get(COOKIE) or ""
        if WORD.fullmatch(word):
            return self.workspace.visitor(word, person)
        return self.workspace.visitor(word_for(f"session {request.session_hash}"), person)

    def is_empty(self, request: gr.Request) -> bool:
        """Is there nothing yet that the visitor could paint with?"""
        return not self.adapter_choices(self.visitor(request))

    def serve(self, path: Path, name: str | None = None) -> str:
        return serve(self.workspace, path, name)

    def url(self, path: Path) -> str:
        """Where a browser finds `path`; relative, so that it holds behind a proxy too."""
        return "gradio_api/file=" + self.serve(path)

    def adapter_choices(self, visitor: Visitor) -> list[tuple[str, str]]:
        """(what a person reads, what the page sends) for every adapter that the visitor may paint with."""
        own = [(name, f"library/{name}") for name in library.names(visitor.library)]
        own += [(f"{Path(value).name} (offered)", value) for value in self.offers() if value.startswith("offered/")]
        return own + [(f"{name} (uploaded)", f"upload/{name}") for name in library.names(visitor.uploads)]

    def adapter_file(self, visitor: Visitor, choice: str) -> Path:
        """The file that a choice stands for.  Raises SVFitError for any that was not offered."""
        kind, _, name = choice.partition("/")
        if kind == "offered" and choice in self.offers():
            return library.find(library_of(self.workspace, ""), name)
        return library.find(visitor.uploads if kind == "upload" else visitor.library, name)

    def offers(self) -> list[str]:
        """The choices that stand for the adapters of the command line; strangers only paint with them."""
        kind = "library" if self.workspace.shared else "offered"
        there = library.names(library_of(self.workspace, "")) if self.offered else []
        return [f"{kind}/{name}" for name in self.offered if name in there]

    def find_adapter(self, visitor: Visitor, name: str) -> Path:
        """The file of the adapter `name`: the visitor's own, or one that is offered to all."""
        offered = f"offered/{name}"
        own = name in library.names(visitor.library)
        return self.adapter_file(visitor, offered if not own and offered in self.offers() else f"library/{name}")
