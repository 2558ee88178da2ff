"""Adapters on the Hugging Face Hub: push one with a card of its own, and find one by "owner/name".

Nothing here was run against the hub itself, which the authors' machines do not reach: the tests replace its client,
`huggingface_hub.HfApi`, by a stand-in that is held to the real one's signatures.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image

from svfit_dreambooth.adapter.file import read_adapter
from svfit_dreambooth.bases.names import HUB_ID
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.sharing.model_card import model_card
from svfit_dreambooth.training.events import End
from svfit_dreambooth.training.journal import RunFolder

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
MAX_BYTES = 100_000_000  # an adapter of Stable Diffusion at full rank has 0.3 million: more is another kind of file


@dataclass
class Upload:
    """What would be, or was, sent to the hub."""

    repository: str  # "owner/name", or only the name: then under the account that is logged in
    private: bool
    files: dict[str, int]  # name -> bytes
    card: str
    url: str | None = None  # None: nothing was sent


# ---------------------------------------------------------------- pushing


def push_adapter(
    run: str | Path,
    repository: str | None = None,
    *,
    private: bool = True,
    pictures: bool = True,
    licence: str | None = None,
    dry_run: bool = False,
    api: HfApi | None = None,
) -> Upload:
    """Uploads the adapter of a run, with a model card and the run's pictures.

    `run`: the output folder of a run, or an adapter file in one.  `repository`: "owner/name"; None takes the
    adapter's name, under the account that is logged in.  `private`: only its owner sees it.  `pictures`: send the
    sheet <adapter>.png, which shows some of the training photos.  `licence`: see `model_card`.  `dry_run`: send
    nothing, ask nothing.  Neither photos nor config.yaml nor checkpoints are sent.
    Raises SVFitError for a folder without one adapter, a damaged adapter, a repository that is public when a private
    one was asked for, and whatever the hub refuses.
    """
    path = _adapter_file(Path(run))
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
                figures=_figures(path),
                licence=licence,
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
            return card

        card = write_card(repository)
        upload = Upload(repository, private, _sizes(folder), card)
        if dry_run:
            return upload
        api = api or HfApi()
        with _plain_errors(repository):
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
    with _plain_errors("the hub"):
        return (api or HfApi()).whoami()["name"]


def _adapter_file(run: Path) -> Path:
    if run.is_file():
        return run
    if not run.is_dir():
        raise SVFitError(f"{run} is neither the folder of a run nor an adapter file: check the path.")
    folder = RunFolder(run)
    if folder.adapter_name is not None and folder.adapter.is_file():  # a LoRA may lie beside it
        return folder.adapter
    found = sorted(path for path in run.glob("*" + SUFFIX))
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


def _figures(adapter_path: Path) -> dict[str, Any] | None:
    """What the run measured at its end, if it was the run that wrote this adapter."""
    ends = [event for event in RunFolder(adapter_path.parent).events() if isinstance(event, End)]
    return ends[-1].figures if ends and ends[-1].adapter == adapter_path.name else None


# ---------------------------------------------------------------- finding


def find_adapter(name: str | Path, api: HfApi | None = None) -> Path:
    """The adapter file that `name` means: a file on this disk, or one on the hub, "owner/name[@revision]".

    What is here comes first.  A repository must hold one safetensors file at its top, small enough to be an adapter;
    nothing else of it is downloaded, and the file is kept in the hub's cache.
    """
    path = Path(name)
    match = HUB_ID.fullmatch(str(name))
    if path.exists() or match is None or path.suffix == SUFFIX:
        return path
    repository, revision = match["id"], match["revision"]
    api = api or HfApi()
    with _plain_errors(f"{name} is no file on this disk, and the repository of that name"):
        try:
            info = api.model_info(repository, revision=revision, files_metadata=True)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except (OSError, HTTPError):
            return _cached(api, repository, revision)
        files = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
        file = _only_adapter(repository, [file for file in files if "/" not in file])
        if files[file] > MAX_BYTES:
            raise SVFitError(
                f"{file} in {repository} has {files[file] / 1e6:,.0f} MB: an SVFit adapter is far smaller, so this is "
                "another kind of model."
            )
        return Path(api.hf_hub_download(repository, file, revision=revision))


def _cached(api: HfApi, repository: str, revision: str | None) -> Path:
    """Without the hub: what an earlier download left here."""
    folder = Path(
        api.snapshot_download(repository, revision=revision, allow_patterns="*" + SUFFIX, local_files_only=True)
    )
    logger.warning("the hub does not answer: %s is taken from this disk, as it was when last downloaded.", repository)
    return folder / _only_adapter(repository, [path.name for path in folder.iterdir()])


def _only_adapter(repository: str, files: list[str]) -> str:
    found = sorted(file for file in files if file.endswith(SUFFIX))
    if len(found) != 1:
        what = "no safetensors file" if not found else "several safetensors files, " + ", ".join(found)
        raise SVFitError(f"{repository} has {what}: download the adapter yourself and give its path.")
    return found[0]


@contextmanager
def _plain_errors(subject: str) -> Iterator[None]:
    """What the hub's client raises, in one sentence."""
    try:
        yield
    except SVFitError:
        raise
    except LocalTokenNotFoundError:
        raise SVFitError("nobody is logged in to the Hugging Face Hub: run `hf auth login` first.") from None
    except HFValidationError as error:
        raise SVFitError(f"{subject} cannot be a repository: {_first_line(error)}") from None
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise SVFitError(
            f"{subject} was not found, or may not be seen without `hf auth login` ({_first_line(error)})."
        ) from None
    except (OSError, HTTPError) as error:
        raise SVFitError(f"{subject} cannot be reached ({_first_line(error)}): try again later.") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
