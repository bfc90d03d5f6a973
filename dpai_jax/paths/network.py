"""A traced network: its prunable layers, and its number of paths as a function of their masks."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dpai_jax.paths import rules  # noqa: F401  (registers the rules)
from dpai_jax.paths import values as v
from dpai_jax.paths.constants import constant
from dpai_jax.paths.counting import COUNTINGS, EXACT, REACH, Counting
from dpai_jax.paths.folding import Call, End, Slot, chain_of, flows_of
from dpai_jax.paths.interpreter import GATES, Interpreter, rules_in_force
from dpai_jax.paths.kernels import AxesOfLeaf, KernelUse
from dpai_jax.paths.repeats import Segment, segments_of
from dpai_jax.paths.rewriting import unrolled
from dpai_jax.paths.sameness import ComparableJaxpr
from dpai_jax.paths.values import Flow, Independent, Spread, Value, Weight
from dpai_jax.tools import disk
from dpai_jax.tools.jaxprs import open_jaxpr, printed
from dpai_jax.tools.powers import logarithm
from dpai_jax.tools.switches import uncollected, usual_switches
from dpai_jax.tools.trees import named_leaves, shown

PyTree = Any
AtKernel = Callable[[KernelUse], Spread]

# A network is cut into blocks if at most this part of its contractions is left without repeats.
_SHARE = 0.5


@dataclasses.dataclass(frozen=True, repr=False)
class Layer:
    """A prunable kernel, and what its axes are to the contraction that uses it.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> net = dpai.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}, jnp.ones((1, 4)))
      >>> layer = net.layers[0]
      >>> layer.name, layer.inputs, layer.outputs, layer.size
      ('w', (0,), (1,), 8)

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

    def __repr__(self) -> str:
        outputs = self.size_of(self.outputs)
        parts = [f"{self.groups * self.size_of(self.inputs)} to {outputs} features"]
        kinds = {"taps": self.size_of(self.taps), "groups": self.groups, "copies": self.copies}
        parts += [f"{number} {kind}" for kind, number in kinds.items() if number > 1]
        return f"Layer({self.name}, {self.shape}, {', '.join(parts)})"

    @property
    def size(self) -> int:
        """The number of weights, over all copies."""
        return math.prod(self.shape)

    @property
    def copies(self) -> int:
        """The number of layers stacked in this one kernel."""
        return self.size_of(self.stack)

    def size_of(self, axes: Sequence[int]) -> int:
        """The number of entries along some axes."""
        return math.prod(self.shape[i] for i in axes)

    def by_features(self, kernel: Any) -> Any:
        """A kernel, or what is parallel to it, as (copies, groups, inputs, outputs, taps)."""
        order, sizes = self._layout
        return kernel.transpose(order).reshape(sizes).swapaxes(1, 2)

    def as_kernel(self, array: Any) -> Any:
        """The inverse of `by_features`."""
        order, sizes = self._layout
        array = array.swapaxes(1, 2).reshape(sizes)
        return array.reshape([self.shape[i] for i in order]).transpose(np.argsort(order))

    @property
    def _layout(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The order of the axes, and the sizes (copies, inputs, groups, outputs, taps)."""
        # A convolution's groups split the axis of its outputs; a batched product's have their own.
        own = next((i for i in self.outputs if self.shape[i] == self.groups > 1), None)
        outputs = self.outputs
        if own is not None:
            outputs = (own, *(i for i in outputs if i != own))
        order = tuple(dict.fromkeys((*self.stack, *self.inputs, *outputs, *range(len(self.shape)))))
        others = [i for i in order if i not in (*self.stack, *self.inputs, *self.outputs)]
        n_outputs = self.size_of([i for i in outputs if i not in self.inputs])
        groups = self.groups if n_outputs % self.groups == 0 else 1
        inputs = self.size_of(self.inputs)
        return order, (self.copies, inputs, groups, n_outputs // groups, self.size_of(others))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Network:
    """A network function traced once, ready to count the paths of any masks.

    Made by `trace`. Networks compare by identity, so one can be a static argument of `jax.jit`.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> net = dpai.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}, jnp.ones((1, 4)))
      >>> net
      Network(1 layers, 8 weights, gates='balanced')

    Attributes:
      layers: the prunable layers, in the order in which an input passes them.
      gates: how a factor that is alive everywhere takes part in a product (see `trace`).
      treedef: the tree structure of the parameters, and so of masks and scores.
      programs: what was compiled or worked out for this network; it goes when the network does.
    """

    layers: tuple[Layer, ...]
    gates: str
    treedef: Any
    _shapes: tuple[tuple[int, ...], ...]
    _jaxpr: Any
    programs: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Network({len(self.layers)} layers, {self.size:,} weights, gates={self.gates!r})"

    def __deepcopy__(self, memo: Any) -> Network:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Network cannot be pickled: call dpai_jax.trace again where it is needed")

    @property
    def size(self) -> int:
        """The number of prunable weights."""
        return sum(layer.size for layer in self.layers)

    def leaves(self, tree: PyTree) -> list[Any]:
        """The leaves of a tree parallel to the parameters that belong to the layers, in order."""
        leaves = self.treedef.flatten_up_to(tree)
        return [leaves[layer.index] for layer in self.layers]

    def tree(self, leaves: Sequence[Any], other: Callable[[], Any]) -> PyTree:
        """The tree parallel to the parameters that has these leaves at the layers.

        Args:
          leaves: one for each layer.
          other: makes the leaf for everything that is not prunable.

        Returns:
          The tree.
        """
        by_index = {layer.index: x for layer, x in zip(self.layers, leaves, strict=True)}
        indices = range(self.treedef.num_leaves)
        return self.treedef.unflatten([by_index[i] if i in by_index else other() for i in indices])

    def ravel(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
        """All layers' entries in one row; those of each copy of a layer are together."""
        pairs = zip(self.layers, leaves, strict=True)
        return np.concatenate([x.transpose(_copies_first(layer)).ravel() for layer, x in pairs])

    def unravel(self, row: Any) -> list[Any]:
        """The layers' arrays from a row of all entries (see `ravel`), NumPy's or JAX's."""
        ends = itertools.accumulate(layer.size for layer in self.layers)
        arrays = []
        for layer, end in zip(self.layers, ends, strict=True):
            order = _copies_first(layer)
            array = row[end - layer.size : end].reshape([layer.shape[i] for i in order])
            arrays.append(array.transpose(np.argsort(order)))
        return arrays

    def log_count(
        self,
        masks: Sequence[Array],
        counting: Counting = EXACT,
        at_kernel: AtKernel = KernelUse.count,
        below: float | None = None,
        gains: Sequence[tuple[Array, ...]] = (),
        exponents: Sequence[Array] = (),
    ) -> Array:
        """The logarithm of the number of paths.

        Args:
          masks: a float32 array of each layer's shape.
          counting: how paths are counted.
          at_kernel: see `Interpreter`.
          below: what no entry of the masks exceeds, where that is known.
          gains: for each layer ones that its mask is multiplied by (see `Weight.gains`).
          exponents: for each layer the power of two that its mask is a multiple of, int32.

        Returns:
          float32 scalar.
        """
        interpreter = Interpreter(self.gates, counting, at_kernel)
        return _log_of(counting, self.evaluate(masks, interpreter, below, gains, exponents))

    def reached(self, masks: Sequence[Array], at_kernel: AtKernel = KernelUse.count) -> list[Array]:
        """Which weights a path passes, or would pass if they were kept.

        Args:
          masks: a float32 array of zeros and ones of each layer's shape.
          at_kernel: see `Interpreter`.

        Returns:
          For each layer a boolean array of its shape.
        """

        def count(masks: Sequence[Array]) -> Array:
            return _sum_of(REACH, self.evaluate(masks, Interpreter("jacobian", REACH, at_kernel)))

        return [g > 0.5 for g in jax.grad(count)(list(masks))]

    def evaluate(
        self,
        masks: Sequence[Array],
        interpreter: Interpreter,
        below: float | None = None,
        gains: Sequence[tuple[Array, ...]] = (),
        exponents: Sequence[Array] = (),
    ) -> list[Flow]:
        """The flows at the network's outputs (see `log_count`)."""
        params = self._params(masks, below, gains, exponents)
        return _evaluate(self._jaxpr, self._segments, params, interpreter)

    def chain(self, counting: Counting, below: float | None = None) -> list[Call]:
        """`log_count` as a chain of stages, or for `REACH` that of which `reached` is the gradient.

        Args:
          counting: how paths are counted.
          below: what no entry of the masks exceeds, where that is known.

        Returns:
          The calls of the stages, whose first slots are the masks. Nothing if the network is one
          segment, as too little of it repeats.
        """
        if len(self._segments) == 1:
            return []
        end, gates = (_sum_of, "jacobian") if counting is REACH else (_log_of, self.gates)
        key = end, counting, below
        if key not in self.programs:
            masks = [Slot(i, x.shape, np.dtype(np.float32)) for i, x in enumerate(self.layers)]
            params = self._params(masks, below)
            title = f"{type(counting).__name__} {below}"
            self.programs[key] = _chain(
                self._jaxpr, self._segments, params, gates, counting, end, title
            )
        calls: list[Call] = self.programs[key]
        return calls

    @property
    def fingerprint(self) -> tuple[Any, ...] | None:
        """What only networks that are alike have, and are counted alike (see `disk`)."""
        # Ways of counting can be added at any time.
        countings = tuple((name, type(counting)) for name, counting in COUNTINGS.items())
        return None if self._digest is None else (self._digest, countings)

    @functools.cached_property
    def _digest(self) -> str | None:
        program, own = printed(self._jaxpr), (self.layers, self._shapes, self.treedef, self.gates)
        return None if program is None else disk.fingerprint(program, own, rules_in_force())

    @functools.cached_property
    def _segments(self) -> list[Segment]:
        """The program, in blocks if they repeat enough."""
        return _segments_of(self._jaxpr, len(self._shapes))

    def _params(
        self,
        masks: Sequence[Any],
        below: float | None,
        gains: Sequence[tuple[Array, ...]] = (),
        exponents: Sequence[Array] = (),
    ) -> list[Value]:
        params: list[Value] = [Independent(shape) for shape in self._shapes]
        for i, (layer, mask) in enumerate(zip(self.layers, masks, strict=True)):
            params[layer.index] = dataclasses.replace(
                _weight(layer.index, mask, below),
                gains=gains[i] if gains else (),
                exponent=exponents[i] if exponents else None,
            )
        return params

    def unrolled(self) -> Network:
        """The network with its scans written out: each copy of a layer is a use of its own."""
        return dataclasses.replace(self, _jaxpr=unrolled(self._jaxpr), programs={})


