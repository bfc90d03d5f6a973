"""Networks that resize their images."""

import flax.linen as nn
import jax


class Resized(nn.Module):
    """Resizes images bilinearly, then applies a network. Its variables are the network's.

    Images of the right size are not changed, so that a trace at that size has only the network.

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
