"""A smaller network from a masked one: what the user calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpai_jax import checks
from dpai_jax.compacting.analysis import Leaf, leaf_blocks
from dpai_jax.compacting.facts import Kept, flags
from dpai_jax.compacting.plan import Frozen, Plan
from dpai_jax.compacting.program import Program, flat
from dpai_jax.compacting.sizes import Size, size_of
from dpai_jax.masks import apply_masks
from dpai_jax.paths.network import check_arrays, check_functions
from dpai_jax.tools.switches import usual_switches
from dpai_jax.tools.trees import check_structure, named_leaves

PyTree = Any
Network = Callable[[PyTree, PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class CompactLeaf:
    """What became of one leaf of the parameters.

    Attributes:
      name: its path among the parameters.
      before, after: its shape.
      kept: for each axis the indices that stay, or None where all do.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    kept: Kept


@dataclasses.dataclass(frozen=True, repr=False)
class Compact:
    """A masked network without its dead channels.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> params = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 1))}
      >>> masks = {"a": jnp.ones((4, 2), bool), "b": jnp.array([[True], [False]])}
      >>> small = dpai.compact(lambda p, x: x @ p["a"] @ p["b"], params, masks, jnp.ones((1, 4)))
      >>> small.before.weights, small.after.weights
      (10, 5)
      >>> small.expand(small.params)["a"].shape
      (4, 2)

    Attributes:
      fn: the smaller network, `fn(params, x)`, for inputs of any shape that the whole one takes.
      params: its parameters: the tree of the whole network's, with smaller leaves.
      masks: which of its weights are kept, for `apply_masks` and `keep_pruned`.
      before, after: the size of the whole network and of the smaller one.
      leaves: what became of each leaf of the parameters.
      remarks: what could not be cut, and why.
    """

    fn: Network
    params: PyTree
    masks: PyTree
    before: Size
    after: Size
    leaves: tuple[CompactLeaf, ...]
    remarks: tuple[str, ...]
    _frozen: tuple[Frozen, ...]

    def __repr__(self) -> str:
        pairs = [
            f"{getattr(self.before, name):,} -> {getattr(self.after, name):,} {what}"
            for name, what in (("weights", "weights"), ("multiply_adds", "multiply-adds"))
        ]
        remarks = f", {len(self.remarks)} remarks" if self.remarks else ""
        return f"Compact({', '.join(pairs)}{remarks})"

    def __str__(self) -> str:
        rows = [
            f"{leaf.name}: {list(leaf.before)} -> {list(leaf.after)}"
            for leaf in self.leaves
            if leaf.before != leaf.after
        ]
        return "\n".join([repr(self), *rows, *self.remarks])

    def expand(self, params: PyTree) -> PyTree:
        """Parameters of the whole network from those of the smaller one.

        What was cut out has the values that it had: zeros where it is pruned.

        Args:
          params: pytree like `self.params`, trained or not.

        Returns:
          Pytree like the parameters that `compact` was given.

        Raises:
          ValueError: if `params` has another structure, or a leaf another shape.
        """
        structure: Any = jax.tree.structure(self.params)
        check_structure(params, structure, "params", "this network")
        whole = []
        for own, frozen, array in zip(
            self.leaves, self._frozen, structure.flatten_up_to(params), strict=True
        ):
            if jnp.shape(array) != own.after:
                raise ValueError(
                    f"params must have shape {own.after} at {own.name}, got {jnp.shape(array)}"
                )
            whole.append(array if own.before == own.after else _put_back(own, frozen, array))
        return structure.unflatten(whole)


