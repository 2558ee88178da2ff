"""What of the hub is on this disk, and what it has against giving the rest."""

from collections.abc import Iterator, Sequence

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

NOT_HERE = "its files are not on this disk, or not all of them"


def is_cached(name: str, revision: str | None = None, files: Sequence[str] = ("model_index.json",)) -> bool:
    """Whether the hub's `name` is on this disk, be it in part: without its content filter, or another variant.

    `files`: one of which tells.
    """
    try:
        return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)
    except ValueError:  # no hub id after all
        return False


def reason_of(error: BaseException, name: str) -> str:
    """Why the model `name` was not opened, without a full stop: what its libraries say in the first line of `error`.

    Where the hub is behind it, they call all kinds of it alike, so here is said which it is, and what to do.
    """
    chain = list(_chain(error))
    if any(isinstance(each, GatedRepoError) for each in chain):
        return f"it is gated, so accept its terms on https://huggingface.co/{name} and log in with `hf auth login`"
    if any(isinstance(each, RepositoryNotFoundError) for each in chain):
        return "the hub has none of that name, or it is private and `hf auth login` comes first"
    unanswered = next((each for each in chain if _is_silence(each)), None)
    not_here = any(isinstance(each, LocalEntryNotFoundError) for each in chain)
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain) or (not_here and constants.HF_HUB_OFFLINE):
        return f"{NOT_HERE}, and HF_HUB_OFFLINE forbids to ask the hub for them"
    if unanswered is not None:
        return (
            f"{NOT_HERE}, and the hub cannot be reached ({type(unanswered).__name__}): see whether there is a network"
        )
    if not_here:
        return NOT_HERE
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _is_silence(error: BaseException) -> bool:
    """Whether the hub did not answer, or not for itself, as those do that stand before it while it is out of order."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, HTTPError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
