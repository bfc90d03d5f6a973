"""Augmentation of training images. The host draws numbers, a jitted function applies them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import AUGMENTATIONS, ConfigError

Draws = dict[str, np.ndarray]
"""Random numbers by name; the first axis of each is over the images."""

PAD = 4
"""Pixels of padding before a crop, as is usual for CIFAR."""

AREA = (0.08, 1.0)
"""The range of a random box's area, as a fraction of the image's."""

ASPECT = (3 / 4, 4 / 3)
"""The range of a random box's ratio of width to height."""


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """An augmentation. Hashable, so that it can be a static argument.

    NumPy draws a few numbers for each image, so that they are the same on any devices.

    Attributes:
        pad: Pad an image with this many zeros, then crop it at a random place.
        flip: Whether to mirror half of the images.
        resize: Whether to resize a random box of an image to the size of the image.
    """

    pad: int = 0
    flip: bool = False
    resize: bool = False

    def draw(self, rng: np.random.Generator, count: int, image_shape: tuple[int, ...]) -> Draws:
        """Draws for some images: "offset" (count, 2), "box" (count, 4) and "flip" (count,)."""
        draws = {}
        if self.pad:
            draws["offset"] = rng.integers(0, 2 * self.pad + 1, (2, count), np.int32).T
        if self.resize:
            draws["box"] = random_boxes(rng, count, *image_shape[:2])
        if self.flip:
            draws["flip"] = rng.integers(0, 2, count, np.uint8).astype(bool)
        return draws

    def __call__(self, images: jax.Array, draws: dict[str, jax.Array]) -> jax.Array:
        """Returns augmented images (count, height, width, channels), float32 if resized."""
        if self.pad:
            images = crop(images, draws["offset"], self.pad)
        if self.resize:
            images = resized_crop(images, draws["box"])
        if self.flip:
            images = jnp.where(draws["flip"][:, None, None, None], images[:, :, ::-1], images)
        return images


def named(name: str, image_shape: tuple[int, ...]) -> Augmentation:
    """Returns the augmentation with a name, for images of a shape.

    Raises:
        ConfigError: No augmentation has this name, or it is not for text.
    """
    if name not in AUGMENTATIONS:
        raise ConfigError(f"augmentation must be one of {AUGMENTATIONS}; got {name!r}.")
    if name != "none" and len(image_shape) != 3:
        raise ConfigError(f"augmentation of a text must be 'none'; got {name!r}.")
    if name == "shift":
        return Augmentation(pad=max(1, image_shape[0] // 8))
    return {
        "none": Augmentation(),
        "crop-flip": Augmentation(pad=PAD, flip=True),
        "resized-crop-flip": Augmentation(resize=True, flip=True),
    }[name]


def random_boxes(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Draws boxes of random area and shape within an image.

    Each box is the first of ten candidates that fits. If none fits, it is the largest central box
    with an allowed ratio.

    Returns:
        int32 of shape (count, 4): top, left, height and width in pixels.

    References:
        Szegedy et al., Going Deeper with Convolutions, CVPR 2015, section 6.
    """
    area = height * width * rng.uniform(*AREA, (count, 10))
    ratio = np.exp(rng.uniform(np.log(ASPECT[0]), np.log(ASPECT[1]), (count, 10)))
    tall = np.rint(np.sqrt(area / ratio)).astype(np.int32)
    wide = np.rint(np.sqrt(area * ratio)).astype(np.int32)
    fits = (tall >= 1) & (tall <= height) & (wide >= 1) & (wide <= width)
    first = np.argmax(fits, axis=1)
    each = np.arange(count)
    tall, wide, fits = tall[each, first], wide[each, first], fits[each, first]
    tall = np.where(fits, tall, min(height, round(width / ASPECT[0])))
    wide = np.where(fits, wide, min(width, round(height * ASPECT[1])))
    top, left = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
    top = np.where(fits, top, (height - tall) // 2)
    left = np.where(fits, left, (width - wide) // 2)
    return np.stack([top, left, tall, wide], axis=1).astype(np.int32)


def crop(images: jax.Array, offset: jax.Array, pad: int) -> jax.Array:
    """Pads images with zeros and crops each to its old size, at an offset (count, 2)."""
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def one(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    return jax.vmap(one)(padded, offset)


def resized_crop(images: jax.Array, boxes: jax.Array) -> jax.Array:
    """Resizes a box of each image to the image's size, bilinearly and with antialiasing.

    Args:
        images: Of shape (count, height, width, channels).
        boxes: Integers of shape (count, 4): top, left, height and width.
    """
    _, height, width, _ = images.shape
    rows = _weights(boxes[:, 0], boxes[:, 2], height)
    columns = _weights(boxes[:, 1], boxes[:, 3], width)
    # By default TPUs would round pixels to eight bits.
    return jnp.einsum(
        "nyh,nhwc,nxw->nyxc", rows, images.astype(jnp.float32), columns, precision="highest"
    )


def _weights(start: jax.Array, size: jax.Array, length: int) -> jax.Array:
    """Returns the weights (count, length, length) of a box's pixels in each resized pixel."""
    start, size = (x.astype(jnp.float32)[:, None, None] for x in (start, size))
    pixel = jnp.arange(length, dtype=jnp.float32)
    scale = size / length
    center = start + (pixel[None, :, None] + 0.5) * scale
    distance = jnp.abs(pixel[None, None] + 0.5 - center) / jnp.maximum(scale, 1.0)
    inside = (pixel[None, None] >= start) & (pixel[None, None] < start + size)
    triangle = jnp.where(inside, jnp.maximum(1.0 - distance, 0.0), 0.0)
    return triangle / triangle.sum(-1, keepdims=True)
