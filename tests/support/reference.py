"""Slow references that paths are held against: graphs written out edge by edge, and float64.

A network of the tests is a function `network(layers, x)` of the layers below, and so is read twice:
by `JaxLayers` as the JAX function that the library traces, and by `Graph` as its units and the
weights between them, which plain loops enumerate and search.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Masks: TypeAlias = dict[str, np.ndarray]
Pads: TypeAlias = Sequence[tuple[int, int]]
# A weight is an entry of a named kernel.
Weight: TypeAlias = tuple[str, tuple[int, ...]]


class Layers(Protocol):
    """What a network is made of. Images are (batch, height, width, features), kernels HWIO."""

    numpy: Any

    def dense(self, name: str, x: Any) -> Any:
        """Multiplies the last axis by the kernel (inputs, outputs)."""

    def conv(
        self,
        name: str,
        x: Any,
        pads: Pads = ((0, 0), (0, 0)),
        *,
        stride: int = 1,
        dilation: int = 1,
        spread: int = 1,
        groups: int = 1,
    ) -> Any:
        """Convolves; `spread` is the input's dilation, as in a transposed convolution."""

    def add(self, a: Any, b: Any) -> Any:
        """Adds two values of one shape."""

    def pool(self, x: Any, window: int, stride: int) -> Any:
        """Takes the maximum over square windows, without padding."""


Network: TypeAlias = Callable[[Layers, Any], Any]


class JaxLayers:
    """Layers as JAX operations, each kernel's result rectified."""

    numpy = jnp

    def __init__(self, params: Mapping[str, jax.Array]):
        self.params = params

    def dense(self, name: str, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ self.params[name])

    def conv(
        self,
        name: str,
        x: jax.Array,
        pads: Pads = ((0, 0), (0, 0)),
        *,
        stride: int = 1,
        dilation: int = 1,
        spread: int = 1,
        groups: int = 1,
    ) -> jax.Array:
        y = lax.conv_general_dilated(
            x,
            self.params[name],
            (stride, stride),
            pads,
            (spread, spread),
            (dilation, dilation),
            ("NHWC", "HWIO", "NHWC"),
            groups,
        )
        return jax.nn.relu(y)

    def add(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return a + b

    def pool(self, x: jax.Array, window: int, stride: int) -> jax.Array:
        return lax.reduce_window(
            x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), "VALID"
        )


