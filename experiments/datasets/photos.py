"""Encoded images: decoding them, and sequences of them on disk."""

import dataclasses
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge, in pixels."""


def decoded(blob: bytes) -> Image.Image:
    """Decodes an image, and converts it to RGB."""
    return Image.open(io.BytesIO(blob)).convert("RGB")


def decoded_all(blobs: Iterable[bytes]) -> np.ndarray:
    """Decodes images of one size to uint8 of shape (count, height, width, 3).

    Raises:
        ValueError: They differ in size.
        OSError: One is not an image.
    """
    # Threads would not help: on small images Pillow spends its time under Python's lock.
    return np.stack([np.asarray(decoded(blob)) for blob in blobs])


def resized(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Returns a box of an image as uint8 of shape (size, size, 3)."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def central_box(image: Image.Image) -> Box:
    """Returns the central square of 7/8 of an image's shorter side."""
    side = min(image.size) * 7 / 8
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return left, top, left + side, top + side


@dataclasses.dataclass(frozen=True, eq=False)
class Photos:
    """A sequence of images of any sizes on disk, seen as squares of one size.

    Attributes:
        blobs: The encoded images, read one by one.
        rows: Which of them belong to the sequence, int64 of shape (count,).
        size: Height and width of an item of the sequence.
    """

    blobs: Sequence[bytes]
    rows: np.ndarray
    size: int = 224

    @property
    def shape(self) -> tuple[int, ...]:
        """(count, size, size, 3), as if they were an array."""
        return len(self.rows), self.size, self.size, 3

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Returns the middle of some images as uint8 of shape (count, size, size, 3)."""
        images = [self.image(int(row)) for row in rows]
        return np.stack([resized(image, central_box(image), self.size) for image in images])

    def image(self, row: int) -> Image.Image:
        """Returns an image in its own size."""
        return decoded(self.blobs[int(self.rows[row])])

    def select(self, rows: np.ndarray) -> "Photos":
        """Returns some of the images, still on disk."""
        return dataclasses.replace(self, rows=self.rows[rows])
