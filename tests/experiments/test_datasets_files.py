"""A user's own files, good and bad."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from experiments import datasets, models, steps, train
from experiments.config import Config, ConfigError
from tests.support import archives


def _arrays(count=40, classes=4, **shape):
    pictures = archives.images(count + 8, **shape)
    labels = np.arange(count + 8) % classes
    return {
        "train_images": pictures[:count],
        "train_labels": labels[:count],
        "test_images": pictures[count:],
        "test_labels": labels[count:],
    }


def _load(tmp_path, arrays, **options):
    np.savez(tmp_path / "mine.npz", **arrays)
    return datasets.load(f"npz:{tmp_path / 'mine.npz'}", **options)


def _bytes_of(*splits):
    return sorted(image.tobytes() for split in splits for image in split.images)


@pytest.mark.parametrize("shape", [{"height": 5, "width": 9}, {"channels": 1}])
def test_arrays_become_three_splits(tmp_path, shape):
    arrays = _arrays(**shape)
    data = _load(tmp_path, arrays)
    assert [len(s.labels) for s in (data.train, data.validation, data.test)] == [36, 4, 8]
    assert data.image_shape == arrays["train_images"].shape[1:]
    assert _bytes_of(data.train, data.validation) == sorted(
        image.tobytes() for image in arrays["train_images"]
    )
    np.testing.assert_array_equal(data.test.images, arrays["test_images"])
    np.testing.assert_array_equal(np.bincount(data.validation.labels), [1, 1, 1, 1])


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.uint8])
def test_images_are_normalized_by_channel_whatever_their_dtype(tmp_path, dtype):
    arrays = _arrays(count=2500, classes=3)
    for name in ("train_images", "test_images"):
        arrays[name][..., 2] = 7  # a channel that says nothing
        arrays[name] = arrays[name].astype(dtype)
    data = _load(tmp_path, arrays)
    images = np.asarray(data.normalized(data.train.images), np.float64)
    np.testing.assert_allclose(images.mean((0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(images.std((0, 1, 2)), [1.0, 1.0, 0.0], atol=1e-5)


def test_grey_images_may_lack_the_axis_of_channels(tmp_path):
    arrays = _arrays(channels=1)
    flat = {k: v[..., 0] if "images" in k else v for k, v in arrays.items()}
    data = _load(tmp_path, flat)
    np.testing.assert_array_equal(data.test.images, arrays["test_images"])


def _encoded(arrays):
    parts = {}
    for name in ("train", "test"):
        blobs = [archives.jpeg(image) for image in arrays[f"{name}_images"]]
        parts[f"{name}_jpeg"] = np.frombuffer(b"".join(blobs), np.uint8)
        parts[f"{name}_offset"] = np.cumsum([0, *map(len, blobs)])
        parts[f"{name}_label"] = arrays[f"{name}_labels"].astype(np.uint8)
    return parts


def test_encoded_images_are_decoded(tmp_path):
    arrays = _arrays(height=16, width=16)
    data = _load(tmp_path, _encoded(arrays))
    expected = [archives.opened(archives.jpeg(image)) for image in arrays["test_images"]]
    np.testing.assert_array_equal(data.test.images, expected)
    np.testing.assert_array_equal(data.test.labels, arrays["test_labels"])
    assert len(data.train.labels) == 36


def test_a_part_of_the_training_images_holds_all_classes_alike(tmp_path):
    data = _load(tmp_path, _arrays(), train_images=12)
    np.testing.assert_array_equal(np.bincount(data.train.labels), [3, 3, 3, 3])
    assert len(data.validation.labels) == 4
    for number in (0, 37):
        with pytest.raises(ConfigError, match=f"between 1 and the 36 training.*got {number}"):
            _load(tmp_path, _arrays(), train_images=number)
    with pytest.raises(ConfigError, match=r"each of the 4 classes must occur in the training"):
        _load(tmp_path, _arrays(), train_images=3)


BAD = {
    "no array": (lambda a: a.pop("test_labels"), r"must hold an array test_labels; got \["),
    "labels missing": (
        lambda a: a.update(train_labels=a["train_labels"][:-1]),
        r"one label for each of the 40 train images; got 39",
    ),
    "NaN": (
        lambda a: a.update(test_images=np.full((8, 6, 6, 3), np.nan)),
        r"test images must be finite",
    ),
    "rank": (
        lambda a: a.update(train_images=a["train_images"].reshape(40, -1)),
        r"train images must have the shape .*; got \(40, 108\)",
    ),
    "integers": (
        lambda a: a.update(train_images=a["train_images"].astype(int)),
        r"train images must be uint8 or floating; got int64",
    ),
    "fractions": (
        lambda a: a.update(train_labels=a["train_labels"] / 2),
        r"train labels must be integers of shape \(count,\); got float64",
    ),
    "one hot": (
        lambda a: a.update(train_labels=np.eye(4, dtype=int)[a["train_labels"]]),
        r"train labels must be integers .* of shape \(40, 4\)",
    ),
    "negative": (
        lambda a: a.update(test_labels=a["test_labels"] - 1),
        r"test labels must not be negative; got -1",
    ),
    "a gap": (
        lambda a: a.update(train_labels=np.where(a["train_labels"] == 1, 3, a["train_labels"])),
        r"each of the 4 classes must occur in the training split; class 1 does not",
    ),
    "huge": (
        lambda a: a.update(train_labels=a["train_labels"] * 10**9),
        r"train labels must be counted from 0, .* got 3000000000 among 40",
    ),
    "new in the test": (
        lambda a: a.update(test_labels=a["test_labels"] + 1),
        r"test labels must be among the 4 training labels; got 4",
    ),
    "another size": (
        lambda a: a.update(test_images=archives.images(8, 5, 5)),
        r"all images must have one shape; got",
    ),
    "none": (
        lambda a: a.update(test_images=np.zeros((0, 6, 6, 3)), test_labels=np.zeros(0, int)),
        r"test images must have the shape .*; got \(0, 6, 6, 3\)",
    ),
    "objects": (
        lambda a: a.update(train_labels=np.array([{}], dtype=object)),
        r"can't be read as a file of np.savez",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays_are_refused_in_one_sentence(tmp_path, name):
    arrays = _arrays()
    spoil, message = BAD[name]
    spoil(arrays)
    with pytest.raises(ConfigError, match=message) as caught:
        _load(tmp_path, arrays)
    assert "\n" not in str(caught.value)


BAD_ENCODED = {
    "falling": (lambda a: a["train_offset"].__setitem__(3, 0), r"train_offset must rise"),
    "beyond": (lambda a: a["test_offset"].__setitem__(-1, 10**9), r"test_offset must rise"),
    "no image": (lambda a: a["train_jpeg"].__setitem__(slice(0, 50), 0), r"images of one size"),
    "dtype": (lambda a: a.update(test_jpeg=a["test_jpeg"].astype(int)), r"test_jpeg must be uint8"),
    "count": (lambda a: a.update(test_label=a["test_label"][1:]), r"8 test images; got 7"),
    "missing": (lambda a: a.pop("train_label"), r"must hold an array train_label"),
}


@pytest.mark.parametrize("name", BAD_ENCODED)
def test_bad_encoded_images_are_refused_in_one_sentence(tmp_path, name):
    arrays = {key: value.copy() for key, value in _encoded(_arrays()).items()}
    spoil, message = BAD_ENCODED[name]
    spoil(arrays)
    with pytest.raises(ConfigError, match=message) as caught:
        _load(tmp_path, arrays)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no arrays")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for file, message in {
        "none.npz": "there is no file",
        "text.npz": "can't be read as a file of np.savez",
        "one.npy": "can't be read as a file of np.savez",
    }.items():
        with pytest.raises(ConfigError, match=message):
            datasets.load(f"npz:{tmp_path / file}")
    for name in ("idx", "text"):
        with pytest.raises(ConfigError, match=str(tmp_path)):
            datasets.load(f"{name}:{tmp_path / 'none'}")


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b"\1" + b[1:], lambda b: b[:6]])
def test_a_damaged_idx_file_is_refused(tmp_path, spoil):
    part = (archives.images(40, channels=1)[..., 0], np.arange(40) % 4)
    archives.idx(tmp_path, {"train": part, "test": part}, packed=False)
    file = tmp_path / "t10k-images-idx3-ubyte"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ConfigError, match=r"t10k-images-idx3-ubyte can't be read as an idx file"):
        datasets.load(f"idx:{tmp_path}")


@pytest.fixture
def text(tmp_path):
    """A file of 3000 bytes, and its data set."""
    content = np.random.default_rng(0).integers(97, 101, 3000, np.uint8).tobytes()
    (tmp_path / "some.txt").write_bytes(content)
    return content, datasets.load(f"text:{tmp_path / 'some.txt'}")


def test_each_byte_of_a_text_is_labelled_by_the_next(text):
    content, data = text
    splits = (data.train, data.validation, data.test)
    assert [len(split.labels) for split in splits] == [19, 2, 2]
    assert (data.num_classes, data.image_shape, data.dtype) == (256, (128,), np.int32)
    tokens = np.concatenate([split.images.ravel() for split in splits]).tobytes()
    following = np.concatenate([split.labels.ravel() for split in splits])
    assert tokens == content[: 23 * 128]
    assert following.astype(np.uint8).tobytes() == content[1 : 23 * 128 + 1]
    ((drawn, labels),) = datasets.samples(data, 1, seed=0)
    assert drawn.shape == (64, 128)
    np.testing.assert_array_equal(drawn[:, 1:], labels[:, :-1])
    with pytest.raises(ConfigError, match=r"augmentation of a text must be 'none'; got 'shift'"):
        datasets.feed(data, data.train, 4, augmentation="shift")


def test_a_text_too_short_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(ConfigError, match=r"at least 1281 bytes; got 11"):
        datasets.load(f"text:{tmp_path / 'short.txt'}")


@pytest.mark.standard_promotion
def test_a_decoder_learns_a_text_and_is_measured_by_token(text, tmp_path, monkeypatch):
    small = functools.partial(models.GPT2, width=6, depth=1, heads=1, context=128)
    monkeypatch.setitem(models.MODELS, "small-gpt2", small)
    _, data = text
    config = Config(dataset=data.name, model="small-gpt2", method="magnitude", sparsity=0.3)
    config = dataclasses.replace(config, epochs=2, batch_size=4, learning_rate=0.1)
    metrics = train.train_and_evaluate(config, tmp_path / "run")
    losses = [epoch["train_loss"] for epoch in metrics["history"]]
    assert losses[0] > losses[-1]
    job = train.resolve(config)
    variables = steps.initialize(job.model, 0, data.image_shape, data.dtype)
    masks = jax.tree.map(lambda x: np.ones(x.shape, bool), variables["params"])
    state = steps.start(job.optimizer, variables, masks)
    logits = job.model.apply(variables, data.test.images.astype(np.int32))
    expected = np.mean(np.asarray(logits).argmax(-1) == data.test.labels)
    assert train.accuracy(job.model, state, job.feeds["test"]) == expected
