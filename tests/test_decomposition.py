"""The singular values of one weight, and how many of them are kept."""

import pytest
import torch

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.decomposition import decompose, resolve_rank

SHAPES = [(24, 24), (24, 40), (40, 24)]


@pytest.mark.parametrize("driver", ["eigh", "svd"])
@pytest.mark.parametrize("shape", SHAPES)
def test_decompose_round_trip(shape, driver):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    U, S, Vh = decompose(weight, driver=driver)
    assert torch.dist(U * S @ Vh, weight) < 1e-9
    assert torch.dist(U.T @ U, torch.eye(24, dtype=torch.float64)) < 1e-9
    assert torch.dist(Vh @ Vh.T, torch.eye(24, dtype=torch.float64)) < 1e-9
    assert torch.allclose(S, torch.linalg.svdvals(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decompose_never_rounds_the_weight(dtype):
    weight = torch.randn(16, 24, dtype=dtype)
    U, S, Vh = decompose(weight)
    assert U.dtype == torch.float64
    assert torch.equal((U * S @ Vh).to(dtype), weight)


def test_decompose_rank_and_energy():
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1e-3]))
    assert [len(decompose(weight, rank)[1]) for rank in (1, 3, 4, 99, "full")] == [1, 3, 4, 4, 4]
    # squared: 9, 4, 1, 1e-6 of 14.000001
    assert [len(decompose(weight, energy=e)[1]) for e in (0.5, 0.9, 0.93, 0.99, 1.0)] == [1, 2, 3, 3, 4]


@pytest.mark.parametrize("rank", [0, -1, "half", 2.5, True])
def test_bad_rank_is_refused(rank):
    with pytest.raises(SVFitError, match="rank is .*give a whole number of 1 or more"):
        resolve_rank(torch.ones(4), rank)


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.5])
def test_bad_energy_is_refused(energy):
    with pytest.raises(SVFitError, match="energy is"):
        resolve_rank(torch.ones(4), energy=energy)


def test_nearly_singular_weights_fall_back_to_svd():
    torch.manual_seed(0)
    weight = torch.randn(20, 3, dtype=torch.float64) @ torch.randn(3, 30, dtype=torch.float64)
    U, S, Vh = decompose(weight)
    assert torch.dist(U.T @ U, torch.eye(20, dtype=torch.float64)) < 1e-9
    assert torch.dist(U * S @ Vh, weight) < 1e-9


def test_decompose_refuses_what_is_no_finite_matrix():
    for weight in (torch.ones(3), torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 2, device="meta")):
        with pytest.raises(SVFitError, match="only a matrix"):
            decompose(weight)
    with pytest.raises(SVFitError, match="NaN or infinite"):
        decompose(torch.tensor([[1.0, float("nan")]]))
