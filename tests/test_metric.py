"""Scores against hand-made answers and scikit-learn."""
import datetime

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn import metrics as sk

from metric import SegmentationMetric, format_score, score_table

SCORES = ("miou", "pixel_accuracy", "mean_pixel_accuracy", "fwiou", "mean_f1")


def random_case(seed, void=None, classes=6, shape=(2, 9, 11)):
    """Ids of which class 4 is in neither, class 3 in the prediction alone and class 5 in the label alone."""
    rng = np.random.default_rng(seed)
    pred, target = rng.choice([0, 1, 2, 3], shape), rng.choice([0, 1, 2, 5], shape)
    target = np.where(rng.random(shape) < 0.5, target, np.minimum(pred, 2))  # agree more often than chance
    if void is not None:
        target[rng.random(shape) < 0.2] = void
    return pred, target


def test_known_answer():
    metric = SegmentationMetric(4)
    metric.update(np.array([[0, 0, 1, 1], [1, 1, 2, 0]]), np.array([[0, 0, 0, 1], [1, 1, 1, 1]]))
    scores = metric.compute()
    # class 0: 2 hits, 1 missed, 1 false; class 1: 3 hits, 2 missed, 1 false; class 2: 1 false; class 3: nowhere
    np.testing.assert_array_equal(metric.confusion_matrix(), [[2, 1, 0, 0], [1, 3, 1, 0], [0] * 4, [0] * 4])
    np.testing.assert_allclose(scores["iou"], [2 / 4, 3 / 6, 0, np.nan])
    np.testing.assert_allclose(scores["accuracy"], [2 / 3, 3 / 5, np.nan, np.nan])
    np.testing.assert_allclose(scores["f1"], [4 / 6, 6 / 9, 0, np.nan])
    np.testing.assert_array_equal(scores["pixels"], [3, 5, 0, 0])
    expected = {"miou": 1 / 3, "pixel_accuracy": 5 / 8, "mean_pixel_accuracy": 19 / 30, "fwiou": 0.5, "mean_f1": 4 / 9}
    assert {key: scores[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize("ignore_index", [None, 0, 255])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_scikit_learn(seed, ignore_index):
    pred, target = random_case(seed, ignore_index)
    metric = SegmentationMetric(6, ignore_index)
    metric.update(torch.from_numpy(pred), target.astype(np.uint8))
    scores = metric.compute()
    kept = np.full(target.shape, True) if ignore_index is None else target != ignore_index
    truth, guess = target[kept], pred[kept]
    np.testing.assert_array_equal(metric.confusion_matrix(), sk.confusion_matrix(truth, guess, labels=range(6)))
    labelled, seen = np.bincount(truth, minlength=6), np.bincount(guess, minlength=6)
    for key, mean, function, defined in [("iou", "miou", sk.jaccard_score, labelled + seen > 0),
                                         ("f1", "mean_f1", sk.f1_score, labelled + seen > 0),
                                         ("accuracy", "mean_pixel_accuracy", sk.recall_score, labelled > 0)]:
        expected = function(truth, guess, labels=range(6), average=None, zero_division=0)
        expected = np.where(defined & (np.arange(6) != ignore_index), expected, np.nan)
        np.testing.assert_allclose(scores[key], expected, err_msg=key)
        assert scores[mean] == pytest.approx(np.nanmean(expected))
    assert scores["pixel_accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    weighted = sk.jaccard_score(truth, guess, labels=range(6), average="weighted", zero_division=0)
    assert scores["fwiou"] == pytest.approx(weighted)
    assert np.isnan(scores["iou"][4]) and scores["iou"][3] == 0 and scores["iou"][5] == 0
    np.testing.assert_array_equal(scores["pixels"], labelled)


def test_batches_add_up_and_are_not_averaged():
    pred, target = random_case(7, void=0, shape=(4, 8, 8))
    target[0] = 0  # a frame with few labels must not weigh as much as a full one
    target[0, 0, :2] = 1
    whole, parts, single = SegmentationMetric(6, 0), SegmentationMetric(6, 0), []
    whole.update(pred, target)
    for p, t in zip(pred, target):
        parts.update(p, t)
        one = SegmentationMetric(6, 0)
        one.update(p, t)
        single.append(one.compute()["miou"])
    np.testing.assert_array_equal(parts.confusion_matrix(), whole.confusion_matrix())
    for key in SCORES:
        assert parts.compute()[key] == whole.compute()[key]
    assert abs(np.mean(single) - whole.compute()["miou"]) > 0.01


def test_counts_stay_exact_where_float32_does_not():
    metric, one = SegmentationMetric(2), np.ones(1, np.int64)
    metric.update(one, one)
    assert metric.counts.dtype == torch.int64
    metric.counts *= 2**24  # float32 cannot tell 2**24 from 2**24 + 1
    metric.update(one, one)
    metric.update(0 * one, one)
    matrix = metric.confusion_matrix()
    assert matrix.dtype == np.int64 and matrix[1].tolist() == [1, 2**24 + 1]
    metric.counts *= 2**30
    assert metric.confusion_matrix().sum() == (2**24 + 2) * 2**30


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64, torch.uint8, torch.int32, torch.int64])
def test_any_integer_type_and_shape_counts_the_same(kind):
    pred, target = random_case(1)
    expected = SegmentationMetric(6)
    expected.update(pred, target)
    metric = SegmentationMetric(6)
    if isinstance(kind, torch.dtype):
        metric.update(torch.from_numpy(pred).to(kind).flatten(), torch.from_numpy(target).to(kind).flatten())
    else:
        metric.update(pred.astype(kind), target.astype(kind))
    np.testing.assert_array_equal(metric.confusion_matrix(), expected.confusion_matrix())


@pytest.mark.parametrize("pred,target", [
    (np.zeros((2, 3), int), np.zeros((3, 2), int)), (np.zeros((1, 4, 4), int), np.zeros((4, 4), int)),
    (np.zeros((2, 2), np.float32), np.zeros((2, 2), int)), (np.zeros((2, 2), int), np.zeros((2, 2), np.float64)),
    (np.array([6]), np.array([0])), (np.array([-1]), np.array([0])), (np.array([0]), np.array([6])),
    (np.array([0]), np.array([-1])), (np.array([0]), np.array([254])), (np.array([0]), np.array([-100])),
])
def test_wrong_shapes_types_and_ids_are_errors(pred, target):
    metric = SegmentationMetric(6, ignore_index=255)
    with pytest.raises(ValueError):
        metric.update(pred, target)
        metric.compute()


@pytest.mark.parametrize("ignore_index", [0, 5, 255, -1])
def test_what_is_predicted_on_ignored_pixels_does_not_matter(ignore_index):
    metric = SegmentationMetric(6, ignore_index)
    metric.update(np.array([2, 6, -1, 300]), np.array([2, *3 * [ignore_index]]))
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


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=15))
    both, one = SegmentationMetric(3), SegmentationMetric(3)
    both.update(np.full(2 + rank, rank), np.full(2 + rank, 2))
    both.all_reduce()
    assert both.confusion_matrix().tolist() == [[0, 0, 0], [0, 0, 0], [2, 3, 0]]
    if rank == 0:
        one.update(np.array([1]), np.array([1]))
    one.all_reduce()  # a process whose share of a small split is empty must not leave the others waiting
    assert one.confusion_matrix().tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    dist.destroy_process_group()


def test_two_processes_sum_their_counts(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)


def test_table_shows_absent_classes_and_leaves_out_the_ignored():
    metric = SegmentationMetric(4, 0)
    metric.update(np.array([1, 1, 0, 2]), np.array([1, 1, 0, 1]))
    table = score_table(metric.compute(), ("Unlabelled", "Sky", "Road", "Train"), 0)
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    assert "Unlabelled" not in table
    assert rows["Sky"] == ["0.667", "0.667", "0.800", "3"]
    assert rows["Road"] == ["0.000", "n/a", "0.000", "0"]
    assert rows["Train"] == ["n/a", "n/a", "n/a", "0"]
    assert rows["mean"] == ["0.333", "0.667", "0.400", "3"]
    assert "mIoU 0.333" in table and "pixel accuracy 0.667" in table
    assert format_score(float("nan")) == "n/a"