class Graph:
    """Layers as a graph: values are arrays of unit numbers, and every use of a weight is an edge.

    Attributes:
      edges: from a unit to a unit through a weight, or through none.
      inputs: the units of the input.
      outputs: the units of the output.
    """

    numpy = np

    def __init__(
        self, network: Network, kernels: Mapping[str, Sequence[int]], shape: Sequence[int]
    ):
        self.kernels = kernels
        self.edges: list[tuple[int, int, Weight | None]] = []
        self._size = 0
        self.inputs = self._units(shape)
        self.outputs = network(self, self.inputs)

    def _units(self, shape: Sequence[int]) -> np.ndarray:
        start, self._size = self._size, self._size + int(np.prod(shape))
        return np.arange(start, self._size).reshape(shape)

    def dense(self, name: str, x: np.ndarray) -> np.ndarray:
        y = self._units((*x.shape[:-1], self.kernels[name][1]))
        for at in np.ndindex(*x.shape[:-1]):
            for i, o in np.ndindex(*self.kernels[name]):
                self.edges.append((x[*at, i], y[*at, o], (name, (i, o))))
        return y

    def conv(
        self,
        name: str,
        x: np.ndarray,
        pads: Pads = ((0, 0), (0, 0)),
        *,
        stride: int = 1,
        dilation: int = 1,
        spread: int = 1,
        groups: int = 1,
    ) -> np.ndarray:
        batch, *sizes, _ = x.shape
        taps, (width, features) = self.kernels[name][:2], self.kernels[name][2:]
        spans = [
            (n - 1) * spread + 1 + sum(pad) - (k - 1) * dilation
            for n, k, pad in zip(sizes, taps, pads, strict=True)
        ]
        y = self._units((batch, *(-(-span // stride) for span in spans), features))
        for tap, at in ((t, a) for t in np.ndindex(*taps) for a in np.ndindex(*y.shape[1:3])):
            where = [
                a * stride + t * dilation - pad[0] for a, t, pad in zip(at, tap, pads, strict=True)
            ]
            source = [w // spread for w in where]
            if any(
                w % spread or not 0 <= w < n * spread for w, n in zip(where, sizes, strict=True)
            ):
                continue
            for n, i, o in np.ndindex(batch, width, features):
                channel = o // (features // groups) * width + i
                self.edges.append((x[n, *source, channel], y[n, *at, o], (name, (*tap, i, o))))
        return y

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        y = self._units(a.shape)
        for x in (a, b):
            self.edges += [(i, o, None) for i, o in zip(x.flat, y.flat, strict=True)]
        return y

    def pool(self, x: np.ndarray, window: int, stride: int) -> np.ndarray:
        batch, height, width, features = x.shape
        y = self._units(
            (batch, (height - window) // stride + 1, (width - window) // stride + 1, features)
        )
        for n, i, j, c in np.ndindex(*y.shape):
            rows, columns = (slice(k * stride, k * stride + window) for k in (i, j))
            self.edges += [(u, y[n, i, j, c], None) for u in x[n, rows, columns, c].flat]
        return y

    def paths(self) -> Iterator[tuple[Weight, ...]]:
        """The weights along each path from an input to an output, where nothing is pruned."""
        onward = _neighbours((a, (b, weight)) for a, b, weight in self.edges)
        ends = set(self.outputs.flat)

        def walk(unit: int, passed: tuple[Weight, ...]) -> Iterator[tuple[Weight, ...]]:
            if unit in ends:
                yield passed
            for after, weight in onward[unit]:
                yield from walk(after, passed if weight is None else (*passed, weight))

        for unit in self.inputs.flat:
            yield from walk(unit, ())

    def random_path(self, rng: np.random.Generator) -> list[Weight]:
        """The weights along one path, walked back from an output."""
        unit, passed = rng.choice(self.outputs.ravel()), []
        while backward := self._backward[unit]:
            unit, weight = backward[rng.integers(len(backward))]
            passed += [] if weight is None else [weight]
        return passed

    @cached_property
    def _backward(self) -> dict[int, list[tuple[int, Weight | None]]]:
        return _neighbours((b, (a, weight)) for a, b, weight in self.edges)

    def effective(self, masks: Masks) -> Masks:
        """Which kept weights join a unit that the input reaches to one that reaches the output."""
        kept = [(a, b, w) for a, b, w in self.edges if w is None or masks[w[0]][w[1]]]
        reached = _search(self.inputs.flat, _neighbours((a, b) for a, b, _ in kept))
        useful = _search(self.outputs.flat, _neighbours((b, a) for a, b, _ in kept))
        effective = {name: np.zeros(mask.shape, bool) for name, mask in masks.items()}
        for a, b, weight in kept:
            if weight is not None and a in reached and b in useful:
                effective[weight[0]][weight[1]] = True
        return effective


def _neighbours(pairs: Iterable[tuple[int, Any]]) -> dict[int, list[Any]]:
    neighbours: dict[int, list[Any]] = defaultdict(list)
    for unit, other in pairs:
        neighbours[unit].append(other)
    return neighbours


def _search(starts: Iterable[int], neighbours: Mapping[int, list[int]]) -> set[int]:
    """The units that can be reached from any of some units, themselves included."""
    found = set(starts)
    waiting = list(found)
    while waiting:
        for unit in neighbours.get(waiting.pop(), ()):
            if unit not in found:
                found.add(unit)
                waiting.append(unit)
    return found


def count_paths(paths: Iterable[tuple[Weight, ...]], masks: Masks) -> tuple[int, Masks]:
    """The number of paths that masks leave, and its derivative in each mask, in Python integers."""
    total = 0
    derivative = {name: np.zeros(mask.shape, object) for name, mask in masks.items()}
    for path in paths:
        pruned = [i for i, (name, index) in enumerate(path) if not masks[name][index]]
        total += not pruned
        # Of a product of zeros and ones only those factors matter besides which all are one.
        for i in range(len(path)) if not pruned else pruned if len(pruned) == 1 else ():
            name, index = path[i]
            derivative[name][index] += 1
    return total, derivative


def random_masks(
    shapes: Mapping[str, Sequence[int]], density: float, rng: np.random.Generator
) -> Masks:
    """Masks that keep each weight with some probability."""
    return {name: rng.random(shape) < density for name, shape in shapes.items()}


def float64_log_count(
    fn: Callable[[Any, Any], jax.Array], shape: Sequence[int]
) -> Callable[[Masks], tuple[float, Masks]]:
    """The log of a network's output, summed, where weights are masks and the input is ones.

    The network itself is run, so it must hold no constants but kernels, and no normalisation. The
    masks go in and the logarithm and its gradient come out as float64.
    """

    def log_sum(masks: Any) -> jax.Array:
        return jnp.log(jnp.sum(fn(masks, jnp.ones(shape))))

    compiled = jax.jit(jax.value_and_grad(log_sum), compiler_options=quick_compilation())

    def run(masks: Masks) -> tuple[float, Masks]:
        with jax.enable_x64(True):
            value, gradient = compiled({k: jnp.asarray(m, jnp.float64) for k, m in masks.items()})
            return float(value), {name: np.asarray(g) for name, g in gradient.items()}

    return run


def float64_chain(
    kernels: Sequence[np.ndarray], shape: Sequence[int], pooled: Sequence[int] = ()
) -> tuple[float, list[np.ndarray]]:
    """The log of the number of paths through a chain of convolutions, and its gradient, in NumPy.

    Args:
      kernels: masks (taps, taps, inputs, outputs) of odd taps, padded to keep the map's size, or
        (inputs, outputs).
      shape: height, width and features of the input.
      pooled: the layers after which windows of 2x2 are summed.

    Returns:
      The logarithm, and its derivative in each mask.
    """
    counts, padded = np.ones(shape), []
    for i, kernel in enumerate(kernels):
        radius = kernel.shape[0] // 2 if kernel.ndim == 4 else 0
        padded.append(np.pad(counts, ((radius, radius), (radius, radius), (0, 0))))
        counts = sum(padded[i][tap] @ k for tap, k in _taps(kernel, counts.shape))
        if i in pooled:
            height, width, features = counts.shape
            counts = counts.reshape(height // 2, 2, width // 2, 2, features).sum((1, 3))

    total, gradients = counts.sum(), [np.zeros(kernel.shape) for kernel in kernels]
    onward = np.ones_like(counts) / total
    for i, kernel in reversed(list(enumerate(kernels))):
        if i in pooled:
            onward = onward.repeat(2, 0).repeat(2, 1)
        before = np.zeros_like(padded[i])
        taps = zip(_taps(kernel, onward.shape), _taps(gradients[i], onward.shape), strict=True)
        for (tap, k), (_, gradient) in taps:
            gradient += np.tensordot(padded[i][tap], onward, ((0, 1), (0, 1)))
            before[tap] += onward @ k.T
        radius = kernel.shape[0] // 2 if kernel.ndim == 4 else 0
        onward = before[radius : radius + onward.shape[0], radius : radius + onward.shape[1]]
    return float(np.log(total)), gradients


def _taps(
    kernel: np.ndarray, shape: Sequence[int]
) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """The matrix of each tap (a view), and where in a padded map it reads."""
    square = kernel if kernel.ndim == 4 else kernel[None, None]
    for i, j in np.ndindex(*square.shape[:2]):
        yield (slice(i, i + shape[0]), slice(j, j + shape[1])), square[i, j]


@cache
def quick_compilation() -> dict[str, Any]:
    """Compiler options for functions that run a few times; what a release doesn't know is left out.

    The older emitters of fused loops compile in half the time.
    """
    options = {"xla_backend_optimization_level": 0}
    older = options | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.negative, compiler_options=older).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return options
    return older
