"""The basis: the same directions from every copy of a base, and a cache that can be trusted."""

import logging
import os
import resource
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method import basis
from svfit_dreambooth.method.basis import (
    cached_files,
    fingerprint,
    is_ambiguous,
    model_basis,
    same_base,
    weight_hash,
    weight_hashes,
)
from svfit_dreambooth.method.decomposition import decompose


def steep_weight(size, seed=0):
    """A weight (size, size) like those of trained attention: a steep head, then a long slope, S_i ~ i^-0.7."""
    generator = torch.Generator().manual_seed(seed)
    Q1, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    Q2, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    S = 10 * torch.arange(1, size + 1, dtype=torch.float64) ** -0.7
    return (Q1 * S @ Q2).float()


def delta(weight, shift, **options):
    (U, Vh) = model_basis({"unet.x": weight}, use_cache=False, **options)["unet.x"]
    return U.double() * shift @ Vh.double()


@pytest.mark.parametrize("size", [768, pytest.param(1280, marks=pytest.mark.slow)])
def test_an_adapter_means_the_same_on_every_copy_of_its_base(size):
    weight = steep_weight(size)
    shift = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    trained = delta(weight, shift)

    def error(other):
        return (torch.dist(other, trained) / trained.norm()).item()

    assert error(delta(weight.half(), shift)) < 1e-3
    assert error(delta(weight.half().float(), shift)) < 1e-3
    assert error(delta(weight, shift, driver="svd")) < 1e-3


@pytest.mark.parametrize("size", [768, pytest.param(1280, marks=pytest.mark.slow)])
def test_a_bfloat16_copy(size):
    """Exact from a float16 file; from a float32 file, the close-lying directions of the tail rotate."""
    weight = steep_weight(size)

    def error(copy, rank):
        shift = torch.randn(rank, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        trained = delta(weight, shift, rank=rank)
        return (torch.dist(delta(copy, shift, rank=rank), trained) / trained.norm()).item()

    assert error(weight.half().bfloat16(), size) < 1e-6
    assert error(weight.bfloat16(), 128) < 2e-2


def test_rounding_decides_the_directions_of_an_orthogonal_weight(caplog):
    orthogonal, _ = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64))
    with caplog.at_level(logging.WARNING):
        model_basis({"unet.round": orthogonal, "unet.steep": steep_weight(96)}, use_cache=False)
    assert "unet.round coincide" in caplog.text and "unet.steep" not in caplog.text


@pytest.mark.parametrize("size", [320, 768])
def test_random_and_steep_spectra_are_not_ambiguous(size):
    torch.manual_seed(0)
    for weight in (torch.randn(size, size), steep_weight(size), torch.randn(size, 768)):
        assert not is_ambiguous(decompose(weight)[1], tuple(weight.shape))


def test_hash_survives_float16_and_tells_weights_apart():
    weight = torch.randn(8, 6)
    assert weight_hash(weight) == weight_hash(weight.half()) == weight_hash(weight.half().double())
    assert weight_hash(weight) == weight_hash(weight.half().bfloat16())
    assert weight_hash(weight) != weight_hash(weight.T)
    assert weight_hash(weight) != weight_hash(weight + 1e-2)


def test_weights_beyond_float16_are_taken_unrounded():
    weight = torch.randn(6, 8) * 1e5
    _, S, _ = decompose(weight)
    (U, Vh) = model_basis({"unet.x": weight}, use_cache=False)["unet.x"]
    assert torch.dist(U.double() * S @ Vh.double(), weight.double()) / weight.double().norm() < 5e-3
    assert weight_hash(weight) == weight_hash(weight.bfloat16())


