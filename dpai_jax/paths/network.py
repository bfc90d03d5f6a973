"""A traced network: its prunable layers, and its number of paths as a function of their masks."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from dpai_jax.paths import rules  # noqa: F401  (registers the rules)
from dpai_jax.paths import values as v
from dpai_jax.paths.interpreter import COUNTINGS, GATES, Interpreter, Use
from dpai_jax.paths.meshes import (
    Shardings,
    automatic,
    explicit_shardings,
    moved_off,
    shardings_of,
    split_like,
)
from dpai_jax.paths.rules.reduction import total
from dpai_jax.paths.trees import check_structure, named_leaves
from dpai_jax.paths.values import Flow, Free, Value, Weight

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Layer:
    """A prunable kernel, and what its axes are to the contraction that uses it.

    Attributes:
      name: its path among the parameters, such as `params/Dense_0/kernel`.
      index: its place among the leaves of the parameters.
      shape: its shape.
      inputs: the axes over input features (of one group).
      outputs: the axes over output features, those of all groups.
      taps: the axes over the positions of a convolution's filter.
      stack: the axes over copies of the layer, one for each step of a scan over layers.
      groups: into how many groups the features are split.
    """

    name: str
    index: int
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    taps: tuple[int, ...]
    stack: tuple[int, ...]
    groups: int

    @property
    def size(self) -> int:
        """The number of weights, over all copies."""
        return math.prod(self.shape)

    @property
    def copies(self) -> int:
        """The number of layers stacked in this one kernel."""
        return math.prod(self.shape[i] for i in self.stack)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network function traced once, ready to count the paths of any masks.

    Made by `trace`. Networks compare by identity, so one can be a static argument of `jax.jit`.

    Attributes:
      layers: the prunable layers, in the order in which an input passes them.
      gates: how a factor that is alive everywhere takes part in a product (see `trace`).
      treedef: the tree structure of the parameters, and so of masks and scores.
    """

    layers: tuple[Layer, ...]
    gates: str
    treedef: Any
    _shapes: tuple[tuple[int, ...], ...]
    _jaxpr: Any

    @property
    def size(self) -> int:
        """The number of prunable weights."""
        return sum(layer.size for layer in self.layers)

    def leaves(self, tree: PyTree) -> list[Any]:
        """The leaves of a tree parallel to the parameters that belong to the layers, in order."""
        leaves = self.treedef.flatten_up_to(tree)
        return [leaves[layer.index] for layer in self.layers]

    def tree(self, leaves: Sequence[Any], rest: Callable[[], Any]) -> PyTree:
        """The tree parallel to the parameters that has these leaves at the layers.

        Args:
          leaves: one for each layer.
          rest: makes the leaf for everything that is not prunable.

        Returns:
          The tree.
        """
        by_index = {layer.index: x for layer, x in zip(self.layers, leaves, strict=True)}
        indices = range(self.treedef.num_leaves)
        return self.treedef.unflatten([by_index[i] if i in by_index else rest() for i in indices])

    def log_count(
        self, masks: list[Array], counting: str = "exact", shardings: Shardings = ()
    ) -> Array:
        """The logarithm of the number of paths.

        Args:
          masks: the layers' masks as float32.
          counting: "exact" or "mean_field".
          shardings: how the masks lie on a mesh, where their types don't tell (see
            `shardings_of`).

        Returns:
          float32 scalar.
        """
        mean_field = counting == "mean_field"
        interpreter = Interpreter(
            self.gates, mean_field=mean_field, shardings=self._apart(masks, shardings)
        )
        return automatic(functools.partial(self._log_count, interpreter), masks, like=None)

    def _log_count(self, interpreter: Interpreter, masks: list[Array]) -> Array:
        flows = self._outputs(masks, interpreter)
        sums, exponent = v.align(flows)
        ends = [
            total(interpreter, v.Spread(x, f.shape), range(len(f.shape)))
            for x, f in zip(sums, flows, strict=True)
        ]
        count = functools.reduce(jnp.add, [jnp.sum(end.array) for end in ends])
        # With no path at all the derivative is that of the count itself: it shows which weights
        # would make one.
        log = jnp.log(jnp.where(count > 0, count, 1.0 + (count - lax.stop_gradient(count))))
        return jnp.where(
            count > 0, log + exponent.astype(jnp.float32) * math.log(2.0), log - jnp.inf
        )

    def reached(self, masks: list[Array], shardings: Shardings = ()) -> list[Array]:
        """Which weights a path passes, kept or pruned: a weight pruned is as if it were kept.

        Args:
          masks: the layers' masks as float32 zeros and ones.
          shardings: as in `log_count`.

        Returns:
          For each layer one where a weight, if kept, lies on a path, and zero elsewhere.
        """
        apart = self._apart(masks, shardings)

        def count(masks: list[Array]) -> Array:
            interpreter = Interpreter("jacobian", saturating=True, shardings=apart)
            flows = self._outputs(masks, interpreter)
            return functools.reduce(jnp.add, [jnp.sum(flow.mantissa) for flow in flows])

        def reached(masks: list[Array]) -> list[Array]:
            return [(g > 0.5).astype(g.dtype) for g in jax.grad(count)(masks)]

        return automatic(reached, masks, like=masks)

    def incoming(self, masks: list[Array]) -> list[Array]:
        """The number of paths that enter each layer at each of its weights, kept or pruned.

        That of a weight is the number of paths into its input feature, summed over the positions
        at which the layer reads it there; the layers behind have no part in it.

        Args:
          masks: the layers' masks as float32.

        Returns:
          For each layer an array of its shape, in units of its largest entry. Of a kernel used
          several times it is the sum over the uses, each in units of its own largest. Zero where
          no path enters, and throughout for a kernel whose paths do not count (see `gates`).
        """

        def count(masks: list[Array]) -> Array:
            flows = self._outputs(masks, Interpreter(self.gates, entering=True))
            return functools.reduce(jnp.add, [jnp.sum(flow.mantissa) for flow in flows])

        def incoming(masks: list[Array]) -> list[Array]:
            entering = jax.grad(count)(masks)
            largest = [jnp.max(e, initial=0.0) for e in entering]
            return [e / jnp.where(m > 0, m, 1.0) for e, m in zip(entering, largest, strict=True)]

        return automatic(incoming, masks, like=masks)

    def _apart(self, masks: list[Array], shardings: Shardings) -> dict[int, NamedSharding]:
        """How kernels lie while paths are counted, by their indices: each copy split alike.

        A loop over copies that lie on different devices would bring all of them to each device.
        """
        given = shardings or [None] * len(masks)
        found = [a or b for a, b in zip(given, explicit_shardings(masks), strict=True)]
        return {
            layer.index: moved_off(sharding, layer.shape, layer.stack)
            for layer, sharding in zip(self.layers, found, strict=True)
            if isinstance(sharding, NamedSharding)
        }

    def _outputs(self, masks: list[Array], interpreter: Interpreter) -> list[Flow]:
        by_index = {
            layer.index: split_like(m, interpreter.shardings.get(layer.index))
            for layer, m in zip(self.layers, masks, strict=True)
        }
        params = [
            _weight(i, by_index[i]) if i in by_index else Free(shape)
            for i, shape in enumerate(self._shapes)
        ]
        return _evaluate(self._jaxpr, params, interpreter)


