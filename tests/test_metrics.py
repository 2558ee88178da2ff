"""Metrics against values computed by hand."""

import pytest
import torch

from svfit_dreambooth.evaluation.metrics import diversity, drift, prompt_fidelity, subject_fidelity

EAST, NORTH, NORTHEAST = [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]
COS45 = 2**-0.5


def test_subject_fidelity_is_the_mean_over_all_pairs():
    # cosines: east-east 1, east-north 0, northeast-east, northeast-north cos 45 each
    assert subject_fidelity(torch.tensor([EAST, NORTHEAST]), torch.tensor([EAST, NORTH])) == pytest.approx(
        (1 + 0 + 2 * COS45) / 4
    )


def test_prompt_fidelity_takes_each_picture_with_its_own_prompt():
    assert prompt_fidelity(torch.tensor([EAST, NORTH]), torch.tensor([NORTHEAST, EAST])) == pytest.approx(COS45 / 2)


def test_drift_is_zero_for_equal_pictures_and_one_for_unrelated_ones():
    pictures = torch.tensor([EAST, NORTHEAST])
    assert drift(pictures, 3 * pictures) == pytest.approx(0.0, abs=1e-12)
    assert drift(torch.tensor([EAST]), torch.tensor([NORTH])) == pytest.approx(1.0)


def test_diversity_is_zero_for_equal_pictures_and_the_mean_over_pairs_otherwise():
    equal, mixed = torch.tensor([NORTH, NORTH, NORTH]), torch.tensor([EAST, NORTH, NORTHEAST])
    assert diversity(equal[None]) == pytest.approx(0.0)
    # pairs: east-north 0, the two others cos 45 each
    assert diversity(mixed[None]) == pytest.approx(1 - 2 * COS45 / 3)
    assert diversity(torch.stack([equal, mixed])) == pytest.approx((1 - 2 * COS45 / 3) / 2)  # the mean over prompts
    with pytest.raises(ValueError, match="two pictures"):
        diversity(torch.tensor([[EAST]]))
