"""What people write for an adapter, "PATH[:WEIGHT]" or "owner/name[@revision]", becomes a local file and a strength."""

import logging
import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from svfit_dreambooth.bases.hub import reason_of
from svfit_dreambooth.bases.names import HUB_ID
from svfit_dreambooth.errors import SVFitError

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
MAX_BYTES = 100_000_000  # an adapter of Stable Diffusion at full rank has 0.3 million: more is another kind of file


def split_strength(text: str) -> tuple[str, float]:
    """PATH[:WEIGHT] as every command spells it; split at the last colon, and only if a number follows.

    Raises SVFitError for infinity and for what is no number but called one ("nan").
    """
    path, colon, weight = text.rpartition(":")
    if colon and path:
        try:
            strength = float(weight)
        except ValueError:
            return text, 1.0
        check_finite(f"the strength of {path}", strength)
        return path, strength
    return text, 1.0


def check_finite(name: str, value: float) -> None:
    """Raises SVFitError for infinity and NaN."""
    if not math.isfinite(value):
        raise SVFitError(f"{name} is {value}: give a finite number.")


def distinct_names(stems: Iterable[str], reserved: Collection[str] = ()) -> list[str]:
    """`stems`, each that was there before with the first free number: dog, dog-2, dog-3; none of these is `reserved`."""
    names: list[str] = []
    for stem in stems:
        name, number = stem, 2
        while name in names or (name != stem and name in reserved):
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


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
    with plain_hub_errors(f"{name} is no file on this disk, and the repository of that name"):
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
def plain_hub_errors(subject: str) -> Iterator[None]:
    """Within it, what the hub's client raises is one sentence about `subject`."""
    try:
        yield
    except SVFitError:
        raise
    except LocalTokenNotFoundError:
        raise SVFitError("nobody is logged in to the Hugging Face Hub: run `hf auth login` first.") from None
    except HFValidationError as error:
        raise SVFitError(f"{subject} cannot be a repository: {_first_line(error)}") from None
    except LocalEntryNotFoundError as error:
        raise SVFitError(f"{subject} cannot be opened: {reason_of(error, subject)}.") from None
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise SVFitError(
            f"{subject} was not found, or may not be seen without `hf auth login` ({_first_line(error)})."
        ) from None
    except (OSError, HTTPError) as error:
        raise SVFitError(f"{subject} cannot be reached ({_first_line(error)}): try again later.") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