def trace(
    fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    x: PyTree,
    prunable: Callable[[str, Any], bool] | None = None,
    gates: str = "balanced",
) -> Network:
    """Traces a network function, and finds its prunable layers.

    Prunable are the floating leaves of `params` with two or more dimensions that a contraction uses
    as the weight on something that depends on `x`: kernels of dense, convolutional, recurrent and
    attention layers. Nothing is computed; `params` and `x` may hold `jax.ShapeDtypeStruct`.

    Example:
      >>> import jax, jax.numpy as jnp, dpai_jax as dpai
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["out"]
      >>> params = {"hidden": jnp.ones((4, 8)), "out": jnp.ones((8, 2))}
      >>> net = dpai.trace(fn, params, jnp.ones((1, 4)))
      >>> [(layer.name, layer.shape) for layer in net.layers]
      [('hidden', (4, 8)), ('out', (8, 2))]
      >>> round(float(jnp.exp(dpai.log_paths(net, jax.tree.map(jnp.ones_like, params)))))
      64

    Args:
      fn: the network, `fn(params, x)`, any function that JAX can trace. Its outputs may be any
        pytree of arrays; paths are counted to all of them. Like `jax.jit`, a function that was
        traced before with arguments of the same shapes is not traced again.
      params: pytree of arrays.
      x: the input, one array or a pytree of them; floating, or integer token ids.
      prunable: keeps of the leaves that were found only those for which `prunable(name, leaf)` is
        true, where `leaf` is a `jax.ShapeDtypeStruct`. The others count as all ones.
      gates: how a factor of a product that is alive everywhere (a sigmoid, a softmax), and so only
        modulates the other, takes part: "jacobian", as a term of the network's Jacobian;
        "balanced", the same with its counts scaled to the other factor's largest; "signal", not.

    Returns:
      The traced network.

    Raises:
      TypeError: if `fn` is not callable, or a leaf of `params` or `x` is not an array.
      ValueError: if `gates` is unknown, no leaf is prunable, or no path leads to the output.
      NotImplementedError: if the input meets a primitive without path semantics.

    References:
      Xiang et al., DPaI: Differentiable Pruning at Initialization with Node-Path Balance
      Principle, ICLR 2025, for the number of effective paths R_P.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function fn(params, x), got {fn!r}")
    if gates not in GATES:
        raise ValueError(f"gates must be one of {', '.join(GATES)}, got {gates!r}")
    for argument, tree in (("params", params), ("x", x)):
        _check_arrays(argument, tree)
    leaves, treedef = jax.tree.flatten(jax.tree.map(_abstract, (params, x)))
    arguments = (fn, tuple(leaves), treedef, prunable, gates)
    try:
        hash(arguments)
    except TypeError:
        return _trace(*arguments)
    return _trace_once(*arguments)


def _trace(
    fn: Callable[[PyTree, PyTree], PyTree],
    arguments: tuple[jax.ShapeDtypeStruct, ...],
    arguments_treedef: Any,
    prunable: Callable[[str, Any], bool] | None,
    gates: str,
) -> Network:
    params, x = arguments_treedef.unflatten(arguments)
    named, treedef = named_leaves(params)
    jaxpr = jax.make_jaxpr(fn)(params, x)
    shapes = tuple(leaf.shape for _, leaf in named)
    kernels = [
        _is_kernel(leaf) and (prunable is None or bool(prunable(name, leaf)))
        for name, leaf in named
    ]
    uses = _uses(jaxpr, kernels, shapes, gates)
    if not uses:
        raise ValueError(
            "params has no prunable leaf: no floating leaf of two or more dimensions"
            + (" that prunable accepts" if prunable is not None else "")
            + " is the weight of a contraction with a value that depends on x"
        )
    layers = tuple(_layer(use, named[use.leaf][0], shapes[use.leaf]) for use in uses)
    return Network(layers, gates, treedef, shapes, jaxpr)


# Compiled counts are cached by network; so pruning a function again, at another sparsity or by
# another method, compiles nothing anew.
_trace_once = functools.lru_cache(maxsize=32)(_trace)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    dtype = getattr(leaf, "dtype", None)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf) if dtype is None else dtype)


def _check_arrays(argument: str, tree: PyTree) -> None:
    for name, leaf in named_leaves(tree)[0]:
        is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        if not is_array and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(
                f"{argument} must be a pytree of arrays, but its leaf {name} is {leaf!r}"
            )


def _is_kernel(leaf: jax.ShapeDtypeStruct) -> bool:
    return len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _uses(
    jaxpr: Any, kernels: list[bool], shapes: tuple[tuple[int, ...], ...], gates: str
) -> list[Use]:
    """The first use of each kernel, in the order of evaluation."""
    interpreter = Interpreter(gates)

    def discover(masks: dict[int, Array]) -> list[Array]:
        params = [
            _weight(i, masks[i]) if i in masks else Free(shape) for i, shape in enumerate(shapes)
        ]
        return [flow.mantissa for flow in _evaluate(jaxpr, params, interpreter)]

    masks = {
        i: jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(shapes) if kernels[i]
    }
    jax.eval_shape(lambda masks: automatic(discover, masks, like=None), masks)
    first: dict[int, Use] = {}
    for use in interpreter.uses:
        first.setdefault(use.leaf, use)
    return list(first.values())


def _weight(index: int, mask: Array) -> Weight:
    return Weight(mask, ((index, tuple(frozenset({i}) for i in range(mask.ndim))),))


def _layer(use: Use, name: str, shape: tuple[int, ...]) -> Layer:
    named = {*use.inputs, *use.outputs, *use.taps}
    stack = tuple(i for i, size in enumerate(shape) if i not in named and size > 1)
    return Layer(name, use.leaf, shape, use.inputs, use.outputs, use.taps, stack, use.groups)


def _evaluate(jaxpr: Any, params: Sequence[Value], interpreter: Interpreter) -> list[Flow]:
    """The flows at a network's outputs."""
    inputs = [_input(aval, interpreter) for aval in jaxpr.in_avals[len(params) :]]
    outputs = interpreter.evaluate(jaxpr, *params, *inputs)
    flows = [output for output in outputs if isinstance(output, Flow)]
    if not flows:
        raise ValueError("fn's output does not depend on x through any path of real numbers")
    return flows