@usual_switches()
def compact(fn: Network, params: PyTree, masks: PyTree, x: PyTree) -> Compact:
    """Cuts what is dead under masks out of a network: a smaller network with the same outputs.

    The function is traced, and every value in it is followed channel by channel (index by index
    along each axis). Cut out is what never reaches the output, and what never changes: a channel
    that no path from the input reaches holds a number, such as a bias. Such numbers are computed
    now, and what follows gets them added. So residual sums, concatenations, norms, gates, grouped
    convolutions and attention heads need no rules of their own, and the outputs are those of the
    masked network up to rounding.

    *What trains.* All that is left in `params`, with the same gradients as in the masked network.
    What was cut out stays as it is now. Where it still acts, it is by a number that was computed
    from it: a bias of a dead channel that training would have moved is no longer trained. Zeros
    that act through dead channels alone, such as biases before training, are taken as pruned.
    Weights that are pruned within what is left are zeros; `masks` keeps them so under
    `keep_pruned`. Derivatives that functions define for themselves (`jax.custom_jvp`) are kept.

    *Other inputs.* For an input of another shape `fn` is traced anew, and the same cuts are made.
    What is cut depends on masks and shapes, and not on values of `x`. Call `fn` within `jax.jit`.

    *What stays.* Operations without a rule (loops, sorting along the channels, unknown primitives)
    are computed whole, from whole operands; `remarks` names them. An axis is cut where an index
    is dead for all other indices: of attention heads, those features go that are dead in each.

    Example:
      >>> import jax, jax.numpy as jnp, dpai_jax as dpai
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["out"]
      >>> params = {"hidden": jnp.ones((4, 8)), "out": jnp.ones((8, 2))}
      >>> masks = {
      ...     "hidden": jnp.ones((4, 8), bool).at[:, 3:].set(False),
      ...     "out": jnp.ones((8, 2), bool).at[0].set(False),
      ... }
      >>> small = dpai.compact(fn, params, masks, jnp.ones((1, 4)))
      >>> small
      Compact(48 -> 12 weights, 48 -> 12 multiply-adds)
      >>> small.params["hidden"].shape, small.params["out"].shape
      ((4, 2), (2, 2))
      >>> small.fn(small.params, jnp.ones((3, 4))).tolist() == [[8.0, 8.0]] * 3
      True

    Args:
      fn: the network, `fn(params, x)`, as for `trace`.
      params: pytree of arrays. Pruned weights need not be zero.
      masks: pytree of boolean masks parallel to it.
      x: an input, or `jax.ShapeDtypeStruct` of its shape.

    Returns:
      The smaller network.

    Raises:
      TypeError: if `fn` is not a function, a leaf is not an array, or a mask not boolean.
      ValueError: if the masks have another structure, or a shape that does not fit.
    """
    check_functions(fn, None)
    for argument, tree in (("params", params), ("x", x)):
        check_arrays(argument, tree)
    checks.parallel_masks(params, masks)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, masks))):
        raise TypeError("params and masks must hold values: call compact outside of jax.jit")
    params = jax.tree.map(jnp.asarray, apply_masks(params, masks))
    named, treedef = named_leaves(params)
    arrays = [leaf for _, leaf in named]
    leaves = list(map(_leaf, arrays, treedef.flatten_up_to(masks)))
    traced = _Traced(fn, treedef, tuple(leaf.shape for leaf in leaves))
    kept, leaves = leaf_blocks(traced.program(arrays, x)[0], leaves)
    frozen = tuple(map(Frozen.of, arrays, kept))
    small = treedef.unflatten(map(_block, arrays, kept))
    small_fn = _Small(traced, tuple(leaves), tuple(kept), frozen)
    rows = tuple(
        CompactLeaf(name, leaf.shape, _block(leaf, k).shape, k or _nothing(leaf.ndim))
        for (name, leaf), k in zip(named, kept, strict=True)
    )
    return Compact(
        fn=small_fn,
        params=small,
        masks=treedef.unflatten(map(_small_mask, leaves, kept)),
        before=size_of(fn, params, x),
        after=size_of(small_fn, small, x),
        leaves=rows,
        remarks=(*small_fn.plan(small, x)[0].remarks(), *_empty(rows, leaves)),
        _frozen=frozen,
    )


def _leaf(array: jax.Array, mask: Any) -> Leaf:
    mask = np.asarray(mask)
    filled = mask if mask.ndim else flags(array.shape, bool(mask))
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
        return Leaf(array.shape, filled, flags(array.shape, False))
    return Leaf(array.shape, filled, np.asarray(array) == 0)


def _nothing(rank: int) -> Kept:
    return tuple(np.zeros(0, int) for _ in range(rank))


