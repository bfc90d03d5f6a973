"""What a network of the zoo is, and the small helpers its modules share."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

PyTree: TypeAlias = Any
Network: TypeAlias = Callable[[PyTree, PyTree], PyTree]
Built: TypeAlias = tuple[Network, PyTree, PyTree]


@dataclass(frozen=True)
class Case:
    """A small network, written the way its library's users write one.

    Attributes:
        name: library and architecture, e.g. `"linen/resnet_basic"`.
        make: builds `(fn, params, x)`: a pure function `fn(params, x)`, its parameters, and an
            array or a tuple of arrays.
        layers: path names of the prunable leaves of `params`: the floating leaves of two or more
            dimensions by which some contraction multiplies a value that depends on `x`.
        free: path names of the other floating leaves of two or more dimensions.
    """

    name: str
    make: Callable[[], Built]
    layers: frozenset[str]
    free: frozenset[str] = frozenset()


def expand(*patterns: str) -> frozenset[str]:
    """The path names meant by patterns with alternatives, `"a/{b,c}"` being `a/b` and `a/c`."""
    names: list[str] = []
    for pattern in patterns:
        pieces = re.split(r"\{([^{}]*)\}", pattern)
        choices = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return frozenset(names)


def draw(shapes: PyTree, seed: int = 0) -> PyTree:
    """Random values for the `jax.ShapeDtypeStruct` leaves of a tree; other leaves stay.

    The libraries' own initialisers are passed over: they take longer than the network itself, and
    their zeros (last norm scales, heads, layer scales) would hide that a kernel matters.
    """
    rng = np.random.default_rng(seed)

    def leaf(shape: Any) -> Any:
        if not isinstance(shape, jax.ShapeDtypeStruct):
            return shape
        if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(seed), shape.shape)
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            return jnp.zeros(shape.shape, shape.dtype)
        if len(shape.shape) < 2:  # positive, so that it may be a running variance
            return jnp.asarray(rng.uniform(0.5, 1.5, shape.shape), shape.dtype)
        deviation = (max(shape.shape[-1], 1) / np.prod(shape.shape)) ** 0.5
        return jnp.asarray(deviation * rng.standard_normal(shape.shape), shape.dtype)

    return jax.tree.map(leaf, shapes)


def normal(*shape: int, seed: int = 1) -> jax.Array:
    """A float32 array of standard normal values: an image, a feature sequence, a vector."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def image() -> jax.Array:
    """Two 8x8 images of three channels, channels last."""
    return normal(2, 8, 8, 3)


def tokens(*shape: int, size: int = 11, seed: int = 1) -> jax.Array:
    """An int32 array of token ids in `[0, size)`."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, size, shape), jnp.int32)


def parameters(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """A flat dictionary of drawn float32 parameters, for networks without a library."""
    return draw({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})


def promoting(make: Callable[[], Built]) -> Callable[[], Built]:
    """The same network under standard dtype promotion, which its library's own code relies on."""

    def relaxed() -> Built:
        with jax.numpy_dtype_promotion("standard"):
            fn, params, x = make()

        def call(params: PyTree, x: PyTree) -> PyTree:
            with jax.numpy_dtype_promotion("standard"):
                return fn(params, x)

        return call, params, x

    return relaxed
