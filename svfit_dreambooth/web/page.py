"""The page: its three tabs wired together, and the command that serves it."""

import argparse
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.folders import data_dir
from svfit_dreambooth.threads import wait_asleep
from svfit_dreambooth.web.door import Door, Hosts, RememberBrowser, before
from svfit_dreambooth.web.rooms.libraries import libraries
from svfit_dreambooth.web.rooms.workspace import Workspace

PORT = 7860
ADDRESS = "127.0.0.1"
WARM_UP_AFTER = 4.0  # seconds, so that the page opens first
MAX_UPLOAD = "64mb"


def main(arguments: Sequence[str] | None = None) -> int:
    """`python app.py`: returns the exit code."""
    wait_asleep()
    options = _parser().parse_args(arguments)
    try:
        if importlib.util.find_spec("gradio") is None:
            raise SVFitError('the page needs Gradio, which is not installed: pip install "svfit-dreambooth[web]".')
        serve_page(options)
    except SVFitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; runs go on in their own processes.", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A page to train, generate and share adapters.")
    parser.add_argument("--adapter", action="append", default=[], type=Path, metavar="FILE", help="open with it loaded; may be repeated")  # fmt: skip
    parser.add_argument("--base", action="append", default=[], metavar="BASE", help="offer a folder, file or hub id as base model; may be repeated")  # fmt: skip
    parser.add_argument("--data_dir", type=Path, help="folder of runs, adapters and pictures; default: $SVFIT_HOME or the user's data folder")  # fmt: skip
    parser.add_argument("--port", type=int, help=f"default: {PORT} or the next free one")
    parser.add_argument("--listen", nargs="?", const="0.0.0.0", metavar="ADDRESS", help="be reachable from other computers; default: from this one only")  # fmt: skip
    parser.add_argument("--allow_host", action="append", default=[], metavar="NAME", help="another name by which browsers reach it, such as a proxy's; may be repeated")  # fmt: skip
    parser.add_argument("--share", action="store_true", help="be reachable from anywhere through a link of Gradio's")
    parser.add_argument("--auth", action="append", default=[], metavar="NAME:PASSWORD", help="ask for it; may be repeated")  # fmt: skip
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="in which pictures are painted; default: float16 on CUDA, else float32")  # fmt: skip
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    return parser


def serve_page(options: argparse.Namespace) -> None:
    """Serves the page until it is interrupted."""
    accounts = [tuple(account.partition(":")[::2]) for account in options.auth]
    if any(not name or not password for name, password in accounts):
        raise SVFitError("--auth reads NAME:PASSWORD, and both must be there.")
    public = bool(options.share or options.listen)
    if public and not accounts:
        print(
            "warning: anyone who reaches this page can use this computer to train and paint: add --auth NAME:PASSWORD.",
            file=sys.stderr,
        )
    hosts = Hosts(options.listen or ADDRESS, options.allow_host)
    folder = (options.data_dir or data_dir()).expanduser().resolve()
    workspace = Workspace(folder, shared=not public and not accounts)
    try:
        for place in (workspace.models, workspace.jobs, workspace.served):
            place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SVFitError(f"{folder} cannot be written ({error.strerror}): choose another --data_dir.") from error
    # Gradio keeps uploads and serves files here and nowhere else; set before it is imported
    os.environ["GRADIO_TEMP_DIR"] = str(workspace.served)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page, app = build_page(workspace, options.adapter, tuple(options.base), options.dtype, download=not public)
    app.queue.start()
    warming = threading.Timer(WARM_UP_AFTER, libraries)  # while the page is being looked at
    warming.daemon = True
    warming.start()
    try:
        launch(
            page,
            workspace,
            hosts,
            server_name=options.listen or ADDRESS,
            server_port=options.port,
            share=options.share,
            auth=accounts or None,
            inbrowser=options.open,
        )
    except OSError as error:
        where = f"{options.listen or ADDRESS}, port {options.port or PORT}"
        raise SVFitError(f"the page cannot be opened at {where}: choose another --port or --listen.") from error
    page.block_thread()


def launch(page: Any, workspace: Workspace, hosts: Hosts, **options: Any) -> str:
    """Opens the page, behind all that stands before it, and returns its address; `options`: Gradio's own."""
    from svfit_dreambooth.web.brakes import PasswordBrake, UploadBrake, fetch_nothing
    from svfit_dreambooth.web.style import CSS, HEAD, theme

    fetch_nothing()
    layers = (
        lambda app: Door(app, hosts),
        PasswordBrake,
        lambda app: UploadBrake(app, workspace.served),
        RememberBrowser,
    )
    _, address, share_link = page.launch(
        prevent_thread_lock=True,
        allowed_paths=[],
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        footer_links=["api"],
        app_kwargs={"lifespan": before(*layers)},
        theme=theme(),
        css=CSS,
        head=HEAD,
        show_error=False,
        **options,
    )
    if share_link:
        hosts.names.add(urlsplit(share_link).hostname or "")
    return address


def build_page(
    workspace: Workspace,
    adapters: Sequence[Path] = (),
    bases: tuple[str, ...] = (),
    dtype: str | None = None,
    *,
    download: bool = True,
) -> tuple[Any, Any]:
    """The page and what is behind it.  `adapters` are put into the library and chosen; `download`: hub ids may be fetched."""
    import gradio as gr

    from svfit_dreambooth.web.api import build_endpoints
    from svfit_dreambooth.web.rooms.app import App
    from svfit_dreambooth.web.rooms.bases import Bases
    from svfit_dreambooth.web.rooms.jobs import Jobs
    from svfit_dreambooth.web.rooms.paintings import Paintings
    from svfit_dreambooth.web.rooms.queue import Queue
    from svfit_dreambooth.web.rooms.studio import Studio
    from svfit_dreambooth.web.rooms.workspace import library_of
    from svfit_dreambooth.web.tabs.generate import build_generate
    from svfit_dreambooth.web.tabs.library import build_library
    from svfit_dreambooth.web.tabs.train import build_train

    own = library_of(workspace, "")
    chosen = [_from_command_line(own, path) for path in adapters]
    studio = Studio(Bases(workspace.models, bases, download), dtype)
    jobs = Jobs(workspace)
    app = App(workspace, studio, jobs, Queue(jobs, studio.bases.offline, studio.make_room), Paintings(studio), chosen)
    with gr.Blocks(title="SVFit DreamBooth", analytics_enabled=False, delete_cache=(3600, 7 * 24 * 3600)) as page:
        gr.HTML(
            "<h1>SVFit DreamBooth</h1><p>Teach an image model your dog, mug or toy from a few photos; "
            "paint it anywhere; pass on a file of a few hundred kilobytes.</p>",
            elem_id="title",
        )
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generate_tab = build_generate(app, page)
            with gr.Tab("Train", id="train"):
                build_train(app, page, tabs, generate_tab)
            with gr.Tab("Adapters", id="adapters") as tab:
                build_library(app, tabs, tab, generate_tab)
        empty = gr.Checkbox(visible="hidden")
        page.load(app.is_empty, None, empty, api_visibility="private").then(
            None, empty, None, js="(empty) => window.beginOnTrain(empty)"
        )
        build_endpoints(app)
    return page, app


def _from_command_line(folder: Path, path: Path) -> str:
    """The name in the library of the adapter file `path`, which is copied there unless it is there already."""
    from svfit_dreambooth.adapter.file import read_adapter
    from svfit_dreambooth.web.rooms import library

    read_adapter(path)
    for name in library.names(folder):
        if library.find(folder, name).read_bytes() == path.read_bytes():
            return name
    return library.add(folder, path)
