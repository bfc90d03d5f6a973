"""Any network on images of another size."""

import flax.linen as nn
import jax


class Resized(nn.Module):
    """A network before which images are resized, bilinearly. Its variables are the network's.

    Images that have the size already go through untouched, so that a trace of the network at that
    size meets nothing but the network.

    Attributes:
        model: The network.
        size: Pixels of an image along both axes.
    """

    model: nn.Module
    size: int

    def setup(self) -> None:
        """Shares the network's variables, by their names."""
        nn.share_scope(self, self.model)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the network's output for images (batch, height, width, channels)."""
        shape = (len(x), *resized_shape(x.shape[1:], self.size))
        if x.shape != shape:
            x = jax.image.resize(x, shape, "bilinear")
        return self.model(x, train=train)


def resized_shape(image_shape: tuple[int, ...], size: int | None) -> tuple[int, ...]:
    """Returns (height, width, channels) of an image at a size; None leaves it as it is."""
    return image_shape if size is None else (size, size, image_shape[-1])
