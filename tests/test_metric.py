"""Scores against hand-made answers and scikit-learn."""
import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from metric import SegmentationMetric, score_table

SCORES = ("miou", "pixel_accuracy", "mean_pixel_accuracy", "fwiou", "mean_f1")


def random_case(seed, void=None, classes=6, shape=(2, 9, 11)):
    """Ids of which class 4 is in neither, class 3 in the prediction alone and class 5 in the mask alone."""
    rng = np.random.default_rng(seed)
    pred, mask = rng.choice([0, 1, 2, 3], shape), rng.choice([0, 1, 2, 5], shape)
    mask = np.where(rng.random(shape) < 0.5, mask, np.minimum(pred, 2))  # agree more often than chance
    if void is not None:
        mask[rng.random(shape) < 0.2] = void
    return pred, mask


def counted(pred, mask, classes=6, ignore_index=None) -> SegmentationMetric:
    metric = SegmentationMetric(classes, ignore_index)
    metric.update(pred, mask)
    return metric


def test_known_answer():
    metric = counted(np.array([[0, 0, 1, 1], [1, 1, 2, 0]]), np.array([[0, 0, 0, 1], [1, 1, 1, 1]]), 4)
    # class 0: 2 hits, 1 missed, 1 false; class 1: 3 hits, 2 missed, 1 false; class 2: 1 false; class 3: nowhere
    np.testing.assert_array_equal(metric.confusion_matrix(), [[2, 1, 0, 0], [1, 3, 1, 0], [0] * 4, [0] * 4])
    expected = {"miou": 1 / 3, "pixel_accuracy": 5 / 8, "mean_pixel_accuracy": 19 / 30, "fwiou": 0.5, "mean_f1": 4 / 9,
                "iou": [2 / 4, 3 / 6, 0, np.nan], "accuracy": [2 / 3, 3 / 5, np.nan, np.nan],
                "f1": [4 / 6, 6 / 9, 0, np.nan], "pixels": [3, 5, 0, 0]}
    assert metric.compute().keys() == expected.keys()
    for key, value in metric.compute().items():
        np.testing.assert_allclose(value, expected[key], err_msg=key)


