"""Scores against scikit-learn and hand-made answers."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from metric import SegmentationMetric, score_table


def count(pred, mask, ignored=255):
    metric = SegmentationMetric(4, ignored)
    metric.update(torch.tensor(pred), torch.tensor(mask))
    return metric


@pytest.mark.parametrize("ignored", [0, 255])
@pytest.mark.parametrize("convert", [np.int64, np.uint8, torch.tensor])
def test_scores_of_several_batches_are_scikit_learns(convert, ignored):
    """Class 3 is only predicted, class 5 is only in the mask, class 4 is in neither."""
    rng = np.random.default_rng(0)
    pred = rng.choice(4, (2, 9, 11))
    mask = rng.choice([0, 1, 2, 5, ignored], pred.shape)
    mask = np.where(rng.random(mask.shape) < 0.5, mask, np.minimum(pred, 2))
    metric = SegmentationMetric(6, ignored)
    for batch in zip(pred, mask):
        metric.update(*map(convert, batch))
    scores = metric.compute()
    guess = pred[mask != ignored]
    truth = mask[mask != ignored]
    options = {"labels": range(6), "zero_division": 0}
    for key, mean, function, absent in [
        ("iou", "miou", sk.jaccard_score, {4}),
        ("f1", "mean_f1", sk.f1_score, {4}),
        ("accuracy", "mean_pixel_accuracy", sk.recall_score, {3, 4}),
    ]:
        expected = function(truth, guess, average=None, **options)
        expected[[i in absent | {ignored} for i in range(6)]] = np.nan
        np.testing.assert_allclose(scores[key], expected)
        assert scores[mean] == pytest.approx(np.nanmean(expected))
    weighted = sk.jaccard_score(truth, guess, average="weighted", **options)
    assert scores["fwiou"] == pytest.approx(weighted)
    assert scores["pixel_accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    matrix = sk.confusion_matrix(truth, guess, labels=range(6))
    np.testing.assert_array_equal(scores["confusion_matrix"], matrix, strict=True)


@pytest.mark.parametrize(
    "pred, mask",
    [([[0, 0]], [0, 0]), ([0.0], [0]), ([0], [0.0]), ([4], [0]), ([-1], [0]), ([0], [254])],
)
def test_wrong_shapes_types_and_ids_are_errors(pred, mask):
    with pytest.raises(ValueError):
        count(pred, mask)


@pytest.mark.parametrize("ignored", [0, 5, 255])
def test_what_is_predicted_on_ignored_pixels_does_not_matter(ignored):
    metric = count([2, 6, 1], [2, ignored, ignored], ignored)
    assert metric.matrix.sum() == metric.matrix[2, 2] == 1


def test_without_labels_every_score_is_undefined():
    scores = SegmentationMetric(3).compute()
    assert not scores.pop("pixels").any() and not scores.pop("confusion_matrix").any()
    assert np.isnan(np.hstack([*scores.values()])).all()


def test_table_shows_absent_classes_and_leaves_out_the_ignored():
    scores = count([1, 1, 0, 2], [1, 1, 0, 1], 0).compute()
    table = score_table(scores, ("Void", "Sky", "Road", "Train"), 0)
    assert [line.split() for line in table.splitlines()[1:5]] == [
        ["Sky", "0.667", "0.667", "0.800", "3"],
        ["Road", "0.000", "n/a", "0.000", "0"],
        ["Train", "n/a", "n/a", "n/a", "0"],
        ["mean", "0.333", "0.667", "0.400", "3"],
    ]
