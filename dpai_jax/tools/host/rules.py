"""What JAX's primitives are in NumPy, bit by bit, but for the order of sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

from dpai_jax.tools.host.plan import (
    CALLS,
    RULES,
    Avals,
    Params,
    Plan,
    Rule,
    Run,
    UnknownError,
    Value,
    noted,
    rule,
)
from dpai_jax.tools.jaxprs import open_jaxpr, scan_arity

_LEAST, _MOST = -(2**31), 2**31 - 1


def _always(run: Run) -> Rule:
    return lambda _ins, _outs, _params: run


_UFUNCS: dict[str, np.ufunc] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "floor": np.floor,
    "sqrt": np.sqrt,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
RULES.update({name: _always(ufunc) for name, ufunc in _UFUNCS.items()})


# Elementwise functions.


def _division(of_floats: np.ufunc, of_integers: np.ufunc) -> Rule:
    def make(ins: Avals, _outs: Avals, _params: Params) -> Run:
        if ins[0].dtype == np.int32:
            raise UnknownError("division of signed integers")
        return of_floats if ins[0].dtype == np.float32 else of_integers

    return make


RULES["div"] = _division(np.divide, np.floor_divide)
RULES["rem"] = _division(np.fmod, np.remainder)


def _shift(ufunc: np.ufunc, dtype: Any) -> Rule:
    def run(x: Value, by: Value) -> Value:
        by = by.view(np.uint32)
        found = ufunc(x.view(dtype), np.minimum(by, 31).astype(dtype)).view(x.dtype)
        # Of more than all bits nothing is left but the sign.
        return found if dtype == np.int32 else _chosen(by > 31, x.dtype.type(0), found)

    return _always(run)


RULES["shift_left"] = _shift(np.left_shift, np.uint32)
RULES["shift_right_logical"] = _shift(np.right_shift, np.uint32)
RULES["shift_right_arithmetic"] = _shift(np.right_shift, np.int32)


@rule("sign")
def _sign(ins: Avals, _outs: Avals, _params: Params) -> Run:
    if ins[0].dtype != np.float32:
        return np.sign
    return _sign_of


def _sign_of(x: Value) -> Value:
    is_zero = x.view(np.int32) == _LEAST
    # −0. is its own sign; to NumPy it is 0.
    return _chosen(is_zero, x, np.sign(x)) if np.any(is_zero) else np.sign(x)


@rule("clamp")
def _clamp(_ins: Avals, _outs: Avals, _params: Params) -> Run:
    return lambda low, x, high: np.minimum(np.maximum(x, low), high)


@rule("select_n")
def _select_n(ins: Avals, _outs: Avals, _params: Params) -> Run:
    if ins[0].dtype != bool:
        raise UnknownError("a choice by integers")
    return lambda which, no, yes: _chosen(which, yes, no)


def _chosen(which: Value, yes: Value, no: Value) -> Value:
    if which.ndim == 0:
        return yes if which else no
    if which.size < _MANY or yes.dtype == bool:
        return np.where(which, yes, no)
    # By bits, several times as fast as a choice entry by entry.
    chosen = which.view(np.int8).astype(np.int32)
    np.negative(chosen, out=chosen)
    chosen &= yes.view(np.int32) ^ no.view(np.int32)
    chosen ^= no.view(np.int32)
    return chosen.view(yes.dtype)


# From so many entries on their number counts, not that of calls.
_MANY = 1024


@rule("convert_element_type")
def _convert(ins: Avals, outs: Avals, _params: Params) -> Run:
    old, new = ins[0].dtype, outs[0].dtype
    if new.kind == "b":
        return lambda x: x != 0
    if old == np.float32 and new == np.int32:
        return _to_int
    if old == np.float32 and new == np.uint32:
        return lambda x: _within(x, 0, 2**32 - 1).astype(new)
    return lambda x: x.astype(new)


def _to_int(x: Value) -> Value:
    found = x.astype(np.int32)
    # Out of range the processor returns the least integer.
    return found if np.all(found != _LEAST) else _within(x, _LEAST, _MOST).astype(np.int32)


def _within(x: Value, low: int, high: int) -> Value:
    """Clipped to what an integer holds; zero where it is not a number."""
    return np.clip(np.nan_to_num(x.astype(np.float64), posinf=high, neginf=low), low, high)


@rule("bitcast_convert_type")
def _bitcast(_ins: Avals, outs: Avals, _params: Params) -> Run:
    new = outs[0].dtype
    return lambda x: x.view(new)


# Shapes and places.


@rule("broadcast_in_dim")
def _broadcast(ins: Avals, outs: Avals, params: Params) -> Run:
    shape, axes = outs[0].shape, params["broadcast_dimensions"]
    own = [1] * len(shape)
    for axis, size in zip(axes, ins[0].shape, strict=True):
        own[axis] = size
    return lambda x: np.broadcast_to(np.reshape(x, own), shape)


@rule("squeeze", "expand_dims")
def _squeeze(_ins: Avals, outs: Avals, _params: Params) -> Run:
    shape = outs[0].shape
    return lambda x: np.reshape(x, shape)[()]


@rule("reshape")
def _reshape(_ins: Avals, outs: Avals, params: Params) -> Run:
    shape, order = outs[0].shape, params["dimensions"]
    return lambda x: np.reshape(x if order is None else np.transpose(x, order), shape)[()]


@rule("transpose")
def _transpose(_ins: Avals, _outs: Avals, params: Params) -> Run:
    order = params["permutation"]
    return lambda x: np.transpose(x, order)


@rule("rev")
def _rev(_ins: Avals, _outs: Avals, params: Params) -> Run:
    axes = params["dimensions"]
    return lambda x: np.flip(x, axes)


@rule("slice")
def _slice(_ins: Avals, _outs: Avals, params: Params) -> Run:
    strides = params["strides"] or itertools.repeat(1)
    parts = tuple(map(slice, params["start_indices"], params["limit_indices"], strides))
    return lambda x: x[parts]


@rule("pad")
def _pad(ins: Avals, _outs: Avals, params: Params) -> Run:
    config = params["padding_config"]
    if any(low < 0 or high < 0 for low, high, _ in config):
        raise UnknownError("negative padding")
    return padded(ins[0].shape, config)


def padded(sizes: Sequence[int], config: Sequence[tuple[int, int, int]]) -> Run:
    """`lax.pad` of arrays of these sizes: they lie in larger ones, padded or cut at the ends.

    Args:
      sizes: of the arrays.
      config: how many entries are before, behind and between; cut off where negative.

    Returns:
      A function of an array and of what it is padded with.
    """
    shape, own, into = [], [], []
    for n, (low, high, between) in zip(sizes, config, strict=True):
        step = between + 1
        size = low + max((n - 1) * step + 1, 0) + high
        first = max(-(low // step), 0)
        end = max(min((size - 1 - low) // step + 1, n), first)
        start = low + first * step
        own.append(slice(first, end))
        into.append(slice(start, start + (end - first) * step, step))
        shape.append(size)

    def run(x: Value, value: Value) -> Value:
        whole = np.full(shape, value, x.dtype)
        whole[tuple(into)] = x[tuple(own)]
        return whole

    return run


@rule("concatenate")
def _concatenate(_ins: Avals, _outs: Avals, params: Params) -> Run:
    axis = params["dimension"]
    return lambda *xs: np.concatenate(xs, axis)


@rule("stack")
def _stack(_ins: Avals, _outs: Avals, params: Params) -> Run:
    axis = params["axis"]
    return lambda *xs: np.stack(xs, axis)


@rule("split")
def _split(_ins: Avals, _outs: Avals, params: Params) -> Run:
    ends, axis = np.cumsum(params["sizes"])[:-1], params["axis"]
    return lambda x: np.split(x, ends, axis)


@rule("dynamic_slice")
def _dynamic_slice(ins: Avals, _outs: Avals, params: Params) -> Run:
    part = _part(ins[0].shape, params["slice_sizes"])
    return lambda x, *starts: x[part(starts)]


@rule("dynamic_update_slice")
def _dynamic_update_slice(ins: Avals, _outs: Avals, _params: Params) -> Run:
    part = _part(ins[0].shape, ins[1].shape)

    def run(x: Value, update: Value, *starts: Value) -> Value:
        found = np.array(x)
        found[part(starts)] = update
        return found

    return run


def _part(
    shape: Sequence[int], sizes: Sequence[int]
) -> Callable[[Sequence[Value]], tuple[slice, ...]]:
    """From where a part of an array starts, moved so that it lies inside, to where it lies."""

    def part(starts: Sequence[Value]) -> tuple[slice, ...]:
        each = zip(starts, shape, sizes, strict=True)
        places = [(min(max(int(i), 0), whole - n), n) for i, whole, n in each]
        return tuple(slice(i, i + n) for i, n in places)

    return part


@rule("iota")
def _iota(_ins: Avals, outs: Avals, params: Params) -> Run:
    shape, axis = outs[0].shape, params["dimension"]
    along = [n if i == axis else 1 for i, n in enumerate(shape)]
    row = np.arange(shape[axis]).astype(outs[0].dtype)
    whole = np.broadcast_to(row.reshape(along), shape)
    return lambda: whole


@rule("gather")
def _gather(ins: Avals, outs: Avals, params: Params) -> Run:
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if numbers.operand_batching_dims or params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        raise UnknownError("a gather with batches, or that fills")
    shape, rank = ins[0].shape, len(outs[0].shape)
    kept = [axis for axis in range(len(shape)) if axis not in numbers.collapsed_slice_dims]
    windows = dict(zip(kept, numbers.offset_dims, strict=True))

    def places(axis: int, starts: Value) -> Value:
        """Where along an axis of the operand each entry of the result is read."""
        found = np.zeros((1,) * rank, np.int64)
        if axis in numbers.start_index_map:
            first = starts[..., numbers.start_index_map.index(axis)].astype(np.int64)
            first = np.clip(first, 0, shape[axis] - sizes[axis])
            found = np.expand_dims(first, numbers.offset_dims)
        if axis in windows:
            along = [sizes[axis] if i == windows[axis] else 1 for i in range(rank)]
            found = found + np.arange(sizes[axis]).reshape(along)
        return found

    def run(x: Value, starts: Value) -> Value:
        own = tuple(places(axis, starts) for axis in range(len(shape)))
        return np.broadcast_to(x[own], outs[0].shape)

    return run


# Reductions.

_REDUCERS: dict[str, np.ufunc] = {
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "or": np.bitwise_or,
    "and": np.bitwise_and,
}

# What changes no maximum or minimum of floats.
_NEUTRAL: dict[np.ufunc, float] = {np.maximum: -np.inf, np.minimum: np.inf}


def _reduction(ufunc: np.ufunc) -> Rule:
    def make(ins: Avals, outs: Avals, params: Params) -> Run:
        axes, dtype = tuple(params["axes"]), ins[0].dtype
        if ufunc is np.add:
            return noted(lambda x: _added(x, axes, dtype), rounds=_can_round(ins[0], outs[0]))
        if 0 in ins[0].shape:
            raise UnknownError("the largest of no entries")
        return lambda x: ufunc.reduce(x, axes, dtype)

    return make


for _kind, _name in (("sum", "add"), ("max", "max"), ("min", "min"), ("or", "or"), ("and", "and")):
    RULES[f"reduce_{_kind}"] = _reduction(_REDUCERS[_name])


@rule("reduce")
def _reduce(ins: Avals, outs: Avals, params: Params) -> Run:
    axes, n = tuple(params["dimensions"]), len(outs)
    ufuncs = _reducers(params["jaxpr"], n)

    def reduced(ufunc: np.ufunc, x: Value, start: Value) -> Value:
        if ufunc is np.add and start == 0:
            return _added(x, axes, start.dtype)
        if ufunc is not np.add and all(x.strides[i] == 0 for i in axes):
            # The entries are one that is repeated, as `sums.written_together` has them.
            x = x[tuple(0 if i in axes else slice(None) for i in range(x.ndim))]
            return x if start == _NEUTRAL.get(ufunc) else ufunc(x, start)
        return ufunc.reduce(x, axes, x.dtype, initial=start)

    return noted(
        lambda *operands: list(map(reduced, ufuncs, operands[:n], operands[n:])),
        rounds=any(
            ufunc is np.add and _can_round(*avals)
            for ufunc, *avals in zip(ufuncs, ins[:n], outs, strict=True)
        ),
    )


def _can_round(terms: Any, sums: Any) -> bool:
    """Whether sums are of several floats."""
    return bool(terms.dtype == np.float32 and math.prod(terms.shape) > math.prod(sums.shape))


def _reducers(closed: Any, n: int) -> list[np.ufunc]:
    """What the body of a reduction does to each of its `n` operands."""

    def found(jaxpr: Any, var: Any) -> tuple[str, list[Any]]:
        """The name of what makes a variable, and of what it makes it."""
        eqn = next((e for e in jaxpr.eqns if var in e.outvars), None)
        if eqn is None:
            raise UnknownError("a reduction that chooses")
        name, atoms = eqn.primitive.name, list(eqn.invars)
        if name in CALLS:
            inner, _ = open_jaxpr(eqn.params[CALLS[name]])
            name, own = found(inner, inner.outvars[eqn.outvars.index(var)])
            atoms = [atoms[inner.invars.index(atom)] for atom in own]
        return name, atoms

    body, _ = open_jaxpr(closed)
    ufuncs = []
    for i, var in enumerate(body.outvars):
        name, atoms = found(body, var)
        if name not in _REDUCERS or atoms != [body.invars[i], body.invars[n + i]]:
            raise UnknownError(f"a reduction by {name}")
        ufuncs.append(_REDUCERS[name])
    return ufuncs


def _added(x: Value, axes: tuple[int, ...], dtype: Any) -> Value:
    """The sums of numbers, or the numbers of flags, in a type that holds them."""
    if x.dtype != bool:
        return np.add.reduce(x, axes, dtype)
    if x.ndim - 1 in axes:  # eight flags at a time
        return np.add.reduce(np.bitwise_count(np.packbits(x, -1)), axes, dtype)
    few = math.prod(x.shape[i] for i in axes) < 256
    return np.add.reduce(x.view(np.uint8), axes, np.uint8 if few else dtype).astype(dtype)


@rule("reduce_window_sum")
def _window_sum(ins: Avals, _outs: Avals, params: Params) -> Run:
    window, padding = params["window_dimensions"], params["padding"]
    if any(n != 1 for n in (*params["base_dilation"], *params["window_dilation"])):
        raise UnknownError("windows with holes")
    steps = tuple(slice(None, None, n) for n in params["window_strides"])
    axes = tuple(range(len(window), 2 * len(window)))

    def run(x: Value) -> Value:
        whole = np.pad(x, padding) if any(map(any, padding)) else x
        view = np.lib.stride_tricks.sliding_window_view(whole, window)[steps]
        return np.add.reduce(view, axes, x.dtype)

    return noted(run, rounds=ins[0].dtype == np.float32 and math.prod(window) > 1)


# Loops and branches.


@rule("while")
def _while(_ins: Avals, _outs: Avals, params: Params) -> Run:
    goes_on, body = Plan(params["cond_jaxpr"]), Plan(params["body_jaxpr"])
    n, m = params["cond_nconsts"], params["body_nconsts"]

    def run(*operands: Value) -> list[Value]:
        of_cond, of_body, state = operands[:n], operands[n : n + m], list(operands[n + m :])
        while goes_on(*of_cond, *state)[0]:
            state = body(*of_body, *state)
        return state

    return noted(run, (goes_on, 4), (body, 4))


@rule("cond")
def _cond(_ins: Avals, _outs: Avals, params: Params) -> Run:
    branches = [Plan(branch) for branch in params["branches"]]

    def run(index: Value, *operands: Value) -> list[Value]:
        return branches[min(max(int(index), 0), len(branches) - 1)](*operands)

    return noted(run, *((branch, 1) for branch in branches))


@rule("scan")
def _scan(_ins: Avals, outs: Avals, params: Any) -> Run:
    body, (n_consts, n_carry) = Plan(params["jaxpr"]), scan_arity(params)
    steps = range(params["length"])[:: -1 if params["reverse"] else 1]

    def run(*operands: Value) -> list[Value]:
        consts, rows = operands[:n_consts], operands[n_consts + n_carry :]
        state = list(operands[n_consts : n_consts + n_carry])
        stacked = [np.empty(aval.shape, aval.dtype) for aval in outs[n_carry:]]
        for i in steps:
            found = body(*consts, *state, *(row[i] for row in rows))
            state = found[:n_carry]
            for whole, part in zip(stacked, found[n_carry:], strict=True):
                whole[i] = part
        return [*state, *stacked]

    return noted(run, (body, params["length"]))
