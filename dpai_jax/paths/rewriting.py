"""Rewrites programs: without scans, or on whole arrays instead of one device's blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn, Literal

from dpai_jax.tools.jaxprs import at_source, dtype_of, open_jaxpr, scan_arity, shape_of

# Primitives that call a jaxpr of their own, by name.
CALLS = """
    call checkpoint closed_call custom_jvp_call custom_lin custom_vjp_call eval_jaxpr jit remat2
    shard_map
    """.split()

# Replaces an equation: takes it and its operands, and returns its results.
Rewrite = Callable[[JaxprEqn, Sequence[Any]], Sequence[Any]]


def called_jaxpr(eqn: JaxprEqn) -> Any:
    """The jaxpr that one of `CALLS` applies to its operands."""
    if eqn.primitive.name == "shard_map":
        return _on_whole_arrays(eqn)
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def unrolled(jaxpr: Any) -> Any:
    """The same program with scans unrolled."""
    if not _has_scan(jaxpr):
        return jaxpr
    return jax.make_jaxpr(lambda *args: _run(jaxpr, args, {"scan": _steps}))(*jaxpr.in_avals)


def _has_scan(jaxpr: Any) -> bool:
    eqns = open_jaxpr(jaxpr)[0].eqns
    if any(eqn.primitive.name == "scan" for eqn in eqns):
        return True
    return any(_has_scan(called_jaxpr(eqn)) for eqn in eqns if eqn.primitive.name in CALLS)


def _run(jaxpr: Any, args: Sequence[Any], rewrites: Mapping[str, Rewrite]) -> list[Any]:
    """Evaluates a jaxpr with some primitives replaced, also inside calls."""
    opened, consts = open_jaxpr(jaxpr)
    values = dict(zip((*opened.constvars, *opened.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in opened.eqns:
        operands = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        with at_source(eqn):
            if name in rewrites:
                results = rewrites[name](eqn, operands)
            elif name in CALLS:
                results = _run(called_jaxpr(eqn), operands, rewrites)
            else:
                results = eqn.primitive.bind(*operands, **eqn.params)
                results = results if eqn.primitive.multiple_results else [results]
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in opened.outvars]


def _steps(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Evaluates a scan step by step."""
    n_consts, n_carry = scan_arity(eqn.params)
    consts, carry = operands[:n_consts], list(operands[n_consts : n_consts + n_carry])
    xs, length = operands[n_consts + n_carry :], eqn.params["length"]
    outputs: list[list[Any]] = [[] for _ in eqn.outvars[n_carry:]]
    steps = range(length)
    for t in reversed(steps) if eqn.params["reverse"] else steps:
        results = _run(
            eqn.params["jaxpr"],
            [*consts, *carry, *(lax.index_in_dim(x, t, keepdims=False) for x in xs)],
            {"scan": _steps},
        )
        carry = results[:n_carry]
        for output, y in zip(outputs, results[n_carry:], strict=True):
            output.append(y)
    if eqn.params["reverse"]:
        outputs = [output[::-1] for output in outputs]
    return [*carry, *(jnp.stack(output) for output in outputs)]


def _on_whole_arrays(eqn: JaxprEqn) -> Any:
    """The program of a `shard_map`, rewritten to whole arrays.

    Each axis of the mesh becomes an axis of the arrays. `jax.vmap` maps the program of one device
    over it, which turns collectives into sums and rearrangements.
    """
    params = eqn.params
    sizes = {name: params["mesh"].shape[name] for name in params["mesh"].axis_names}
    axes = [name for name in sizes if name in params["newly_manual_axes"]]
    split_at = [_names(spec) for spec in params["in_specs"]]
    joined_at = [_names(spec) for spec in params["out_specs"]]

    def program(*args: Array) -> list[Array]:
        def of_a_device(*blocks: Array) -> list[Array]:
            return _run(params["jaxpr"], blocks, _OF_A_DEVICE)

        mapped = of_a_device
        for name in reversed(axes):
            # A block's axes over devices come first, in the order of the mesh.
            in_axes = tuple(0 if any(name in at for at in places) else None for places in split_at)
            mapped = jax.vmap(mapped, in_axes, axis_name=name, axis_size=sizes[name])
        blocks = mapped(*(_split(x, at, axes, sizes) for x, at in zip(args, split_at, strict=True)))
        return [_join(x, at, axes, sizes) for x, at in zip(blocks, joined_at, strict=True)]

    avals = [jax.ShapeDtypeStruct(shape_of(var), dtype_of(var)) for var in eqn.invars]
    return jax.make_jaxpr(program)(*avals)