@pytest.mark.parametrize("ignore_index", [None, 0, 255])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_scikit_learn(seed, ignore_index):
    pred, mask = random_case(seed, ignore_index)
    metric = counted(torch.from_numpy(pred), mask.astype(np.uint8), ignore_index=ignore_index)
    scores = metric.compute()
    kept = np.full(mask.shape, True) if ignore_index is None else mask != ignore_index
    truth, guess = mask[kept], pred[kept]
    np.testing.assert_array_equal(metric.confusion_matrix(), sk.confusion_matrix(truth, guess, labels=range(6)))
    labelled, seen = np.bincount(truth, minlength=6), np.bincount(guess, minlength=6)
    for key, mean, function, pixels in [("iou", "miou", sk.jaccard_score, labelled + seen), ("f1", "mean_f1",
            sk.f1_score, labelled + seen), ("accuracy", "mean_pixel_accuracy", sk.recall_score, labelled)]:
        expected = function(truth, guess, labels=range(6), average=None, zero_division=0)
        expected = np.where((pixels > 0) & (np.arange(6) != ignore_index), expected, np.nan)
        np.testing.assert_allclose(scores[key], expected, err_msg=key)
        assert scores[mean] == pytest.approx(np.nanmean(expected))
    assert scores["pixel_accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    weighted = sk.jaccard_score(truth, guess, labels=range(6), average="weighted", zero_division=0)
    assert scores["fwiou"] == pytest.approx(weighted)
    assert np.isnan(scores["iou"][4]) and scores["iou"][3] == 0 and scores["iou"][5] == 0
    np.testing.assert_array_equal(scores["pixels"], labelled)


def test_batches_add_up_and_are_not_averaged():
    pred, mask = random_case(7, void=0, shape=(4, 8, 8))
    mask[0] = 0  # an image with few labels must not weigh as much as a full one
    mask[0, 0, :2] = 1
    whole, parts = counted(pred, mask, ignore_index=0).compute(), SegmentationMetric(6, 0)
    for p, m in zip(pred, mask):
        parts.update(p, m)
    assert {key: parts.compute()[key] for key in SCORES} == {key: whole[key] for key in SCORES}
    single = [counted(p, m, ignore_index=0).compute()["miou"] for p, m in zip(pred, mask)]
    assert abs(np.mean(single) - whole["miou"]) > 0.01


def test_counts_stay_exact_where_float32_does_not():
    ones = np.ones(2, np.int64)
    metric = counted(ones, ones, 2)
    metric.counts *= 2**23  # float32 cannot tell 2**24 from 2**24 + 1
    metric.update(np.array([1, 0]), ones)
    assert metric.confusion_matrix()[1].tolist() == [1, 2**24 + 1]
    metric.counts *= 2**30
    assert metric.confusion_matrix().sum() == (2**24 + 2) * 2**30


@pytest.mark.parametrize("convert", [np.uint8, np.int32, lambda ids: torch.from_numpy(ids).byte().flatten(),
                                     lambda ids: torch.from_numpy(ids).int()])
def test_any_integer_type_and_shape_counts_the_same(convert):
    arrays = random_case(1)
    matrices = [counted(*pair).confusion_matrix() for pair in (arrays, map(convert, arrays))]
    np.testing.assert_array_equal(*matrices)


@pytest.mark.parametrize("pred,mask", [
    (np.zeros((2, 3), int), np.zeros((3, 2), int)), (np.zeros((1, 4, 4), int), np.zeros((4, 4), int)),
    (np.zeros((2, 2), np.float32), np.zeros((2, 2), int)), (np.zeros((2, 2), int), np.zeros((2, 2), np.float64)),
])
def test_wrong_shapes_and_types_are_errors(pred, mask):
    with pytest.raises(ValueError, match="shape|integer"):
        SegmentationMetric(6).update(pred, mask)


@pytest.mark.parametrize("pred,mask", [(6, 0), (-1, 0), (0, 6), (0, -1), (0, 254), (0, -100)])
def test_illegal_ids_are_errors(pred, mask):
    with pytest.raises(ValueError, match="1 pixels"):
        counted(np.array([pred, 3]), np.array([mask, 3]), ignore_index=255).compute()


@pytest.mark.parametrize("ignore_index", [0, 5, 255, -1])
def test_what_is_predicted_on_ignored_pixels_does_not_matter(ignore_index):
    metric = counted(np.array([2, 6, -1, 300]), np.array([2, *3 * [ignore_index]]), ignore_index=ignore_index)
    assert metric.confusion_matrix().sum() == metric.confusion_matrix()[2, 2] == 1
    metric.update(np.array([6]), np.array([2]))
    with pytest.raises(ValueError, match="1 pixels"):
        metric.confusion_matrix()


def test_reset_and_empty():
    metric = SegmentationMetric(3, 0)
    for _ in range(2):
        scores = metric.compute()
        assert all(np.isnan(scores[key]) for key in SCORES) and np.isnan(scores["iou"]).all()
        assert metric.confusion_matrix().shape == (3, 3) and metric.confusion_matrix().sum() == 0
        metric.update(np.array([1, 2, 0]), np.array([1, 1, 0]))
        assert metric.confusion_matrix().sum() == 2
        metric.reset()


def test_table_shows_absent_classes_and_leaves_out_the_ignored():
    scores = counted(np.array([1, 1, 0, 2]), np.array([1, 1, 0, 1]), 4, 0).compute()
    table = score_table(scores, ("Unlabelled", "Sky", "Road", "Train"), 0)
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    assert "Unlabelled" not in table
    assert rows["Sky"] == ["0.667", "0.667", "0.800", "3"] and rows["Train"] == ["n/a", "n/a", "n/a", "0"]
    assert rows["Road"] == ["0.000", "n/a", "0.000", "0"] and rows["mean"] == ["0.333", "0.667", "0.400", "3"]
    assert "mIoU 0.333" in table and "pixel accuracy 0.667" in table