def _copies_first(layer: Layer) -> tuple[int, ...]:
    return (*layer.stack, *(i for i in range(len(layer.shape)) if i not in layer.stack))


@usual_switches()
@uncollected()
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
        pytree of arrays; paths are counted to all of them. Define it once: a function that was
        among the last eight traced, with arguments of the same shapes, is not traced again, and
        nothing is compiled again for it.
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
    check_functions(fn, prunable)
    if gates not in GATES:
        raise ValueError(f"gates must be one of {', '.join(GATES)}, got {shown(gates)}")
    for argument, tree in (("params", params), ("x", x)):
        check_arrays(argument, tree)
    leaves, treedef = jax.tree.flatten(jax.tree.map(_abstract, (params, x)))
    arguments = (rules_in_force(), fn, tuple(leaves), treedef, prunable, gates)
    try:
        hash(arguments)
    except TypeError:
        return _trace(*arguments)
    return _trace_once(*arguments)


def _trace(
    rules_now: Any,
    fn: Callable[[PyTree, PyTree], PyTree],
    arguments: tuple[jax.ShapeDtypeStruct, ...],
    arguments_treedef: Any,
    prunable: Callable[[str, Any], bool] | None,
    gates: str,
) -> Network:
    params, x = arguments_treedef.unflatten(arguments)
    named, treedef = named_leaves(params)
    try:
        jaxpr = jax.make_jaxpr(fn)(params, x)
    except Exception as error:
        inputs = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(x))
        error.add_note(f"(raised by fn(params, x) itself, called with x of {inputs})")
        raise
    names = tuple(name for name, _ in named)
    shapes = tuple(leaf.shape for _, leaf in named)
    kernels = tuple(
        _is_kernel(leaf) and (prunable is None or bool(prunable(name, leaf)))
        for name, leaf in named
    )
    program = ComparableJaxpr(jaxpr)
    return _network(rules_now, program, names, shapes, kernels, prunable is None, treedef, gates)