def _block(array: Any, kept: Kept | None) -> Any:
    """The block of a leaf that stays."""
    for axis, k in enumerate(_nothing(array.ndim) if kept is None else kept):
        if k is not None:
            array = array.take(k, axis)
    return array


def _small_mask(leaf: Leaf, kept: Kept | None) -> jax.Array:
    mask = _block(np.broadcast_to(leaf.filled, leaf.shape), kept)
    is_layer = leaf.filled.size > 1 or not leaf.filled.all()
    return jnp.asarray(mask if is_layer and not mask.all() else np.ones((), bool))


def _put_back(leaf: CompactLeaf, frozen: Frozen, array: Any) -> jax.Array:
    each = [np.arange(n) if k is None else k for k, n in zip(leaf.kept, leaf.before, strict=True)]
    whole = jnp.asarray(frozen.whole(), jnp.result_type(array))
    return whole.at[np.ix_(*each)].set(array)


def _empty(rows: Sequence[CompactLeaf], leaves: Sequence[Leaf]) -> list[str]:
    """Remarks on slices without a weight that had to stay."""
    remarks = []
    for row, leaf in zip(rows, leaves, strict=True):
        mask = _block(np.broadcast_to(leaf.filled, leaf.shape), row.kept)
        for axis, size in enumerate(mask.shape if mask.ndim > 1 else ()):
            full = mask.any(tuple(i for i in range(mask.ndim) if i != axis))
            if size and not full.all():
                remarks.append(
                    f"{row.name}: {size - full.sum()} of {size} indices along axis {axis} have no "
                    "weight but stay, as another head, group or use of the same axis needs them"
                )
    return remarks


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A network function, to be traced for inputs of any shape."""

    fn: Network
    treedef: Any
    shapes: tuple[tuple[int, ...], ...]

    def program(self, leaves: Sequence[Any], x: PyTree) -> tuple[Program, Any]:
        """The program for leaves of these dtypes, and the structure of its output."""
        pairs = zip(self.shapes, leaves, strict=True)
        whole = [jax.ShapeDtypeStruct(shape, jnp.result_type(leaf)) for shape, leaf in pairs]
        jaxpr, out = jax.make_jaxpr(self.fn, return_shape=True)(self.treedef.unflatten(whole), x)
        return flat(jaxpr), jax.tree.structure(out)


@dataclasses.dataclass(frozen=True, eq=False)
class _Small:
    """The smaller network as a function, which is planned once for each shape of its input."""

    traced: _Traced
    leaves: tuple[Leaf, ...]
    kept: tuple[Kept | None, ...]
    frozen: tuple[Frozen, ...]
    plans: dict[Any, tuple[Plan, Any]] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<the smaller network of {getattr(self.traced.fn, '__name__', 'a function')}>"

    def plan(self, params: PyTree, x: PyTree) -> tuple[Plan, Any]:
        """How to compute it for such an input, and the structure of its output."""
        check_structure(params, self.traced.treedef, "params", "this network")
        leaves, inputs = self.traced.treedef.flatten_up_to(params), jax.tree.leaves(x)
        arrays = tuple((jnp.shape(a), jnp.result_type(a)) for a in (*leaves, *inputs))
        key = arrays, jax.tree.structure(x)
        if key not in self.plans:
            self._check(leaves)
            program, out = self.traced.program(leaves, x)
            while len(self.plans) >= 8:
                self.plans.pop(next(iter(self.plans)))
            plan = Plan(program, self.leaves, self.kept, self.frozen)
            plan.prepare(leaves, inputs)
            self.plans[key] = plan, out
        return self.plans[key]

    def _check(self, params: Sequence[Any]) -> None:
        for array, leaf, kept in zip(params, self.leaves, self.kept, strict=True):
            wanted = _block(np.broadcast_to(np.zeros((), bool), leaf.shape), kept).shape
            if jnp.shape(array) != wanted:
                raise ValueError(
                    f"params must have the shapes of the smaller network's, but {jnp.shape(array)} "
                    f"is where {wanted} belongs"
                )

    def __call__(self, params: PyTree, x: PyTree) -> PyTree:
        plan, out = self.plan(params, x)
        return out.unflatten(plan.run(jax.tree.leaves(params), jax.tree.leaves(x)))
