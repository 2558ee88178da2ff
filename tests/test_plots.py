"""Pictures of an adapter."""

import sys

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image
from test_loading import make_adapter

from svfit_dreambooth.adapter.describe import describe_adapter
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.adapter.plot import plot_adapter, rebuild_picture, strength_table, strongest_layer
from svfit_dreambooth.errors import SVFitError


@pytest.fixture(scope="module")
def adapter():
    return make_adapter(tiny_pipeline())


def test_the_table_holds_the_root_mean_squares(adapter):
    rows, columns, table = strength_table(adapter)
    assert columns[:4] == ["attn1 q", "attn1 k", "attn1 v", "attn1 out"] or columns[:4] == [
        f"self {word}" for word in ("q", "k", "v", "out")
    ]
    own = [s for n, s in adapter.shifts.items() if "down_blocks.0" in n and "attn2.to_k" in n]
    expected = torch.cat(own).square().mean().sqrt().item()
    assert table[rows.index("unet down_blocks.0"), columns.index("attn2 k")] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(table[rows.index("unet down_blocks.0"), columns.index("self q")])
    assert table.shape == (len(rows), len(columns)) and not np.isnan(table).all(axis=1).any()


def test_few_scattered_values_have_one_strength_everywhere():
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    sparse = Adapter({name: torch.zeros(1000).index_fill(0, torch.tensor([3, 500, 999]), 2.0)}, "tiny", {})
    described = describe_adapter(sparse)
    _, _, table = strength_table(sparse)
    assert (
        table.item() == described["total"]["strength"] == described["blocks"]["unet down_blocks.0"]["strength"] == 2.0
    )


def test_the_strongest_layer(adapter):
    name = sorted(adapter.shifts)[3]
    stronger = {**adapter.shifts, name: 100 * adapter.shifts[name]}
    assert strongest_layer(type(adapter)(stronger, "tiny", {})) == name


def test_a_picture_from_its_top_and_its_other_singular_values():
    generator = np.random.default_rng(0)
    pixels = 40 + 170 * np.outer(np.linspace(0, 1, 40), np.linspace(1, 0.2, 30))[..., None] * np.array([1, 0.7, 0.4])
    picture = Image.fromarray((pixels + generator.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8))
    top, rest, rank, count = rebuild_picture(picture)
    assert (rank, count) == (1, 30) and top.size == rest.size == (30, 40)
    assert np.abs(np.asarray(top, float) - pixels).mean() < 6
    exact, _, all_of_them, _ = rebuild_picture(picture, energy=1.0)
    assert all_of_them == 30 and np.abs(np.asarray(exact, int) - np.asarray(picture, int)).max() <= 1
    assert rebuild_picture(picture.resize((1500, 1000)))[0].size == (512, 341)


def test_a_drawing(adapter, tmp_path):
    pytest.importorskip("matplotlib")
    path = plot_adapter(adapter, tmp_path / "a.png", picture=Image.new("RGB", (20, 20), "red"))
    picture = Image.open(path).convert("RGB")
    assert picture.width > 1000 and (np.asarray(picture) == (255, 0, 0)).all(axis=2).sum() > 10_000
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(SVFitError, match="can't be written"):
        plot_adapter(adapter, path / "c.png")


def test_without_matplotlib(adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SVFitError, match="pip install matplotlib"):
        plot_adapter(adapter, tmp_path / "a.png")