@functools.lru_cache(maxsize=8)
def _network(
    _rules: Any,
    program: ComparableJaxpr,
    names: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    kernels: tuple[bool, ...],
    all_prunable: bool,
    treedef: Any,
    gates: str,
) -> Network:
    """The network of a jaxpr; the same for the same program."""
    jaxpr = program.jaxpr
    uses = _uses(jaxpr, kernels, shapes, gates)
    if not uses:
        raise ValueError(
            "params has no prunable leaf: no floating leaf of two or more dimensions"
            + ("" if all_prunable else " that prunable accepts")
            + " is the weight of a contraction with a value that depends on x"
        )
    layers = tuple(_layer(use, names[use.leaf], shapes[use.leaf]) for use in uses)
    return Network(layers, gates, treedef, shapes, jaxpr)


# Programs belong to a network; so pruning a function again, at another sparsity or with another
# key, compiles nothing, nor does another function of the same program. Few networks are kept, as
# each holds all that was compiled for it.
_trace_once = functools.lru_cache(maxsize=8)(_trace)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    dtype = getattr(leaf, "dtype", None)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf) if dtype is None else dtype)


def check_functions(fn: Any, prunable: Any) -> None:
    """Checks a network function, and one that chooses layers."""
    modules = {c.__module__.partition(".")[0] + "." + c.__name__ for c in type(fn).__mro__}
    if "flax.Module" in modules:
        linen = hasattr(fn, "apply")
        hint = "pass its .apply" if linen else "call fn, params = dpai_jax.from_nnx(module)"
        name = type(fn).__name__
        raise TypeError(f"fn must be a function fn(params, x), got a Flax module {name}: {hint}")
    wanted = (("fn", fn, "params, x"), ("prunable", prunable, "name, leaf"))
    for name, value, arguments in wanted:
        if name == "prunable" and value is None:
            continue
        if not callable(value):
            raise TypeError(f"{name} must be a function {name}({arguments}), got {shown(value)}")
        try:
            inspect.signature(value).bind(None, None)
        except ValueError:  # a function of which no signature is known
            pass
        except TypeError as error:
            raise TypeError(f"{name} must be a function {name}({arguments}): {error}") from None