Places = tuple[tuple[str, ...], ...]


def _names(spec: Any) -> Places:
    """The mesh axes that each axis of an array is split over."""
    return tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in spec
    )


def _split(x: Array, places: Places, axes: Sequence[str], sizes: Mapping[str, int]) -> Array:
    """Splits an array into the blocks of all devices; each mesh axis used adds an axis."""
    shape: list[int] = []
    at: dict[str, int] = {}
    for axis, size in enumerate(x.shape):
        for name in places[axis] if axis < len(places) else ():
            at[name] = len(shape)
            shape.append(sizes[name])
            size //= sizes[name]
        shape.append(size)
    first = [at[name] for name in axes if name in at]
    others = [i for i in range(len(shape)) if i not in first]
    return x.reshape(shape).transpose(*first, *others)


def _join(x: Array, places: Places, axes: Sequence[str], sizes: Mapping[str, int]) -> Array:
    """The inverse of `_split`; where all devices hold the same block, the first is taken."""
    named = [name for names in places for name in names]
    for i, name in reversed(list(enumerate(axes))):
        if name not in named:
            x = lax.index_in_dim(x, 0, i, keepdims=False)
    kept = [name for name in axes if name in named]
    order: list[int] = []
    shape: list[int] = []
    for axis, size in enumerate(x.shape[len(kept) :]):
        names = places[axis] if axis < len(places) else ()
        order += [*(kept.index(name) for name in names), len(kept) + axis]
        shape.append(functools.reduce(lambda n, name: n * sizes[name], names, size))
    return x.transpose(order).reshape(shape)


def _all_gather(eqn: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    params = eqn.params
    names, axis, tiled = params["axis_name"], params["all_gather_dimension"], params["tiled"]
    return [_gathered(x, names, axis, tiled) for x in operands]


def _gathered(x: Array, names: Any, axis: int, tiled: bool) -> Array:
    """`lax.all_gather` over one mesh axis after another, as `jax.vmap` needs it."""
    *others, last = (names,) if isinstance(names, str) else names
    x = lax.all_gather(x, last, axis=axis, tiled=tiled)
    for name in reversed(others):
        x = lax.all_gather(x, name, axis=axis, tiled=tiled)
        if not tiled:
            x = lax.collapse(x, axis, axis + 2)
    return x


def _all_to_all(eqn: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """`lax.all_to_all`: each device gathers everything and takes its own block."""
    params = eqn.params
    names, split, concat = (params[name] for name in ("axis_name", "split_axis", "concat_axis"))
    results = []
    for x in operands:
        devices = lax.psum(1, names)
        size = x.shape[split] // devices
        held = _gathered(x, names, 0, tiled=False)
        own = lax.axis_index(names) * size
        blocks = lax.dynamic_slice_in_dim(held, own, size, split + 1)
        if params["tiled"]:
            joined = jnp.moveaxis(blocks, 0, concat)
            results.append(lax.collapse(joined, concat, concat + 2))
        else:
            results.append(jnp.moveaxis(jnp.squeeze(blocks, split + 1), 0, concat))
    return results


def _scan(eqn: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """A scan whose body is rewritten, too."""
    n_consts, n_carry = scan_arity(eqn.params)
    consts, start = operands[:n_consts], list(operands[n_consts : n_consts + n_carry])

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = _run(eqn.params["jaxpr"], [*consts, *carry, *xs], _OF_A_DEVICE)
        return results[:n_carry], results[n_carry:]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, start, list(operands[n_consts + n_carry :]), **options)
    return [*carry, *ys]


# In JAX 0.10 to 0.12 `jax.vmap` supports neither types that vary over a mesh nor a tiled
# `all_to_all`, and `all_gather` only over one mesh axis.
_OF_A_DEVICE: Mapping[str, Rewrite] = {
    "pvary": lambda _, operands: operands,
    "psum_invariant": lambda eqn, operands: [lax.psum(x, eqn.params["axes"]) for x in operands],
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
    "all_to_all": _all_to_all,
    "scan": _scan,
}
