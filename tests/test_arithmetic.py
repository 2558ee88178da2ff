"""The arithmetic of shifts, against the formulas written out."""

import pytest
import torch
from torch import nn

from svfit_dreambooth.method.arithmetic import add_shifts, delta, exact_delta, kept_precise, merged_weight, shift_dtype


def parts(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((6, 3), (3,), (3, 8)))


def test_the_change_is_the_product_of_its_three_factors():
    U, shift, Vh = parts(torch.float64)
    written_out = sum(shift[i] * torch.outer(U[:, i], Vh[i]) for i in range(3))
    assert torch.allclose(delta(U, shift, Vh), written_out, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_exact_change_is_never_computed_in_half_precision(dtype):
    U, shift, Vh = parts()
    change = exact_delta(U.to(dtype), shift, Vh.to(dtype))
    assert change.dtype == shift_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = (U.to(dtype).double() * shift.double()) @ Vh.to(dtype).double()
    assert torch.allclose(change.double(), expected, atol=1e-6)


def test_merging_rounds_once():
    weight = torch.full((2, 2), 1.0, dtype=torch.float16)
    change = torch.full((2, 2), 2**-11 + 2**-22)  # half a step of float16 and a bit, which its own rounding would lose
    assert (merged_weight(weight, change) == 1 + 2**-10).all()
    kernel = torch.zeros(2, 1, 1, 2)
    assert merged_weight(kernel, change).shape == kernel.shape


def test_adding_shifts_of_different_lengths_and_layers():
    total = add_shifts([({"a": torch.ones(3)}, 1.0), ({"a": torch.ones(5), "b": torch.ones(2)}, 2.0)])
    assert total["a"].tolist() == [3, 3, 3, 2, 2] and total["b"].tolist() == [2, 2]


def test_values_and_gradients_outlive_a_cast():
    module = nn.Linear(4, 4)
    fine = 1 + 2**-20
    with torch.no_grad():
        module.bias.fill_(fine)
    module.bias.grad = torch.full_like(module.bias, fine)
    with kept_precise(lambda: {"bias": module.bias}, lambda: torch.float32):
        module.half()
    assert module.weight.dtype == torch.float16
    assert module.bias.dtype == module.bias.grad.dtype == torch.float32
    assert (module.bias == fine).all() and (module.bias.grad == fine).all()
