"""The singular vectors of a base model: decomposed once, kept on disk.

An adapter file holds shifts along directions that every loader must find again from its own copy of the base,
be it stored in float32, float16 or bfloat16.  Rounding rotates neighbouring singular vectors, so all copies
decompose the same numbers, the canonical weight: W rounded to float16 and then to bfloat16.  That is the same
for a float32 file, its float16 copy, and the bfloat16 copy of either float16 one.  Only a bfloat16 copy made
straight from float32 differs, in the last bit of about one entry in sixteen.  The decomposition is in float64.

The cache is addressed by content: one file per weight, named by the hash of the canonical weight.  A change of
targets, a fine-tune that shares some weights, or an interrupted decomposition then reuse what is there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from svfit_dreambooth import folders
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import write_atomically
from svfit_dreambooth.method.decomposition import Rank, as_matrix, decompose, resolve_rank

logger = logging.getLogger(__name__)

Triplets: TypeAlias = tuple[Tensor, Tensor, Tensor]  # U (out, r), S (r,), Vh (r, in)

CACHE_VERSION = "1"
OWN_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
BASIS_TOLERANCE = 1e-4  # relative: float32 is off by some 1e-6, a direction that is missing by far more
AT_ONCE = 16  # matrices that are decomposed: SDXL's widest take 0.3 GB each meanwhile
SAMPLE_SIZE = 32  # weights of each component that the adapter file repeats, for comparison with a bfloat16 copy
BF16_TOLERANCE = 2**-8  # relative rounding error of a bfloat16 value, with a margin of two


def canonical_weight(weight: Tensor) -> Tensor:
    """The numbers that are hashed and decomposed: `weight` (out, in) rounded to float16, then bfloat16, on the CPU.

    That of a convolution, (out, in, h, w), becomes a matrix (out, in * h * w).  A weight with values beyond float16's
    range skips the first rounding.
    """
    weight = as_matrix(weight.detach().cpu())
    rounded = weight.to(torch.float16)
    if weight.numel() and torch.isinf(rounded.abs().max()):
        rounded = weight
    return rounded.float().to(torch.bfloat16).contiguous()  # by way of float32, which holds both: four times as fast


def weight_hash(weight: Tensor) -> str:
    """SHA-256 of the canonical weight's shape and little-endian bytes, in hexadecimal."""
    canonical = canonical_weight(weight)
    digest = hashlib.sha256(f"{tuple(canonical.shape)} ".encode())
    digest.update(canonical.view(torch.int16).numpy().astype("<i2", copy=False).data)
    return digest.hexdigest()