def _input(aval: Any, interpreter: Interpreter) -> Value:
    """What an input stands for: one path to each of its entries, none to a random key."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return Free(aval.shape)
    return interpreter.source(aval.shape)


def log_paths(net: Network, masks: PyTree, counting: str = "exact") -> Array:
    """The logarithm of the number of effective paths, log R_P.

    With P the number of paths into a node, P = 1 at the input and P_j = Σ_i m_ij P_i through a
    layer of mask m; R_P sums P over the outputs. Every position of every feature map counts.
    Differentiable in the masks, which may hold any non-negative numbers.

    In the *mean field* an axis along which all counts are equal, of images, positions or tokens, is
    held as one number and stays so: where zeros (a convolution's padding, a class token that no
    path enters) or tokens of another kind beside would break that, the mean over the positions
    stands for all. Else the count is the exact one; its cost hangs on the number of weights alone.
    It can be differentiated in reverse, any number of times, but not forward (`jax.jvp`).

    Args:
      net: the traced network.
      masks: pytree parallel to the parameters, boolean or floating at the layers.
      counting: "exact" or "mean_field".

    Returns:
      float32 scalar, the natural logarithm; `-inf` if no path leads to the output.

    Raises:
      ValueError: if the masks' tree or shapes are not those of the network, or `counting` is
        unknown.

    References:
      DPaI (ICLR 2025), Section "Differentiable Calculation of the Effective Path".
    """
    check_counting(counting)
    leaves = [jnp.asarray(m, jnp.float32) for m in check_parallel(net, masks, "masks")]
    return _log_count(net, leaves, counting, shardings_of(leaves))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _log_count(net: Network, masks: list[Array], counting: str, shardings: Shardings) -> Array:
    return net.log_count(masks, counting, shardings)


def check_counting(counting: str) -> None:
    """Raises a ValueError unless this is a way of counting."""
    if counting not in COUNTINGS:
        raise ValueError(f"counting must be one of {', '.join(COUNTINGS)}, got {counting!r}")


def check_parallel(net: Network, tree: PyTree, argument: str) -> list[Any]:
    """The leaves of a tree at the layers, after checking that it fits the network.

    Raises:
      ValueError: if the tree's structure, or a leaf's shape, is not that of the parameters.
    """
    check_structure(tree, net.treedef, argument, "params")
    leaves = net.leaves(tree)
    for layer, leaf in zip(net.layers, leaves, strict=True):
        if jnp.shape(leaf) != layer.shape:
            raise ValueError(
                f"{argument} must have shape {layer.shape} at {layer.name}, got {jnp.shape(leaf)}"
            )
    return leaves
