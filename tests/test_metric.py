"""Scores against scikit-learn and hand-made answers."""
import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from metric import SegmentationMetric, score_table


def counted(pred, mask, classes=6, ignore_index=None) -> SegmentationMetric:
    metric = SegmentationMetric(classes, ignore_index)
    metric.update(pred, mask)
    return metric


@pytest.mark.parametrize("ignore_index", [None, 0, 255])
@pytest.mark.parametrize("seed,convert", [*enumerate([
    np.int64, np.uint8, np.int32, np.uint16, lambda ids: torch.from_numpy(ids).byte().flatten(),
    lambda ids: torch.from_numpy(ids).int()])])
def test_agrees_with_scikit_learn(seed, convert, ignore_index):
    """Ids in batches, of which class 4 is in neither, class 3 in the prediction alone, class 5 in the mask alone."""
    rng = np.random.default_rng(seed)
    pred, mask = rng.choice([0, 1, 2, 3], (2, 9, 11)), rng.choice([0, 1, 2, 5], (2, 9, 11))
    mask = np.where(rng.random(mask.shape) < 0.5, mask, np.minimum(pred, 2))  # agree more often than chance
    if ignore_index is not None:
        mask[rng.random(mask.shape) < [[[0.1]], [[0.8]]]] = ignore_index  # the second image counts less
    metric = SegmentationMetric(6, ignore_index)
    for batch in zip(pred, mask):
        metric.update(*map(convert, batch))
    scores = metric.compute()
    kept = np.full(mask.shape, True) if ignore_index is None else mask != ignore_index
    truth, guess = mask[kept], pred[kept]
    np.testing.assert_array_equal(metric.confusion_matrix(), sk.confusion_matrix(truth, guess, labels=range(6)))
    labelled, seen = np.bincount(truth, minlength=6), np.bincount(guess, minlength=6)
    options = {"labels": range(6), "zero_division": 0}
    for key, mean, function, pixels in [("iou", "miou", sk.jaccard_score, labelled + seen),
                                        ("f1", "mean_f1", sk.f1_score, labelled + seen),
                                        ("accuracy", "mean_pixel_accuracy", sk.recall_score, labelled)]:
        expected = function(truth, guess, average=None, **options)
        expected = np.where((pixels > 0) & (np.arange(6) != ignore_index), expected, np.nan)
        np.testing.assert_allclose(scores[key], expected, err_msg=key)
        assert scores[mean] == pytest.approx(np.nanmean(expected))
    assert scores["pixel_accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    assert scores["fwiou"] == pytest.approx(sk.jaccard_score(truth, guess, average="weighted", **options))
    np.testing.assert_array_equal(scores["pixels"], labelled)


def test_counts_stay_exact_where_float32_does_not():
    metric = counted(np.ones(2, int), np.ones(2, int), 2)
    metric.counts *= 2**23  # float32 cannot tell 2**24 from 2**24 + 1
    metric.update(np.array([1, 0]), np.ones(2, int))
    metric.counts *= 2**30
    assert metric.confusion_matrix()[1].tolist() == [2**30, (2**24 + 1) * 2**30]


@pytest.mark.parametrize("pred,mask,said", [
    (np.zeros((2, 3), int), np.zeros((3, 2), int), "shape"), (np.zeros((1, 4, 4), int), np.zeros((4, 4), int), "shape"),
    (np.zeros(2), np.zeros(2, int), "integer"), (np.zeros(2, int), np.zeros(2), "integer"),
    *((np.array([i, 3]), np.array([0, 3]), "1 pixels") for i in (6, -1)),
    *((np.array([0, 3]), np.array([i, 3]), "1 pixels") for i in (6, -1, 254, -100))])
def test_wrong_shapes_types_and_ids_are_errors(pred, mask, said):
    with pytest.raises(ValueError, match=said):
        counted(pred, mask, ignore_index=255).compute()


def test_small_types_do_not_wrap_around():
    with pytest.raises(ValueError, match="1 pixels"):
        counted(np.uint8([0, 3]), np.uint8([255, 3]), ignore_index=-1).compute()
    assert counted(np.uint8([0, 255]), np.uint8([0, 255]), 300, -1).confusion_matrix()[255, 255] == 1


@pytest.mark.parametrize("ignore_index", [0, 5, 255, -1])
def test_what_is_predicted_on_ignored_pixels_does_not_matter(ignore_index):
    metric = counted(np.array([2, 6, -1, 300]), np.array([2, *3 * [ignore_index]]), ignore_index=ignore_index)
    assert metric.confusion_matrix().sum() == metric.confusion_matrix()[2, 2] == 1


def test_reset_and_empty():
    metric = counted(np.array([1, 2, 0]), np.array([1, 1, 0]), 3, 0)
    assert metric.confusion_matrix().sum() == 2
    metric.reset()
    scores = metric.compute()
    assert metric.confusion_matrix().tolist() == 3 * [[0, 0, 0]] and scores.pop("pixels").tolist() == [0, 0, 0]
    assert all(np.isnan(value).all() for value in scores.values())


def test_table_shows_absent_classes_and_leaves_out_the_ignored():
    scores = counted(np.array([1, 1, 0, 2]), np.array([1, 1, 0, 1]), 4, 0).compute()
    table = score_table(scores, ("Unlabelled", "Sky", "Road", "Train"), 0)
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    assert "Unlabelled" not in table
    assert rows["Sky"] == ["0.667", "0.667", "0.800", "3"] and rows["Train"] == ["n/a", "n/a", "n/a", "0"]
    assert rows["Road"] == ["0.000", "n/a", "0.000", "0"] and rows["mean"] == ["0.333", "0.667", "0.400", "3"]
    assert "mIoU 0.333" in table and "pixel accuracy 0.667" in table
