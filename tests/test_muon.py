"""Muon moves all directions of a matrix alike, and learns what a matrix should be."""

import pytest
import torch
from torch import nn

from toybox.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(16, 60), (60, 16)])
def test_all_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.linspace(1, 10, shape[1])
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalise(matrix)
    inner = U.mT @ found @ Vh.mT  # diagonal where the directions are those of the matrix
    assert (inner - torch.diag(inner.diag())).abs().max() < 1e-3
    assert inner.diag().min() > 0.6 and inner.diag().max() < 1.3


def test_several_matrices_are_taken_as_each_alone():
    matrices = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(orthogonalise(matrices), torch.stack([orthogonalise(each) for each in matrices]), atol=1e-6)


def test_a_step_has_the_size_of_adamw_whatever_the_gradient():
    for scale in (1e-6, 1e3):
        conv = nn.Conv2d(8, 16, 3)
        before = conv.weight.detach().clone()
        conv.weight.grad = scale * torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(1))
        Muon([conv.weight], lr=0.01, weight_decay=0).step()
        step = (conv.weight.detach() - before).square().mean().sqrt()
        assert step.item() == pytest.approx(0.2 * 0.01, rel=0.2)


def test_it_finds_the_matrix_behind_data():
    torch.manual_seed(0)
    wanted, layer = torch.randn(6, 10), nn.Linear(10, 6, bias=False)
    optimizer = Muon(layer.parameters(), lr=0.2, weight_decay=0)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 300)
        optimizer.zero_grad()
        x = torch.randn(64, 10)
        (layer(x) - x @ wanted.mT).square().mean().backward()
        optimizer.step()
    assert (layer.weight.detach() - wanted).abs().max() < 0.02
