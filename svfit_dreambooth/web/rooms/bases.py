"""Which base models may be opened, and by what name.

What is opened is what a person chose: the embedded base, a model that the app's owner offers by name, or a hub id.  A name in an
adapter file opens only what is on this disk already, and never a path.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svfit_dreambooth.bases.names import DEFAULT_BASE, as_asked, base_name
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms.libraries import libraries

FOR_PHOTOS = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # offered for training where it may be downloaded
HUB_SECONDS = 4.0  # in which the hub must say whether it has a model
OFF = "downloads are off here: choose a base that is offered."


@dataclass
class Bases:
    """The base models that may be opened."""

    models: Path  # folder whose entries are offered by name
    extra: tuple[str, ...] = ()  # folders, files and hub ids that the owner named on the command line
    download: bool = True  # a hub id that a person typed may be fetched

    def names(self, *, autoencoder: bool = False) -> list[str]:
        """What is offered without typing; `autoencoder`: also those that are one alone."""
        inside = [path.name for path in self._inside(autoencoder)]
        return [DEFAULT_BASE, *inside, *(_shown(name) for name in self.extra)]

    def _inside(self, autoencoder: bool) -> list[Path]:
        kinds = (_is_model, _is_autoencoder) if autoencoder else (_is_model,)
        return [path for path in sorted(self.models.glob("*")) if any(is_such(path) for is_such in kinds)]

    def for_training(self) -> list[str]:
        """The same, and one that knows more than toys, though it must be downloaded."""
        names = self.names()
        return names + [FOR_PHOTOS] * (self.download and FOR_PHOTOS not in names)

    def resolve(self, name: str, *, typed: bool, autoencoder: bool = False) -> tuple[str, dict[str, Any]]:
        """What to open for `name`, and with which options of open_base_model.

        `typed`: a person asked for it, rather than a file.  `autoencoder`: it may be one alone.  Raises SVFitError for what is not offered.
        """
        from svfit_dreambooth.bases.names import is_hub_id

        name = as_asked(name.strip()) if typed else name.strip()
        if name == DEFAULT_BASE:
            return DEFAULT_BASE, {}
        for extra in self.extra:
            if name in (extra, _shown(extra)):
                return extra, {}
        models = self._inside(autoencoder)
        for called in (lambda path: path.name, base_name, lambda path: path.stem):
            for path in models:
                if name == called(path):
                    return str(path), {}
        repository, _, revision = name.partition("@")
        if not is_hub_id(repository) or Path(repository).exists():
            raise SVFitError(
                f"{name!r} is no base model that is offered here: put its folder into {self.models}, start the page "
                "with --base FOLDER, or give a hub id such as owner/name."
            )
        return repository, {"revision": revision or None, "local_files_only": not (typed and self.download)}

    def shown(self, place: str, revision: str | None = None, *, autoencoder: bool = False) -> str:
        """What a person reads and types for `place`, as `resolve` gave it."""
        for name in self.names(autoencoder=autoencoder):
            if self.resolve(name, typed=True, autoencoder=autoencoder)[0] == place:
                return name
        return f"{place}@{revision}" if revision else place

    def offline(self, place: str) -> bool:
        """Must whoever opens `place`, as `resolve` gave it, ask no network?  So with a hub id that only a visitor named."""
        return not self.download and place != DEFAULT_BASE and place not in self.extra and not Path(place).exists()

    def resolve_for_run(self, name: str, *, autoencoder: bool = False) -> tuple[str, str | None]:
        """What a run opens for the `name` that a person typed: place and revision.

        `autoencoder`: it may be one alone.  Raises SVFitError for what is not offered, and for a hub id that is not on this
        disk and cannot be downloaded.
        """
        place, options = self.resolve(name, typed=True, autoencoder=autoencoder)
        if not self._is_held(place, options, autoencoder):
            if options["local_files_only"]:
                raise SVFitError(f"{name.strip()} is not on this disk, and {OFF}")
            check_on_hub(place, options["revision"])
        return place, options.get("revision")

    def resolve_autoencoder(self, name: str) -> str:
        """The same for another autoencoder: a file or folder among the models, or a hub id."""
        place, revision = self.resolve_for_run(name, autoencoder=True)
        if revision is not None:
            raise SVFitError(f"{name.strip()} names a revision, which is for base models alone: leave @{revision} out.")
        return place

    def is_here(self, name: str, *, autoencoder: bool = False) -> bool:
        """May what a file calls `name` be opened without a download that nobody asked for?"""
        try:
            place, options = self.resolve(name, typed=False, autoencoder=autoencoder)
        except SVFitError:
            return False
        return self._is_held(place, options, autoencoder)

    @staticmethod
    def _is_held(place: str, options: dict[str, Any], autoencoder: bool) -> bool:
        """Is what `resolve` gave on this disk?"""
        libraries()
        from svfit_dreambooth.bases.autoencoders import CONFIGS
        from svfit_dreambooth.bases.hub import is_cached

        own = {"files": CONFIGS} if autoencoder else {}
        return not options or is_cached(place, options["revision"], **own)


def check_on_hub(repository: str, revision: str | None) -> None:
    """Raises SVFitError within seconds where the hub has no such model, or cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        HfApi().model_info(repository, revision=revision, timeout=HUB_SECONDS)
    except RevisionNotFoundError:
        raise SVFitError(
            f"{repository} has no revision called {revision!r} on the hub: leave @{revision} out."
        ) from None
    except RepositoryNotFoundError:
        raise SVFitError(
            f"there is no model called {repository} on the hub, or it is private: see how it is spelled."
        ) from None
    except HfHubHTTPError as error:
        raise SVFitError(
            f"the hub does not give {repository} ({error.response.status_code}): try again later."
        ) from error
    except OfflineModeIsEnabled:
        raise SVFitError(
            f"{repository} is not on this disk, and HF_HUB_OFFLINE forbids to ask the hub for it."
        ) from None
    except Exception as error:  # of whatever library the hub's client speaks by: there is no word for them all
        raise SVFitError(
            f"{repository} is not on this disk, and the hub cannot be reached ({type(error).__name__}): see whether "
            "there is a network."
        ) from error


def _is_model(path: Path) -> bool:
    return path.name[0] != "." and ((path / "model_index.json").is_file() or path.suffix == ".safetensors")


def _is_autoencoder(path: Path) -> bool:
    return path.name[0] != "." and (path / "config.json").is_file()


def _shown(name: str) -> str:
    """A base of the command line, as the page and the adapters trained on it call it."""
    path = Path(name)
    return base_name(path) if path.exists() else name
