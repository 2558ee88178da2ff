"""The judge knows its own accuracy, and its interface is plain lists in, unit features out."""

import pytest
import torch

from toybox.judge import (
    WEIGHTS,
    attribute_accuracy,
    best_threshold,
    fresh_scenes,
    identity_accuracy,
    identity_pairs,
    load_judge,
)
from toybox.train_judge import supervised_contrast
from toybox.world import SUBJECTS, canonical_caption, subject_photos


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def test_attributes_on_fresh_renderings(judge):
    shares = attribute_accuracy(judge, fresh_scenes(200, seed=5))
    assert min(shares.values()) >= 0.96, shares


@pytest.mark.slow
def test_individuals_are_told_apart(judge):
    assert identity_accuracy(*identity_pairs(judge, 150, seed=5), judge.threshold) >= 0.95


def test_features_are_of_unit_length_and_match_captions(judge):
    images = subject_photos("car_racer")
    for features in (judge.image_features(images), judge.identity_features(images), judge.text_features(["a car"])):
        assert torch.allclose(features.norm(dim=1), torch.ones(len(features)), atol=1e-5)
    right, wrong = judge.text_features(["a red car", "a blue fish"])
    seen = judge.image_features(images)
    assert ((seen @ right) > (seen @ wrong)).all()


def test_an_individual_is_nearest_to_itself(judge):
    features = {name: judge.identity_features(subject_photos(name)) for name in list(SUBJECTS)[:4]}
    for name, own in features.items():
        inside = (own @ own.T).mean()
        assert all(inside > (own @ other.T).mean() for rival, other in features.items() if rival != name)


def test_threshold_separates():
    same, different = torch.tensor([0.8, 0.9, 0.7]), torch.tensor([0.1, 0.6, 0.2])
    threshold = best_threshold(same, different)
    assert 0.6 <= threshold < 0.7 and identity_accuracy(same, different, threshold) == 1.0


def test_contrast_prefers_equal_labels_together():
    labels = torch.tensor([0, 0, 1, 1])
    together = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert supervised_contrast(together, labels) < supervised_contrast(together[[0, 2, 1, 3]], labels)


def test_weights_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 8_000_000
    assert canonical_caption("car", "red", "snow") == "a photo of a red car in the snow"