def check_arrays(argument: str, tree: PyTree) -> None:
    """Checks that all leaves of an argument are arrays."""
    for name, leaf in named_leaves(tree)[0]:
        is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        if not is_array and not isinstance(leaf, bool | int | float | complex):
            where = f"but its leaf {name} is" if name else "got"
            raise TypeError(f"{argument} must be a pytree of arrays, {where} {shown(leaf)}")


def _is_kernel(leaf: jax.ShapeDtypeStruct) -> bool:
    return len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _uses(
    jaxpr: Any, kernels: Sequence[bool], shapes: tuple[tuple[int, ...], ...], gates: str
) -> list[AxesOfLeaf]:
    """The first use of each kernel, in the order of evaluation."""
    float32 = np.dtype(np.float32)
    params = [
        _weight(i, Slot(i, shape, float32)) if is_kernel else Independent(shape)
        for i, (shape, is_kernel) in enumerate(zip(shapes, kernels, strict=True))
    ]
    first: dict[int, AxesOfLeaf] = {}
    segments = _segments_of(jaxpr, len(params))
    for call in _chain(jaxpr, segments, params, gates, EXACT, _sum_of):
        for use in call.uses:
            first.setdefault(use.leaf, use)
    return list(first.values())


def _chain(
    jaxpr: Any,
    segments: Sequence[Segment],
    params: Sequence[Value],
    gates: str,
    counting: Counting,
    end: End,
    title: str = "",
) -> list[Call]:
    """A program's evaluation as calls of stages (see `chain_of`)."""
    variables = zip(*_arguments(jaxpr, params), strict=True)
    sources = _sources(jaxpr, len(params))[1]
    return chain_of(segments, variables, sources, gates, counting, end, len(params), title)


