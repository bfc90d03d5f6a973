"""The networks that benchmarks prune, with their published inputs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import models


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and its input.

    Attributes:
        model: Name among `experiments.models.MODELS`.
        classes: Size of the output.
        shape: Shape of one input: of an image, or of a row of tokens.
        width: As in `experiments.models.create`.
        depth: Its depth, or None for the published one.
    """

    model: str
    classes: int
    shape: tuple[int, ...]
    width: int | None = None
    depth: int | None = None

    @property
    def title(self) -> str:
        """The network's name in tables."""
        width = "" if self.width is None else f", width {self.width}"
        width += "" if self.depth is None else f", depth {self.depth}"
        where = f"{self.shape[0]}²" if len(self.shape) == 3 else f"{self.shape[0]} tokens"
        return f"{self.model} at {where}{width}"

    def problem(self) -> tuple[Callable[..., Any], Any, jax.ShapeDtypeStruct]:
        """Returns what `dpai_jax.prune` takes: a function, params, and the shape of x.

        Kernels are drawn from N(0, 0.05²); scales and variances, which are vectors, are ones.
        """
        model = models.create(self.model, self.classes, self.width)
        model = model if self.depth is None else model.clone(depth=self.depth)
        dtype = jnp.float32 if len(self.shape) == 3 else jnp.int32
        x = jax.ShapeDtypeStruct((1, *self.shape), dtype)
        rng = np.random.default_rng(0)

        def leaf(shape: tuple[int, ...]) -> jax.Array:
            drawn = rng.standard_normal(shape, np.float32) if len(shape) > 1 else np.float32(20)
            return jnp.asarray(np.broadcast_to(drawn * np.float32(0.05), shape))

        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        return model.apply, jax.tree.map(lambda s: leaf(s.shape), shapes), x


_RESNET20 = Network("resnet20", 10, (32, 32, 3))
_VGG19 = Network("vgg19", 100, (32, 32, 3))
_EFFICIENTNET = Network("efficientnet_b0", 1000, (224, 224, 3))
_SMALL_EFFICIENTNET = Network("efficientnet_b0", 10, (32, 32, 3))
_VIT = Network("vit_b16", 1000, (224, 224, 3))
_GPT2 = Network("gpt2", 50257, (1024,))

STEP = (
    _RESNET20,
    Network("resnet18", 200, (64, 64, 3)),
    _VGG19,
)
"""Networks for which the published code's time is known."""

LARGE = (
    _EFFICIENTNET,
    Network("resnet50_imagenet", 1000, (224, 224, 3)),
    _VIT,
    _GPT2,
)

COLD = (_RESNET20, _VGG19, _EFFICIENTNET, _VIT, _GPT2)
"""Networks whose first call is timed."""

RIVALS = (_RESNET20, _SMALL_EFFICIENTNET)
"""Networks on which the first calls of all methods are timed."""

GROWTH = (
    *(Network("resnet20", 10, (32, 32, 3), depth=depth) for depth in (20, 56, 110)),
    *(Network("gpt2", 1000, (128,), 192, depth) for depth in (4, 12, 24, 48)),
)
"""Networks of repeated blocks, at several depths."""

COPIES = (
    Network("lenet", 10, (28, 28, 1)),
    Network("resnet20", 10, (8, 8, 1), 8),
)
"""Small networks; several copies of each are trained at once."""

COMPACT = (
    Network("lenet", 10, (28, 28, 1)),
    Network("lenet5", 10, (28, 28, 1)),
    _RESNET20,
    Network("vgg19", 100, (32, 32, 3), 16),
    Network("vit_ti4", 10, (32, 32, 3), 48),
)
"""Networks whose dead channels are cut out."""

QUALITY = (
    _RESNET20,
    _VGG19,
    _SMALL_EFFICIENTNET,
    Network("vit_ti4", 10, (32, 32, 3), 48),
)
"""Networks on which mean-field counting is compared with exact counting."""

SETTINGS = (
    Network("lenet", 10, (28, 28, 1)),
    _RESNET20,
    Network("vgg19", 100, (32, 32, 3), 16),
)
"""Networks on which settings of DPaI are compared."""

SPARSITIES = (0.9, 0.9684, 0.99, 0.9968)
"""The paper's, without the lowest."""
