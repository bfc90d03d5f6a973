"""A smaller network from a masked one: what the user calls."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpai_jax import checks
from dpai_jax.compacting.analysis import Leaf, leaf_blocks
from dpai_jax.compacting.facts import Kept, flags
from dpai_jax.compacting.plan import Frozen, Plan
from dpai_jax.compacting.program import flat
from dpai_jax.masks import apply_masks
from dpai_jax.tools.switches import usual_switches
from dpai_jax.tools.trees import named_leaves

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Compact:
    """A network without its dead channels."""

    fn: Callable[[PyTree, PyTree], PyTree]
    params: PyTree
    masks: PyTree


@usual_switches()
def compact(
    fn: Callable[[PyTree, PyTree], PyTree], params: PyTree, masks: PyTree, x: PyTree
) -> Compact:
    """Cuts dead channels out of a masked network."""
    checks.parallel_masks(params, masks)
    params = apply_masks(params, masks)
    named, treedef = named_leaves(params)
    values = [np.asarray(leaf) for _, leaf in named]
    mask_leaves = [np.asarray(m) for m in treedef.flatten_up_to(masks)]
    leaves = [
        Leaf(v.shape, m if m.ndim else flags(v.shape, bool(m)), v == 0)
        for v, m in zip(values, mask_leaves, strict=True)
    ]
    cutter = _Cutter(fn, treedef, tuple(v.shape for v in values), leaves)
    kept, leaves = leaf_blocks(cutter.program(params, x)[0], leaves)
    frozen = [Frozen.of(v, k) for v, k in zip(values, kept, strict=True)]
    cutter.leaves, cutter.kept, cutter.frozen = leaves, kept, frozen
    small = [cut_leaf(leaf, k) for (_, leaf), k in zip(named, kept, strict=True)]
    small_masks = [
        np.asarray(True)
        if leaf.filled.all()
        else cut_leaf(np.broadcast_to(leaf.filled, leaf.shape), k)
        for leaf, k in zip(leaves, kept, strict=True)
    ]
    return Compact(cutter, treedef.unflatten(small), treedef.unflatten(small_masks))


def cut_leaf(leaf: Any, kept: Kept | None) -> Any:
    """The block of a leaf."""
    if kept is None:
        return leaf[(slice(0, 0),) * leaf.ndim] if leaf.ndim else leaf
    for axis, k in enumerate(kept):
        if k is not None:
            leaf = leaf.take(k, axis)
    return leaf


class _Cutter:
    """`fn(params, x)` of cut parameters, for inputs of any shape."""

    def __init__(self, fn: Any, treedef: Any, shapes: Any, leaves: Any):
        self.fn, self.treedef, self.shapes, self.leaves = fn, treedef, shapes, leaves
        self.kept: Any = None
        self.frozen: Any = None
        self.plans: dict[Any, Any] = {}

    def program(self, params: PyTree, x: PyTree) -> Any:
        leaves = self.treedef.flatten_up_to(params)
        whole = self.treedef.unflatten(
            [
                jax.ShapeDtypeStruct(shape, jnp.result_type(leaf))
                for shape, leaf in zip(self.shapes, leaves, strict=True)
            ]
        )
        jaxpr, out = jax.make_jaxpr(self.fn, return_shape=True)(whole, x)
        return flat(jaxpr), jax.tree.structure(out)

    def __call__(self, params: PyTree, x: PyTree) -> PyTree:
        leaves, inputs = self.treedef.flatten_up_to(params), jax.tree.leaves(x)
        key = tuple((jnp.shape(a), jnp.result_type(a)) for a in (*leaves, *inputs))
        key = (key, jax.tree.structure(x))
        if key not in self.plans:
            program, out = self.program(params, x)
            self.plans[key] = Plan(program, self.leaves, self.kept, self.frozen), out
        plan, out = self.plans[key]
        return out.unflatten(plan.run(leaves, inputs))
