"""Batches on devices: their order, what is done to images, and the same on any devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import datasets
from experiments.config import AUGMENTATIONS, ConfigError
from experiments.datasets import augment
from experiments.datasets.augment import Augmentation
from experiments.datasets.types import Normalization
from tests.support import archives
from tests.support.meshes import mesh_of


def _data(images, labels):
    split = datasets.Split(images, labels.astype(np.int32))
    channels = images.shape[-1]
    scale = Normalization(np.zeros(channels, np.float32), np.ones(channels, np.float32))
    return datasets.Dataset("some", split, split, split, int(labels.max()) + 1, "none", scale)


def _numbered(count):
    """A data set whose images tell their own index, which is their label, too."""
    images = np.broadcast_to(np.arange(count)[:, None, None, None], (count, 3, 4, 1))
    return _data(images.astype(np.uint8), np.arange(count))


def _epoch(data, batch_size, number=0, devices=1, **options):
    feed = datasets.feed(data, data.train, batch_size, mesh=mesh_of(devices), **options)
    return [(np.asarray(images), np.asarray(labels)) for images, labels in feed.epoch(number)]


def test_an_epoch_visits_images_at_most_once_with_their_labels():
    epoch = _epoch(_numbered(23), 5)
    assert [images.shape for images, _ in epoch] == [(5, 3, 4, 1)] * 4
    labels = np.concatenate([labels for _, labels in epoch])
    assert len(set(labels.tolist())) == 20
    for images, labels in epoch:
        np.testing.assert_array_equal(images[:, 0, 0, 0], labels)


def test_a_whole_pass_keeps_the_order_and_fills_its_last_batch_up():
    data = _numbered(7)
    feed = datasets.feed(data, data.test, 4, mesh=mesh_of(2))
    batches = zip(*feed.once(), strict=True)
    images, labels = (np.concatenate([np.asarray(x) for x in parts]) for parts in batches)
    np.testing.assert_array_equal(labels, [0, 1, 2, 3, 4, 5, 6, -1])
    np.testing.assert_array_equal(images[:7, 0, 0, 0], np.arange(7))


@pytest.mark.parametrize("devices", [1, 2])
def test_inside_one_program_the_batches_are_the_same(digits, devices):
    options = {"mesh": mesh_of(devices), "augmentation": "crop-flip", "seed": 5}
    feed = datasets.feed(digits, digits.train, 300, **options)
    batch_of, each = feed.epoch_inside(2)
    inside = jax.jit(lambda each: jax.lax.map(batch_of, each))(each)
    outside = [jnp.stack(parts) for parts in zip(*feed.epoch(2), strict=True)]
    jax.tree.map(np.testing.assert_array_equal, list(inside), outside)
    assert len(outside[1]) == 4


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_batches_are_a_function_of_seed_and_epoch(digits, augmentation):
    def epoch(seed, number):
        return _epoch(digits, 512, number, augmentation=augmentation, seed=seed)[0]

    first = epoch(0, 3)
    for ours, theirs in zip(first, epoch(0, 3), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.any(first[1] != epoch(0, 4)[1])
    assert np.any(first[1] != epoch(1, 3)[1])


@pytest.mark.parametrize("augmentation", ["crop-flip", "resized-crop-flip"])
def test_batches_are_bitwise_the_same_on_eight_devices_and_split_over_them(digits, augmentation):
    ours, theirs = (
        _epoch(digits, 512, devices=count, augmentation=augmentation) for count in (1, 8)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    feed = datasets.feed(digits, digits.train, 512, mesh=mesh_of(8), augmentation=augmentation)
    for array in next(feed.epoch(0)):
        assert array.addressable_shards[0].data.shape[0] == 64


def _cropped(image, top, left, pad):
    height, width, channels = image.shape
    canvas = np.zeros((height + 2 * pad, width + 2 * pad, channels), image.dtype)
    canvas[pad : pad + height, pad : pad + width] = image
    return canvas[top : top + height, left : left + width]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_crop_and_a_flip_are_those_of_a_loop_over_images(dtype):
    images = archives.images(20, 5, 7).astype(dtype)
    transform = augment.named("crop-flip", (5, 7, 3))
    draws = transform.draw(np.random.default_rng(0), 20, (5, 7, 3))
    found = jax.jit(transform)(images, draws)
    assert found.dtype == dtype
    for image, result, offset, flip in zip(
        images, found, draws["offset"], draws["flip"], strict=True
    ):
        expected = _cropped(image, *offset, pad=4)
        np.testing.assert_array_equal(result, expected[:, ::-1] if flip else expected)


def test_every_offset_is_drawn_as_often_and_half_the_images_are_flipped():
    count = 81 * 400
    draws = augment.named("crop-flip", (32, 32, 3)).draw(
        np.random.default_rng(0), count, (32, 32, 3)
    )
    offsets = np.bincount(draws["offset"] @ [9, 1], minlength=81)
    # Each number of draws is binomial; five deviations from its mean.
    assert np.all(np.abs(offsets - 400) < 5 * 20)
    assert abs(np.mean(draws["flip"]) - 0.5) < 5 * 0.5 / np.sqrt(count)


def test_a_shift_moves_an_image_by_an_eighth_of_its_height_at_most():
    assert augment.named("shift", (8, 8, 1)) == Augmentation(pad=1)
    assert augment.named("shift", (28, 28, 1)) == Augmentation(pad=3)
    with pytest.raises(ConfigError, match=r"augmentation must be one of .*; got 'mixup'"):
        augment.named("mixup", (8, 8, 1))


@pytest.mark.parametrize("box", [(0, 0, 9, 12), (2, 3, 4, 5), (8, 11, 1, 1), (0, 6, 9, 2)])
def test_a_resized_box_is_that_of_pillow(box):
    images = archives.images(1, 9, 12, 2).astype(np.float32)
    top, left, tall, wide = box
    found = augment.resized_crop(jnp.asarray(images), jnp.asarray([box]))
    for channel in range(2):
        # Cut first, so that nothing outside the box counts.
        cut = Image.fromarray(images[0, top : top + tall, left : left + wide, channel])
        expected = np.asarray(cut.resize((12, 9), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(found[0, :, :, channel], expected, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (8, 8), (10, 100), (100, 10), (1, 1)])
def test_random_boxes_lie_within_the_image(height, width):
    boxes = augment.random_boxes(np.random.default_rng(0), 3000, height, width)
    top, left, tall, wide = boxes.T
    assert np.all((top >= 0) & (left >= 0) & (tall >= 1) & (wide >= 1))
    assert np.all((top + tall <= height) & (left + wide <= width))


def test_random_boxes_have_the_published_areas_and_shapes():
    top, left, tall, wide = augment.random_boxes(np.random.default_rng(0), 20_000, 500, 500).T
    area, ratio = tall * wide / 500**2, wide / tall
    assert (area.min(), area.max()) == pytest.approx((0.08, 1.0), abs=0.02)
    assert (ratio.min(), ratio.max()) == pytest.approx((3 / 4, 4 / 3), rel=0.02)
    # Uniform, apart from large boxes that don't fit and are drawn again.
    assert np.mean(area < 0.31) / np.mean(area < 0.54) == pytest.approx(0.5, abs=0.03)
    assert np.mean(ratio < 1) == pytest.approx(0.5, abs=0.02)
    # All places are as likely: the room above a box is half of all room.
    assert np.mean(top) == pytest.approx(np.mean(500 - tall) / 2, rel=0.03)
    assert np.mean(left) == pytest.approx(np.mean(500 - wide) / 2, rel=0.03)


def test_an_epoch_is_augmented_and_normalized(digits):
    (images, _), *_ = _epoch(digits, 512, augmentation="shift", seed=5)
    rng = np.random.default_rng((5, 0))
    rows = rng.permutation(1257)[:512]
    offsets = Augmentation(pad=1).draw(rng, 512, (8, 8, 1))["offset"]
    scale = digits.normalization
    for row, offset, image in zip(rows, offsets, images, strict=True):
        expected = _cropped(digits.train.images[row], *offset, pad=1).astype(np.float64)
        expected = (expected - scale.mean[0]) / scale.deviation[0]
        np.testing.assert_allclose(image, expected, atol=1e-5)


def test_samples_hold_as_many_images_of_each_class_and_none_twice(digits):
    drawn = datasets.samples(digits, 3, seed=0)
    assert len(drawn) == 3
    for images, labels in drawn:
        assert images.shape == (100, 8, 8, 1)
        np.testing.assert_array_equal(np.bincount(labels, minlength=10), 10)
    rows = np.concatenate([images for images, _ in drawn]).reshape(300, -1)
    known = {image.tobytes() for image in np.asarray(digits.normalized(digits.train.images))}
    assert all(row.tobytes() in known for row in rows)
    again, other = (datasets.samples(digits, 3, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(again[2][0], drawn[2][0])
    assert np.any(other[0][0] != drawn[0][0])


def test_images_come_round_again_where_a_class_has_too_few(digits):
    few = _data(digits.train.images[:60], digits.train.labels[:60])
    drawn = datasets.samples(few, 2, seed=0)
    assert all(np.all(np.bincount(labels, minlength=10) == 10) for _, labels in drawn)
    assert datasets.samples(few, 0, seed=0) == []
