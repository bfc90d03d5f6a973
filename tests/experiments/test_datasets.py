import multiprocessing
import tempfile

import numpy as np
import pytest
import sklearn.datasets

from experiments import datasets
from experiments.config import ConfigError


def _pixels(dataset):
    """The splits' images as rows of integers, their labels, and scikit-learn's own."""
    splits = (dataset.train, dataset.validation, dataset.test)
    images = [split.images.reshape(-1, 64).astype(int) for split in splits]
    return images, [split.labels for split in splits], sklearn.datasets.load_digits()


def _rows(images, labels):
    return [(*image, label) for image, label in zip(images.tolist(), labels.tolist(), strict=True)]


def test_digits_have_the_documented_sizes_and_types(digits):
    assert digits.num_classes == 10
    for split, count in ((digits.train, 1257), (digits.validation, 180), (digits.test, 360)):
        assert split.images.shape == (count, 8, 8, 1)
        assert split.labels.shape == (count,)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32


def test_splits_are_a_partition_of_scikit_learns_digits(digits):
    images, labels, bunch = _pixels(digits)
    found = [row for pair in zip(images, labels, strict=True) for row in _rows(*pair)]
    expected = _rows(bunch.data.astype(int), bunch.target)
    assert len(set(expected)) == 1797
    assert sorted(found) == sorted(expected)


def test_every_split_holds_the_classes_alike(digits):
    whole = np.bincount(sklearn.datasets.load_digits().target) / 1797
    for split in (digits.train, digits.validation, digits.test):
        counts = np.bincount(split.labels, minlength=10)
        np.testing.assert_allclose(counts, whole * len(split.labels), atol=1.5)


def test_images_are_normalized_by_the_training_split(digits):
    images = np.asarray(digits.normalized(digits.train.images), np.float64)
    assert digits.normalized(digits.train.images).dtype == np.float32
    np.testing.assert_allclose(images.mean(), 0.0, atol=1e-6)
    np.testing.assert_allclose(images.std(), 1.0, atol=1e-6)


def test_a_fresh_preparation_gives_the_same_arrays(digits, tmp_path):
    again = datasets.load("digits", tmp_path)
    for name in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(again, name).images, getattr(digits, name).images)
        np.testing.assert_array_equal(getattr(again, name).labels, getattr(digits, name).labels)


def test_a_preparation_leaves_no_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for _ in range(2):
        datasets.load("digits", tmp_path / "data")
    assert list((tmp_path / "temporary").iterdir()) == []
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["digits"]


def _load_when_all_are_ready(folder, barrier, sizes):
    barrier.wait()
    sizes.put(len(datasets.load("digits", folder).train.labels))


def test_processes_that_prepare_at_once_all_read_the_whole_set(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, sizes = context.Barrier(2), context.Queue()
    arguments = (tmp_path, barrier, sizes)
    workers = [context.Process(target=_load_when_all_are_ready, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [sizes.get(timeout=120) for _ in workers] == [1257, 1257]
    for worker in workers:
        worker.join()
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_an_unknown_data_set_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"dataset must be one of .*idx:.*; got 'mnits'"):
        datasets.load("mnits")


def test_the_data_folder_can_be_set_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "mine"))
    assert datasets.default_data_dir() == tmp_path / "mine"
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert datasets.default_data_dir() == tmp_path / "cache" / "dpai_jax"
