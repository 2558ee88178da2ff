"""`python -m svfit_dreambooth push`: parses and prints."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svfit_dreambooth.commands.wording import printable


def add_push(commands: Any) -> None:
    """Adds the command to the subparsers `commands`."""
    push = commands.add_parser("push", help="upload an adapter with a model card to the Hugging Face Hub")
    push.add_argument("folder", type=Path, help="output folder of a run, or the adapter file in it")
    push.add_argument("repository", nargs="?", help="OWNER/NAME; default: the adapter's name, under your account")
    push.add_argument("--public", action="store_true", help="let everybody see it; default: only you")
    push.add_argument("--no_pictures", action="store_true", help="keep the sheet with training photos at home")
    push.add_argument("--license", help="the hub's word for the licence; default: that of the base where it is known")
    push.add_argument("--dry_run", action="store_true", help="print the card and what would be sent, and send nothing")
    push.set_defaults(run=_push)


def _push(options: argparse.Namespace) -> None:
    from svfit_dreambooth.sharing.hub import adapter_of, push_adapter
    from svfit_dreambooth.training.journal import RunFolder

    run = RunFolder(options.folder)
    noted = options.folder.is_dir() and run.adapter_name is not None and run.adapter.is_file()
    adapter = run.adapter if noted else adapter_of(options.folder)
    upload = push_adapter(
        adapter,
        options.repository,
        figures=_figures(adapter),
        private=not options.public,
        pictures=not options.no_pictures,
        licence=options.license,
        dry_run=options.dry_run,
    )
    if options.dry_run:
        print(printable(upload.card, keep="\n"))
    who = "only you" if upload.private else "everybody"
    print(f"{upload.url or upload.repository}: {'would be' if options.dry_run else 'is'} seen by {who}")
    for name, size in upload.files.items():
        print(f"  {name}, {size / 1000:,.1f} kB")
    if any(name.endswith(".png") for name in upload.files):
        print("The picture shows some of the training photos; --no_pictures leaves it out.")


def _figures(adapter: Path) -> Mapping[str, Mapping[str, float | None]] | None:
    """What the run measured at its end, if it was the run that wrote this adapter."""
    from svfit_dreambooth.training.events import End
    from svfit_dreambooth.training.journal import RunFolder

    ends = [event for event in RunFolder(adapter.parent).events() if isinstance(event, End)]
    return ends[-1].figures if ends and ends[-1].adapter == adapter.name else None