def weight_hashes(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """`weight_hash` of each, by name; for the functions below, which then need not read the weights again."""
    return {name: weight_hash(weight) for name, weight in weights.items()}


def fingerprint(weights: Mapping[str, Tensor], hashes: Mapping[str, str] | None = None) -> dict:
    """What an adapter file says of its base: {component: {"sha256": ..., "sample": [value, ...]}}.

    `weights`: "<component>.<module path>" -> weight (out, in), the adapted ones only.  The hash is over the
    sorted names and the canonical weights; the sample is spread over them evenly.  `hashes`: the `weight_hash` of
    those weights for which it is known.
    """
    hashes = hashes or {}
    result = {}
    for component in sorted({name.partition(".")[0] for name in weights}):
        names = sorted(name for name in weights if name.startswith(component + "."))
        digest = hashlib.sha256()
        for name in names:
            digest.update(f"{name} {hashes.get(name) or weight_hash(weights[name])}\n".encode())
        sample = []
        for k in range(SAMPLE_SIZE):
            weight = weights[names[k * len(names) // SAMPLE_SIZE]].detach()
            position = (2 * k + 1) * weight.numel() // (2 * SAMPLE_SIZE)
            sample.append(float(f"{weight.flatten()[position].item():.4g}"))
        result[component] = {"sha256": digest.hexdigest(), "sample": sample}
    return result


def same_base(
    recorded: Mapping, weights: Mapping[str, Tensor], hashes: Mapping[str, str] | None = None
) -> Literal["identical", "similar", "different"]:
    """Whether `weights` (see `fingerprint`) are those that the fingerprint `recorded` was taken from.

    "identical": the hashes agree, as between float32 and float16 copies.  "similar": only the samples agree,
    each within bfloat16's rounding: a bfloat16 copy of a float32 file, or a very close relative.
    "different": neither.
    """
    mine = fingerprint(weights, hashes)
    if set(recorded) != set(mine):
        return "different"
    if all(recorded[component]["sha256"] == mine[component]["sha256"] for component in mine):
        return "identical"
    for component in mine:
        if not samples_agree(recorded[component]["sample"], mine[component]["sample"]):
            return "different"
    return "similar"


def distance(recorded: Mapping, weights: Mapping[str, Tensor], hashes: Mapping[str, str] | None = None) -> float:
    """||A - B|| / ||A|| of the weights A that the fingerprint `recorded` was taken from and `weights`, by the samples.

    1.4 for weights that have nothing to do with each other; infinite for other components.
    """
    mine = fingerprint(weights, hashes)
    if set(recorded) != set(mine):
        return float("inf")
    first, second = (
        torch.tensor([value for name in sorted(mine) for value in taken[name]["sample"]]) for taken in (recorded, mine)
    )
    return float((first - second).norm() / first.norm())


def samples_agree(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the samples of two fingerprints are the same within bfloat16's rounding."""
    return len(first) == len(second) and all(
        abs(a - b) <= BF16_TOLERANCE * max(abs(a), abs(b)) + 1e-6 for a, b in zip(first, second, strict=True)
    )


def is_ambiguous(S: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether rounding the entries decides the singular vectors that belong to S (r,) of a weight of `shape`.

    Rounding to bfloat16 moves a singular value by about the error of one entry, ||W||_F / sqrt(out * in) * 2^-10.
    Vectors whose singular values lie closer than that turn into each other.  Some such neighbours are normal in
    the tail of the spectrum; True means that they are more than half.
    """
    noise = S.double().square().sum().sqrt() / (shape[0] * shape[1]) ** 0.5 * 2**-10
    gaps = S[:-1] - S[1:]  # (r-1,)
    return len(gaps) > 0 and bool((gaps <= noise).double().mean() > 0.5)


def warn_of_ambiguity(name: str, S: Tensor, shape: tuple[int, ...]) -> None:
    """Logs a warning where `is_ambiguous` says that the directions of the layer `name` are."""
    if is_ambiguous(S, shape):
        logger.warning(
            "the singular values of %s coincide within rounding, so its directions are not unique: an adapter "
            "trained on this copy of the base may act differently on another copy.",
            name,
        )


@dataclass
class Directions:
    """The singular triplets of one weight, float32: Ut (k, out), S (k,), Vh (k, in), of which the first r are used."""

    Ut: Tensor
    S: Tensor
    Vh: Tensor

    def leading(self, rank: int) -> Triplets:
        """U (out, rank), S (rank,), Vh (rank, in)."""
        return self.Ut[:rank].mT, self.S[:rank], self.Vh[:rank]

    def at(self, positions: Tensor) -> Triplets:
        """U (out, r), S (r,), Vh (r, in) of the triplets at `positions` (r,)."""
        return self.Ut[positions].mT, self.S[positions], self.Vh[positions]


def model_basis(weights: Mapping[str, Tensor], *args: Any, **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The directions alone of what `model_triplets` gives: name -> U (out, r), Vh (r, in)."""
    return {name: (U, Vh) for name, (U, _, Vh) in model_triplets(weights, *args, **options).items()}


def model_triplets(
    weights: Mapping[str, Tensor],
    rank: Rank | Mapping[str, int] | Mapping[str, Tensor] = "full",
    *,
    energy: float | None = None,
    cache_dir: str | Path | None = None,
    use_cache: bool = True,
    driver: Literal["eigh", "svd"] = "eigh",
    description: str = "decomposing the base",
    hashes: Mapping[str, str] | None = None,
) -> dict[str, Triplets]:
    """The leading triplets of every weight: name -> U (out, r), S (r,), Vh (r, in), float32, r chosen per layer.

    `weights`: name -> (out, in), or (out, in, h, w) of a convolution.  `rank`, `energy`: see `svfit.resolve_rank`;
    a mapping gives every layer its own, and with tensors of positions (r,) not the leading directions but those.
    `hashes`: as in `fingerprint`.  What is missing in `cache_dir` (None: `folders.cache_dir()`) is decomposed, one
    weight on each core, with a progress bar, and put there.  A layer whose directions rounding decides is named in
    a warning.
    """
    folder = Path(cache_dir or folders.cache_dir()) / "basis"
    hashes = hashes or {}
    paths = {name: folder / f"{hashes.get(name) or weight_hash(weights[name])}.safetensors" for name in weights}

    damaged: list[str] = []

    def cached(name: str) -> Directions | None:
        if not use_cache or not paths[name].is_file():
            return None
        directions = _read(paths[name])
        if directions is None or not is_basis(directions, weights[name]):
            damaged.append(name)
            return None
        return directions

    def choose(name: str, directions: Directions) -> Triplets:
        own = rank[name] if isinstance(rank, Mapping) else rank
        if isinstance(own, Tensor):
            return directions.at(own)
        return directions.leading(resolve_rank(directions.S, own, energy))

    chosen = {name: choose(name, directions) for name in weights if (directions := cached(name)) is not None}
    if damaged:
        logger.warning(
            "%d of %d cached bases are damaged or of other weights, such as that of %s, and are computed again.",
            len(damaged),
            len(weights),
            damaged[0],
        )
    missing = sorted(set(weights) - set(chosen), key=lambda name: -weights[name].numel())  # the longest first
    with tqdm(total=len(missing), desc=description, unit="matrix", disable=not missing, leave=False) as bar:
        for name, directions in _on_every_core(lambda name: _directions(name, weights[name], driver), missing):
            bar.update()
            if use_cache:
                _write(paths[name], directions)
            mapped = _read(paths[name]) if use_cache else None  # pages that the system can take back, not memory
            U, S, Vh = choose(name, mapped or directions)  # views would hold all that was not chosen
            chosen[name] = (U, S, Vh) if mapped else (U.clone(), S.clone(), Vh.clone())
    return {name: chosen[name] for name in weights}


def _directions(name: str, weight: Tensor, driver: Literal["eigh", "svd"]) -> Directions:
    U, S, Vh = decompose(canonical_weight(weight), driver=driver)
    warn_of_ambiguity(name, S, tuple(as_matrix(weight).shape))
    return Directions(U.mT.float().contiguous(), S.float(), Vh.float())


def _on_every_core(act: Callable[[str], Directions], names: Sequence[str]) -> Iterator[tuple[str, Directions]]:
    """act(name) of every name as they are done, each on one core: LAPACK's `eigh` gains little from a second."""
    threads, cores = torch.get_num_threads(), _cores()
    if cores == 1 or len(names) < 2:
        yield from ((name, act(name)) for name in names)
        return
    pool = ThreadPoolExecutor(min(cores, AT_ONCE), initializer=lambda: torch.set_num_threads(1))
    try:
        futures = {pool.submit(act, name): name for name in names}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()  # results are large: none is held on to
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the matrices at hand, not for all
        torch.set_num_threads(threads)  # MKL's number is the whole process's


def _cores() -> int:
    """How many cores this process may use; torch's number of threads is 1 under `accelerate launch`."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_basis(directions: Directions, weight: Tensor) -> bool:
    """Whether `directions` are those of `weight`, as far as a random x (k,) can tell; NaN never is.

    W Vh^T x = U diag(S) x, |U x| = |x| and |Vh^T x| = |x|, each within what float32 and its sums account for.
    """
    W = canonical_weight(weight).float()
    Ut, S, Vh, k = directions.Ut, directions.S, directions.Vh, min(W.shape)
    if Ut.shape != (k, W.shape[0]) or S.shape != (k,) or Vh.shape != (k, W.shape[1]):
        return False
    x = torch.randn(k, generator=torch.Generator().manual_seed(0))
    left, right = Ut.mT @ x, Vh.mT @ x  # (out,), (in,)
    off = (W @ right - Ut.mT @ (S * x)).norm()
    turned = all(abs(vector.norm() - x.norm()) <= BASIS_TOLERANCE * x.norm() for vector in (left, right))
    return turned and bool(off <= BASIS_TOLERANCE * (S * x).norm())


def _read(path: Path) -> Directions | None:
    """The cached directions, memory-mapped; None where the file is damaged or of another version."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("version") != CACHE_VERSION:
                return None
            return Directions(*(file.get_tensor(key) for key in ("Ut", "S", "Vh")))
    except (SafetensorError, OSError):
        return None


def _write(path: Path, directions: Directions) -> None:
    """Atomically: two processes at once write the same bytes, and either rename wins."""
    content = save({"Ut": directions.Ut, "S": directions.S, "Vh": directions.Vh}, metadata={"version": CACHE_VERSION})
    try:
        write_atomically(path, content)
    except SVFitError as error:
        logger.warning("the basis is not cached, the next start decomposes again: %s", error)


def cached_files(cache_dir: Path | None = None) -> list[tuple[Path, int]]:
    """The files of the cache with their sizes in bytes: by their names, the hash of a weight, and what they hold."""
    folder = (cache_dir or folders.cache_dir()) / "basis"
    found = sorted(path for path in folder.glob("*.safetensors") if OWN_NAME.fullmatch(path.name))
    return [(path, path.stat().st_size) for path in found if not _is_foreign(path)]


def _is_foreign(path: Path) -> bool:
    """Whether the file holds something else than a basis; one that cannot be read at all is a damaged basis."""
    try:
        with safe_open(path, framework="pt") as file:
            return sorted(file.keys()) != ["S", "Ut", "Vh"]
    except (SafetensorError, OSError):
        return False
