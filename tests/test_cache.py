"""What is kept on disk of bases: all kinds are listed and cleared, and nothing of anybody else's."""

import pytest
import torch
from conftest import tiny_pipeline
from safetensors.torch import save_file

from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.commands.main import main
from svfit_dreambooth.method.basis import cached_files
from svfit_dreambooth.training import sensitivity as room
from svfit_dreambooth.training.cache import ANY_BASE, UNKNOWN, cached, clear_cache, summed
from svfit_dreambooth.training.kept import keep
from svfit_dreambooth.training.sensitivity import base_sensitivity


@pytest.fixture
def used(tmp_path, monkeypatch):
    """A cache that a run on the base "tiny" has used."""
    monkeypatch.setattr(room, "PICTURES", 2)
    monkeypatch.setattr(room, "PASSES", 2)
    monkeypatch.setattr(room, "STEPS", 1)
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    base = BaseModel("tiny", pipeline)
    layers = base.family.adapted_layers(["attn1.to_v"], False)
    targets = {component: list(own) for component, own in layers.items()}
    base_sensitivity(base, targets, base.weights(layers), device=torch.device("cpu"), resolution=16, cache_dir=tmp_path)
    return tmp_path


def files_of(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_every_file_that_a_run_leaves_is_listed_with_its_base(used):
    found = cached(used)
    assert {entry.path.relative_to(used) for entry in found} == files_of(used)
    rows = {row.kind: row for row in summed(found)}
    assert {kind: (row.base, row.count) for kind, row in rows.items()} == {
        "singular directions": (ANY_BASE, len(cached_files(used))),
        "sensitivity": ("tiny", 1),
        "pictures of the base": ("tiny", 2),
    }
    assert sum(row.size for row in rows.values()) == sum((used / path).stat().st_size for path in files_of(used))


def test_clearing_deletes_all_kinds_damaged_ones_too_and_leaves_what_is_not_its_own(used):
    save_file({"unet.a.shift": torch.ones(3)}, used / "basis" / f"{'a' * 64}.safetensors")
    save_file({"F": torch.ones(3)}, used / "sensitivity" / f"{'b' * 64}.safetensors")
    keep(used / "sensitivity" / "mine.safetensors", {"F": torch.ones(3)})
    (used / "base_pictures" / "notes.txt").write_text("mine")
    keep(used / "base_pictures" / "mine" / f"{'c' * 32}.safetensors", {"latents": torch.ones(3)})
    foreign = files_of(used) - {entry.path.relative_to(used) for entry in cached(used)}
    assert len(foreign) == 5
    damaged = next(entry.path for entry in cached(used) if entry.kind == "sensitivity")
    damaged.write_bytes(damaged.read_bytes()[:20])
    assert UNKNOWN in {row.base for row in summed(cached(used))}
    cleared = clear_cache(used)
    assert {entry.kind for entry in cleared} == {"singular directions", "sensitivity", "pictures of the base"}
    assert files_of(used) == foreign and not cached(used)
    assert {path.name for path in (used / "base_pictures").iterdir()} == {"notes.txt", "mine"}
    assert clear_cache(used) == []


def test_the_command_shows_the_list_and_clears_it(used, capsys):
    count = len(cached(used))
    main(["cache", "--basis_cache_dir", str(used)])
    shown = capsys.readouterr().out
    assert "sensitivity" in shown and "tiny" in shown and f"{count} files in {used}: " in shown
    assert len(cached(used)) == count
    main(["cache", "--basis_cache_dir", str(used), "--clear"])
    assert f"{count} files deleted from {used}: " in capsys.readouterr().out
    assert not cached(used)
    main(["cache", "--basis_cache_dir", str(used / "nowhere")])
    assert "0 files" in capsys.readouterr().out
