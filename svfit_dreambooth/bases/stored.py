"""A base in a diffusers folder whose networks are opened one at a time, and let go again.

So are opened the bases whose text encoders hold as many weights as their denoiser: the two are never in memory together.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from svfit_dreambooth.bases.family import Family, tokenizer_name
from svfit_dreambooth.bases.networks import check_keys, check_numbers, class_of, network_names, open_network
from svfit_dreambooth.bases.quantizing import Quantization, block_layers, quantize_layers
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.weights import Lazy

logger = logging.getLogger(__name__)

STEMS = ("diffusion_pytorch_model", "model")  # of files with weights: diffusers' and transformers'
PIECES, PIECE = 256, 4096  # of a file that tell it from others: how many, bytes of each


@dataclass(frozen=True)
class StoredBase:
    """Where the networks of a base lie."""

    name: str  # as the user called it
    folder: Path
    family: type[Family]
    variant: str | None
    quantize: Quantization | None = None  # how its denoiser is held

    @cached_property
    def index(self) -> dict[str, Any]:
        return json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))

    @property
    def parts(self) -> list[str]:
        """The denoiser, the text encoders that the base has, and its autoencoder."""
        return network_names(self.index, self.family)

    def open(self, part: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """One network, in `dtype` on the CPU, the denoiser quantised as asked.  Raises SVFitError where its files are not whole."""
        try:
            network = open_network(
                self.name, self.folder, part, class_of(self.name, part, self.index), self.variant, dtype
            )
        except SVFitError:  # a ValueError, too, which says what it has to say
            raise
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise SVFitError(f"the {part} of {self.name} cannot be opened: {reason}") from error
        if part not in self.family.text_encoder_names:  # of those the answers tell
            check_numbers(self.name, part, network)
        if part == self.family.denoiser_name:
            self.quantize_denoiser(network)
        return network

    def quantize_denoiser(self, network: nn.Module) -> None:
        """Holds an open denoiser as `quantize` says; its layers read their weights from the files again."""
        if self.quantize is not None:
            names, readers = block_layers(network, self.family), self.weights(self.family.denoiser_name).readers
            quantize_layers(network, names, self.quantize, readers)

    def files(self, part: str) -> list[Path]:
        """The files that hold the weights of a network.  Raises SVFitError where there are none."""
        for variant in dict.fromkeys((self.variant, None)):
            for stem in STEMS:
                whole = self.folder / part / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
                index = whole.with_name(f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json")
                if whole.is_file():
                    return [whole]
                if index.is_file():
                    try:
                        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                    except (ValueError, KeyError, TypeError, AttributeError) as error:
                        raise SVFitError(f"{index} cannot be read ({error}): fetch the base again.") from None
                    found = [whole.with_name(Path(name).name) for name in sorted(names)]
                    if missing := [path.name for path in found if not path.is_file()]:
                        raise SVFitError(f"the {part} of {self.name} lacks the file {missing[0]}: fetch it again.")
                    return found
        raise SVFitError(
            f"{self.name} has no weights of its {part}, there is no {STEMS[0]}.safetensors nor {STEMS[1]}.safetensors in "
            f"{self.folder / part}: give a whole model folder."
        )

    def check(self, part: str, outline: nn.Module) -> None:
        """Raises SVFitError where the files of a network do not hold its weights, as far as their headers tell.

        `outline`: the network without its weights.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
        stored = {}
        for name, path in self.places(part).items():
            with safe_open(path, "pt") as file:
                stored[name] = tuple(file.get_slice(name).get_shape())
        check_keys(self.name, part, set(shapes) - set(stored), set(stored) - set(shapes))
        for name, shape in shapes.items():
            if stored[name] != shape:
                raise SVFitError(
                    f"the {part} of {self.name} holds {name} in the shape {stored[name]}, and its config says {shape}: "
                    "its files do not belong together, fetch it again."
                )

    def places(self, part: str) -> dict[str, Path]:
        """In which file each of a network's weights lies."""
        found: dict[str, Path] = {}
        for path in self.files(part):
            try:
                with safe_open(path, "pt") as file:
                    found |= dict.fromkeys(file.keys(), path)
            except (OSError, SafetensorError) as error:
                raise SVFitError(f"{path} is no whole safetensors file ({error}): download it again.") from None
        return found

    def weights(self, part: str) -> Lazy:
        """Those of a network, by their names in it, float32; read from the files when they are asked for."""
        return Lazy({name: partial(_read, path, name) for name, path in self.places(part).items()})

    def dtype(self, part: str) -> torch.dtype:
        """Of the stored weights, by the first of them."""
        name, path = next(iter(self.places(part).items()))
        with safe_open(path, "pt") as file:
            return file.get_tensor(name).dtype

    def print(self, *parts: str) -> str:
        """Tells networks, with their tokenizers, from others: SHA-256 over small files, and pieces of large ones."""
        digest = hashlib.sha256()
        for part in parts:
            small = [
                path for folder in (part, tokenizer_name(part)) for path in sorted(Path(self.folder, folder).glob("*"))
            ]
            for path in [*(path for path in small if path.suffix in (".json", ".txt", ".jinja")), *self.files(part)]:
                digest.update(f"{part} {path.name} {path.stat().st_size}\n".encode())
                digest.update(_pieces(path))
        return digest.hexdigest()


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name).float()


def _pieces(path: Path) -> bytes:
    """The whole of a small file, else its beginning, where a header names all weights, and pieces all over it."""
    size, whole = path.stat().st_size, PIECES * PIECE
    with open(path, "rb") as file:
        found = [file.read(whole)]
        for i in range(PIECES if size > whole else 0):
            file.seek(i * (size - PIECE) // (PIECES - 1))
            found.append(file.read(PIECE))
    return b"".join(found)