def test_same_base():
    weights = {f"unet.l{i}": torch.randn(32, 48, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    recorded = fingerprint(weights)
    assert same_base(recorded, weights) == "identical"
    assert same_base(recorded, {k: w.half() for k, w in weights.items()}) == "identical"
    assert same_base(recorded, {k: w.bfloat16() for k, w in weights.items()}) == "similar"
    assert same_base(recorded, {k: w + 0.02 * torch.randn_like(w) for k, w in weights.items()}) == "different"
    assert same_base(recorded, {"text_encoder.l0": weights["unet.l0"]}) == "different"


def test_cache_is_used_and_gives_the_same_numbers(monkeypatch, tmp_path):
    weights = {"unet.a": torch.randn(12, 20), "unet.b": torch.randn(20, 12)}
    first = model_basis(weights, 5, cache_dir=tmp_path)
    assert len(cached_files(tmp_path)) == 2

    def fail(*args, **kwargs):
        raise AssertionError("decomposed although cached")

    monkeypatch.setattr(basis, "decompose", fail)
    second = model_basis(weights, 5, cache_dir=tmp_path)
    for name in weights:
        assert all(torch.equal(x, y) for x, y in zip(first[name], second[name], strict=True))
    assert second["unet.a"][0].shape == (12, 5) and second["unet.a"][1].shape == (5, 20)


def test_weights_decomposed_side_by_side_give_the_same_numbers(monkeypatch):
    """As many at a time as there are cores, and the process keeps its number of threads."""
    weights = {f"unet.l{i}": torch.randn(30, 20 + i) for i in range(7)}
    monkeypatch.setattr(basis, "_cores", lambda: 1)
    alone = model_basis(weights, use_cache=False)
    monkeypatch.setattr(basis, "_cores", lambda: 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = model_basis(weights, use_cache=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for name in weights:
        assert all(torch.equal(x, y) for x, y in zip(alone[name], together[name], strict=True))

    def fail(*args, **kwargs):
        raise SVFitError("no such matrix")

    monkeypatch.setattr(basis, "decompose", fail)
    with pytest.raises(SVFitError, match="no such matrix"):
        model_basis(weights, use_cache=False)


def test_a_basis_is_held_by_its_file_or_no_larger_than_was_asked_for(tmp_path):
    weights = {"unet.a": torch.randn(300, 200), "unet.b": torch.randn(200, 300)}
    for U, Vh in model_basis(weights, 3, use_cache=False).values():
        assert (U.untyped_storage().nbytes(), Vh.untyped_storage().nbytes()) == (U.nbytes, Vh.nbytes)
    held = model_basis(weights, 3, cache_dir=tmp_path)  # just decomposed
    mapped = Path("/proc/self/maps").read_text()
    assert len(held) == 2 and all(str(path) in mapped for path, _ in cached_files(tmp_path))


def test_one_thread_for_torch_does_not_mean_one_core():
    """`accelerate launch` says OMP_NUM_THREADS=1, and the conftest here the same."""
    assert torch.get_num_threads() == 1 and basis._cores() == len(os.sched_getaffinity(0))


def test_results_of_several_cores_are_let_go_as_they_are_taken(monkeypatch):
    monkeypatch.setattr(basis, "_cores", lambda: 2)
    made = []

    def act(name):
        directions = basis.Directions(*torch.ones(3, 1, 1))
        made.append(weakref.ref(directions))
        return directions

    for _, directions in basis._on_every_core(act, [str(number) for number in range(40)]):
        alive = sum(reference() is not None for reference in made)
        del directions
    assert alive <= 2  # at the end: the last one, and perhaps the one before it


def test_known_hashes_stand_for_the_weights(monkeypatch, tmp_path):
    weights = {"unet.a": torch.randn(12, 20), "unet.b": torch.randn(20, 12)}
    recorded, hashes = fingerprint(weights), weight_hashes(weights)
    assert hashes == {name: weight_hash(weight) for name, weight in weights.items()}
    model_basis(weights, cache_dir=tmp_path)

    def fail(*args, **kwargs):
        raise AssertionError("hashed although known")

    monkeypatch.setattr(basis, "weight_hash", fail)
    assert fingerprint(weights, hashes) == recorded and same_base(recorded, weights, hashes) == "identical"
    assert set(model_basis(weights, cache_dir=tmp_path, hashes=hashes)) == set(weights)
    assert len(cached_files(tmp_path)) == 2


def test_rank_by_layer_and_by_energy(tmp_path):
    weights = {"unet.a": steep_weight(24), "unet.b": steep_weight(24, seed=1)}
    chosen = model_basis(weights, {"unet.a": 3, "unet.b": 7}, cache_dir=tmp_path)
    assert [chosen[name][0].shape[1] for name in weights] == [3, 7]
    chosen = model_basis(weights, energy=0.9, cache_dir=tmp_path)
    assert 1 < chosen["unet.a"][0].shape[1] < 24


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty", "other shape"])
def test_a_damaged_cache_is_rebuilt(damage, tmp_path):
    weights = {"unet.a": torch.randn(12, 20)}
    first = [tensor.clone() for tensor in model_basis(weights, cache_dir=tmp_path)["unet.a"]]  # not the file's pages
    ((path, size),) = cached_files(tmp_path)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[: size // 2])
    elif damage == "garbage":
        path.write_bytes(b"\xff" * size)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        model_basis({"unet.b": torch.randn(4, 4)}, cache_dir=tmp_path / "other")
        ((other, _),) = cached_files(tmp_path / "other")
        path.write_bytes(other.read_bytes())
    again = model_basis(weights, cache_dir=tmp_path)["unet.a"]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert path.stat().st_size == size


def _decompose_into(folder):
    torch.set_num_threads(1)
    weights = {f"unet.l{i}": torch.randn(40, 40, generator=torch.Generator().manual_seed(i)) for i in range(6)}
    return {name: [t.clone() for t in pair] for name, pair in model_basis(weights, cache_dir=folder).items()}


def test_two_processes_at_once(tmp_path):
    with ProcessPoolExecutor(2) as pool:
        first, second = pool.map(_decompose_into, [tmp_path, tmp_path])
    for name in first:
        assert all(torch.equal(x, y) for x, y in zip(first[name], second[name], strict=True))
    assert len(cached_files(tmp_path)) == 6
    assert not list((tmp_path / "basis").glob("*.tmp"))


@pytest.mark.parametrize("damage", ["zeros", "nan", "one direction", "signs", "another layer"])
def test_what_is_no_basis_of_the_weight_is_computed_again_with_one_message(damage, tmp_path, caplog):
    weights = {f"unet.{i}": torch.randn(12, 20, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    first = {name: [t.clone() for t in pair] for name, pair in model_basis(weights, cache_dir=tmp_path).items()}
    files = [path for path, _ in cached_files(tmp_path)]
    held = {path: load_file(path) for path in files}
    for number, path in enumerate(files):
        tensors = {key: tensor.clone() for key, tensor in held[path].items()}
        if damage == "zeros":
            tensors["Vh"].zero_()
        elif damage == "nan":
            tensors["Ut"][3, 3] = float("nan")
        elif damage == "one direction":
            tensors["Ut"][-1] = 0
        elif damage == "signs":
            tensors["Vh"][0] *= -1
        else:
            tensors = held[files[number - 1]]
        save_file(tensors, path, metadata={"version": "1"})
    again = model_basis(weights, cache_dir=tmp_path)
    for name in weights:
        assert all(torch.equal(x, y) for x, y in zip(first[name], again[name], strict=True))
    (message,) = caplog.messages
    assert message.startswith("3 of 3 cached bases are damaged or of other weights, such as that of unet.")
    caplog.clear()
    model_basis(weights, cache_dir=tmp_path)
    assert not caplog.messages


def test_a_cache_that_cannot_be_written_only_warns(tmp_path, caplog):
    (tmp_path / "basis").write_text("a file where the folder should be")
    model_basis({"unet.a": torch.randn(4, 4)}, cache_dir=tmp_path)
    assert "is not cached" in caplog.text


def test_a_disk_that_fills_up_while_a_basis_is_cached_only_warns(tmp_path):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit is then an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    script = """
import logging, sys, torch
from pathlib import Path
from svfit_dreambooth.method.basis import model_basis
logging.basicConfig(format="%(message)s")
weights = {"unet.small": torch.eye(4), "unet.large": torch.randn(40, 40)}
basis = model_basis(weights, cache_dir=Path(sys.argv[1]))
print({name: tuple(U.shape) for name, (U, Vh) in basis.items()})
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], preexec_fn=limited, capture_output=True, text=True, check=True
    )
    assert "the basis is not cached, the next start decomposes again" in done.stderr and "File too large" in done.stderr
    assert done.stdout == "{'unet.small': (4, 4), 'unet.large': (40, 40)}\n"
    assert len(list((tmp_path / "basis").iterdir())) == 1  # the small one, and no temporary file