def _segments_of(jaxpr: Any, n_params: int) -> list[Segment]:
    """A program cut into blocks, if they repeat enough."""
    return segments_of(jaxpr, len(jaxpr.in_avals) - n_params, _SHARE)


def _weight(index: int, mask: Any, below: float | None = None) -> Weight:
    return Weight(mask, ((index, tuple(frozenset({i}) for i in range(len(mask.shape)))),), below)


def _layer(use: AxesOfLeaf, name: str, shape: tuple[int, ...]) -> Layer:
    named = {*use.inputs, *use.outputs, *use.taps}
    stack = tuple(i for i, size in enumerate(shape) if i not in named and size > 1)
    return Layer(name, use.leaf, shape, use.inputs, use.outputs, use.taps, stack, use.groups)


def _evaluate(
    jaxpr: Any, segments: Sequence[Segment], params: Sequence[Value], interpreter: Interpreter
) -> list[Flow]:
    """The flows at a network's outputs; those between its segments are settled."""
    environment = dict(zip(*_arguments(jaxpr, params), strict=True))
    variables, avals = _sources(jaxpr, len(params))
    environment.update(zip(variables, map(interpreter.input, avals), strict=True))
    for segment in segments[:-1]:
        results = interpreter.evaluate(segment, *(environment[x] for x in segment.invars))
        environment.update(zip(segment.outvars, map(interpreter.settled, results), strict=True))
    last = segments[-1]
    return flows_of(interpreter.evaluate(last, *(environment[x] for x in last.invars)))


def _arguments(jaxpr: Any, params: Sequence[Value]) -> tuple[list[Any], list[Value]]:
    """A program's constants and parameters: variables, and what they stand for."""
    opened, consts = open_jaxpr(jaxpr)
    variables = [*opened.constvars, *opened.invars[: len(params)]]
    return variables, [*map(constant, consts), *params]


def _sources(jaxpr: Any, n_params: int) -> tuple[list[Any], tuple[Any, ...]]:
    """A program's inputs besides parameters: variables, and their shapes and dtypes."""
    variables = list(open_jaxpr(jaxpr)[0].invars[n_params:])
    return variables, tuple(variable.aval for variable in variables)


def _log_of(counting: Counting, flows: list[Flow]) -> Array:
    """The logarithm of the number of paths to the outputs."""
    sums, exponent = v.align(flows)
    ends = [
        counting.sum(Spread(x, f.shape), range(len(f.shape)))
        for x, f in zip(sums, flows, strict=True)
    ]
    count = functools.reduce(jnp.add, [jnp.sum(end.array) for end in ends])
    # With no path at all the derivative is that of the count itself: it shows which weights
    # would make one.
    number = jnp.where(count > 0, count, 1.0 + (count - lax.stop_gradient(count)))
    log = logarithm(number, jnp.where(count > 0, exponent, 0))
    return jnp.where(count > 0, log, log - jnp.inf)


def _sum_of(_: Counting, flows: list[Flow]) -> Array:
    """The sum of the mantissas at the outputs."""
    return functools.reduce(jnp.add, [jnp.sum(flow.mantissa) for flow in flows])
