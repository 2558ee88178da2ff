"""Adapters on their way to the Hugging Face Hub, with a card of their own; `adapter/source.py` finds them there.

Nothing here was run against the hub itself, which the authors' machines do not reach: the tests replace its client,
`huggingface_hub.HfApi`, by a stand-in that is held to the real one's signatures.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from PIL import Image

from svfit_dreambooth.adapter.file import is_adapter, read_adapter
from svfit_dreambooth.adapter.source import SUFFIX, plain_hub_errors
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.sharing.model_card import model_card


@dataclass
class Upload:
    """What would be, or was, sent to the hub."""

    repository: str  # "owner/name", or only the name: then under the account that is logged in
    private: bool
    files: dict[str, int]  # name -> bytes
    card: str
    url: str | None = None  # None: nothing was sent


def push_adapter(
    run: str | Path,
    repository: str | None = None,
    *,
    figures: Mapping[str, Mapping[str, float | None]] | None = None,
    private: bool = True,
    pictures: bool = True,
    licence: str | None = None,
    dry_run: bool = False,
    api: HfApi | None = None,
) -> Upload:
    """Uploads the adapter of a run, with a model card and the run's pictures.

    `run`: the output folder of a run, or an adapter file in one.  `repository`: "owner/name"; None takes the
    adapter's name, under the account that is logged in.  `figures`: what the run measured, see `model_card`.  `private`: only its owner sees it.  `pictures`: send the
    sheet <adapter>.png, which shows some of the training photos.  `licence`: see `model_card`.  `dry_run`: send
    nothing, ask nothing.  Neither photos nor config.yaml nor checkpoints are sent.
    Raises SVFitError for a folder without one adapter, a damaged adapter, a repository that is public when a private
    one was asked for, and whatever the hub refuses.
    """
    path = adapter_of(Path(run))
    adapter = read_adapter(path)
    repository = repository or path.stem
    sheet = path.with_suffix(".png")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copyfile(path, folder / path.name)
        names = []
        if pictures and sheet.is_file():
            _copy_picture(sheet, folder / sheet.name)
            names.append(sheet.name)

        def write_card(address: str) -> str:
            card = model_card(
                adapter,
                title=adapter.title or path.stem,
                file_name=path.name,
                file_bytes=path.stat().st_size,
                repository=address,
                pictures=names,
                figures=figures,
                licence=licence,
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
            return card

        card = write_card(repository)
        upload = Upload(repository, private, _sizes(folder), card)
        if dry_run:
            return upload
        api = api or HfApi()
        with plain_hub_errors(repository):
            created = api.create_repo(repository, private=private, exist_ok=True)
            upload.repository = created.repo_id  # with the owner, also where only a name was given
            is_private = api.model_info(upload.repository).private
            if private and not is_private:
                raise SVFitError(
                    f"{upload.repository} exists already and everybody can see it: give public if they may see this "
                    "adapter too, or name another repository.",
                    "public",
                )
            upload.private = bool(is_private)
            upload.card = write_card(upload.repository)
            upload.files = _sizes(folder)
            api.upload_folder(
                repo_id=upload.repository, folder_path=folder, commit_message=f"Adapter {path.stem} and its card"
            )
        upload.url = str(created)
    return upload


def check_login(api: HfApi | None = None) -> str:
    """The account that is logged in: to be called before a run that is to be pushed at its end."""
    with plain_hub_errors("the hub"):
        return (api or HfApi()).whoami()["name"]


def adapter_of(run: Path) -> Path:
    """The adapter file `run`, or the only one in the folder `run`, whatever else made of it lies beside it."""
    if run.is_file():
        return run
    if not run.is_dir():
        raise SVFitError(f"{run} is neither the folder of a run nor an adapter file: check the path.")
    found = sorted(path for path in run.glob("[!.]*" + SUFFIX) if is_adapter(path))
    if len(found) != 1:
        what = "no adapter" if not found else "several adapters, " + ", ".join(path.name for path in found)
        raise SVFitError(f"{run} holds {what}: name the file to push.")
    return found[0]


def _copy_picture(source: Path, destination: Path) -> None:
    """The pixels alone: what a PNG says in its margins about its making stays at home."""
    try:
        with Image.open(source) as picture:
            picture.convert("RGB").save(destination, format="PNG")
    except OSError as error:
        raise SVFitError(
            f"{source} cannot be read as a picture ({error}): delete it, or push without pictures."
        ) from None


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
