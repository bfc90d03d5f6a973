import multiprocessing
import tempfile

import numpy as np
import pytest
import sklearn.datasets

from experiments import datasets
from experiments.config import ConfigError


def _pixels(dataset):
    """The splits' images as scikit-learn's integers, found from its arrays alone."""
    train = dataset.train.images
    bunch = sklearn.datasets.load_digits()
    # 0 and 16, the extreme grey values, occur in the training images.
    scale = 16 / (train.max() - train.min())
    splits = (dataset.train, dataset.validation, dataset.test)
    images = [np.rint((split.images - train.min()) * scale) for split in splits]
    labels = [split.labels for split in splits]
    return [image.reshape(-1, 64).astype(int) for image in images], labels, bunch


def _rows(images, labels):
    return [(*image, label) for image, label in zip(images.tolist(), labels.tolist(), strict=True)]


def test_digits_have_the_documented_sizes_and_types(digits):
    assert digits.num_classes == 10
    for split, count in ((digits.train, 1257), (digits.validation, 180), (digits.test, 360)):
        assert split.images.shape == (count, 8, 8, 1)
        assert split.labels.shape == (count,)
        assert split.images.dtype == np.float32
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
    np.testing.assert_allclose(digits.train.images.mean(dtype=np.float64), 0.0, atol=1e-6)
    np.testing.assert_allclose(digits.train.images.std(dtype=np.float64), 1.0, atol=1e-6)


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
    with pytest.raises(ConfigError, match=r"dataset must be one of \['digits'\]; got 'mnits'"):
        datasets.load("mnits")


def test_the_data_folder_can_be_set_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "mine"))
    assert datasets.default_data_dir() == tmp_path / "mine"
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert datasets.default_data_dir() == tmp_path / "cache" / "dpai_jax"


def _numbered(count):
    """A split whose images tell their own index."""
    images = np.broadcast_to(np.arange(1.0, count + 1)[:, None, None, None], (count, 3, 4, 1))
    return datasets.Split(images.astype(np.float32), np.arange(count, dtype=np.int32))


def test_an_epoch_visits_images_at_most_once_with_their_labels():
    split = _numbered(23)
    epoch = list(datasets.batches(split, 5, seed=0, epoch=0))
    assert [images.shape for images, _ in epoch] == [(5, 3, 4, 1)] * 4
    labels = np.concatenate([labels for _, labels in epoch])
    assert len(set(labels.tolist())) == 20
    for images, labels in epoch:
        np.testing.assert_array_equal(images, split.images[labels])


def test_batches_are_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        batches = datasets.batches(_numbered(40), 10, seed=seed, epoch=epoch, shift=1)
        return np.concatenate([labels for _, labels in batches]).tolist()

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)


def test_augmented_images_are_shifted_by_at_most_the_asked_pixels(digits):
    def moved(image, down, right):
        canvas = np.zeros((12, 12, 1), np.float32)
        canvas[2 + down : 10 + down, 2 + right : 10 + right] = image
        return canvas[2:10, 2:10]

    split = datasets.Split(digits.train.images[:64], np.arange(64, dtype=np.int32))
    ((images, index),) = datasets.batches(split, 64, seed=0, epoch=0, shift=1)
    offsets = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    used = set()
    for image, source in zip(images, split.images[index], strict=True):
        matches = [offset for offset in offsets if np.array_equal(moved(source, *offset), image)]
        assert matches
        used.update(matches)
    assert used == set(offsets)


def test_samples_hold_as_many_images_of_each_class_and_none_twice(digits):
    drawn = datasets.samples(digits.train, 10, 3, seed=0)
    assert len(drawn) == 3
    for images, labels in drawn:
        assert images.shape == (100, 8, 8, 1)
        np.testing.assert_array_equal(np.bincount(labels, minlength=10), 10)
    rows = np.concatenate([images for images, _ in drawn]).reshape(300, -1)
    known = {image.tobytes() for image in digits.train.images}
    assert all(row.tobytes() in known for row in rows)
    again, other = (datasets.samples(digits.train, 10, 3, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(again[2][0], drawn[2][0])
    assert np.any(other[0][0] != drawn[0][0])


def test_images_come_round_again_where_a_class_has_too_few(digits):
    few = datasets.Split(digits.train.images[:60], digits.train.labels[:60])
    drawn = datasets.samples(few, 10, 2, seed=0)
    assert all(np.all(np.bincount(labels, minlength=10) == 10) for _, labels in drawn)
    assert datasets.samples(few, 10, 0, seed=0) == []
