"""Traced programs run by NumPy, which needs no compilation: for the first calls of small ones.

The results are those of XLA on CPUs bit by bit, where no sum of floats rounds. What NumPy would do
otherwise than XLA, or what is not known here, is refused, so that the program is compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.extend import core

from dpai_jax.tools.switches import uncollected

Value = Any  # a NumPy array or scalar
Run = Callable[..., Value]

_DTYPES = frozenset(map(np.dtype, (bool, np.int32, np.uint32, np.float32)))


# Whether NumPy may run a program (see `meshes.program`), or what runs it.
ByNumpy = Literal["never", "exactly", "roughly"] | Callable[..., Any]

# What XLA takes to compile a program and, besides, an equation; and NumPy to write a byte. The unit
# is what NumPy takes to start on an equation, some microseconds.
_TO_COMPILE = 8192.0
_TO_COMPILE_EQUATION = 256.0
_TO_WRITE = 2.0**-15

# A function written for NumPy takes as long as so many equations that write each array.
_EQUATIONS_OF_AN_ARRAY = 5


class Calls:
    """A program's calls that NumPy runs: the first ones, for as long as compiling would take.

    Which these are depends on shapes alone, not on a clock.

    Args:
      jitted: the program, by `jax.jit`.
      by_numpy: see `meshes.program`; not "never".
    """

    def __init__(self, jitted: Any, by_numpy: ByNumpy):
        self._jitted, self._by_numpy = jitted, by_numpy
        self._budgets: dict[Any, _Budget] = {}

    def expect(self, args: tuple[Any, ...], times: int) -> bool:
        """Announces calls for arguments of these shapes: whether NumPy is to run them."""
        budget = self._budget(args)
        if budget is None or budget.run is None:
            return False
        budget.expected += times
        if budget.expected * budget.cost > budget.left:
            budget.left = 0.0  # from now on it is compiled
        return budget.left > 0

    def run(self, args: tuple[Any, ...]) -> Any:
        """The program's result, or None if it is to be compiled."""
        budget = self._budget(args)
        if budget is None or budget.run is None or budget.left < budget.cost:
            return None
        budget.left -= budget.cost
        budget.expected = max(budget.expected - 1, 0)
        with as_xla():
            found = budget.run(*jax.tree.map(lambda x: np.asarray(x)[()], args))
        leaves = (x for x in jax.tree.leaves(args) if isinstance(x, jax.Array))
        device = next((x.device for x in leaves if x.committed), None)
        return jax.device_put(jax.tree.map(_own, found), device)

    def _budget(self, args: tuple[Any, ...]) -> _Budget | None:
        leaves, treedef = jax.tree.flatten(args)
        if not _can_run(leaves):
            return None
        key = (treedef, *((np.shape(x), x.dtype) for x in leaves))
        if key not in self._budgets:
            shapes = [jax.ShapeDtypeStruct(*aval) for aval in key[1:]]
            self._budgets[key] = self._made(jax.tree.unflatten(treedef, shapes))
        return self._budgets[key]

    def _made(self, shapes: tuple[Any, ...]) -> _Budget:
        leaves = jax.tree.leaves(shapes)
        if callable(self._by_numpy):
            return _Budget(self._by_numpy, leaves * _EQUATIONS_OF_AN_ARRAY)
        with uncollected():
            traced = self._jitted.trace(*shapes)
            try:
                plan = Plan(traced.jaxpr)
            except Unknown:
                return _Budget(None, [])
        if plan.rounds and self._by_numpy == "exactly":
            return _Budget(None, [])
        treedef = jax.tree.structure(traced.out_info)

        def run(*args: Any) -> Any:
            return jax.tree.unflatten(treedef, plan(*jax.tree.leaves(args)))

        return _Budget(run, plan.written)


class _Budget:
    """How long NumPy may still run a program: `left` for calls of `cost` each."""

    def __init__(self, run: Any, written: Sequence[Any]):
        self.run = run
        self.cost = sum(1 + math.prod(x.shape) * x.dtype.itemsize * _TO_WRITE for x in written)
        self.left = _TO_COMPILE + _TO_COMPILE_EQUATION * len(written)
        self.expected = 0


def _own(x: Any) -> Any:
    """An array that shares no memory."""
    return x if np.ndim(x) == 0 or x.flags.owndata else np.array(x)


def _can_run(leaves: Sequence[Any]) -> bool:
    """Whether NumPy can run a program for these arguments: arrays on the default CPU."""
    if jax.default_backend() != "cpu" or jax.config.jax_debug_nans or not flushes():
        return False
    if any(x.dtype not in _DTYPES for x in leaves):
        return False
    devices = {x.sharding for x in leaves if isinstance(x, jax.Array)}
    default = jax.config.jax_default_device or jax.local_devices()[0]
    return all(sharding.device_set == {default} for sharding in devices)


class Unknown(Exception):
    """What is traced can't be run here."""


class Plan:
    """A jaxpr as a list of NumPy's calls.

    Args:
      closed: the jaxpr and its constants.

    Raises:
      Unknown: if it contains what can't be run here.
    """

    def __init__(self, closed: core.ClosedJaxpr):
        self._slots: list[Value] = []
        self._calls: list[tuple[Run, tuple[int, ...], Any]] = []
        self._constant: set[int] = set()
        self._flags: dict[int, int] = {}  # of flags as integers, where the flags are
        self.rounds = False
        self.written: list[Any] = []
        places = [self._new() for _ in closed.jaxpr.invars]
        self.n_args = len(places)
        for var in closed.jaxpr.invars:
            _check(var.aval)
        with as_xla():
            self._outs = self._inlined(closed.jaxpr, closed.consts, places)
        self._frees = self._last_uses()

    def __call__(self, *args: Value) -> list[Value]:
        """The results; the caller has to be within `as_xla`."""
        slots = self._slots.copy()
        slots[: self.n_args] = args
        for (run, ins, out), free in zip(self._calls, self._frees, strict=True):
            found = run(*[slots[i] for i in ins])
            if type(out) is int:
                slots[out] = found
            else:
                for i, x in zip(out, found, strict=True):
                    slots[i] = x
            for i in free:
                slots[i] = None
        return [slots[i] for i in self._outs]

    def _new(self, value: Value = None) -> int:
        self._slots.append(value)
        return len(self._slots) - 1

    def _literal(self, value: Value, aval: Any) -> int:
        _check(aval)
        place = self._new(np.asarray(value, aval.dtype)[()])
        self._constant.add(place)
        return place

    def _inlined(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[int]) -> list[int]:
        """Appends a jaxpr's calls; the places of its results."""
        places: dict[Any, int] = dict(zip(jaxpr.invars, args, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            places[var] = self._literal(value, var.aval)

        def read(atom: Any) -> int:
            if isinstance(atom, core.Literal):
                return self._literal(atom.val, atom.aval)
            return places[atom]

        for eqn in jaxpr.eqns:
            ins = tuple(map(read, eqn.invars))
            name, params = eqn.primitive.name, eqn.params
            if name in _CALLS:
                inner = params[_CALLS[name]]
                outs = self._inlined(inner.jaxpr, inner.consts, ins)
            elif name in _SAME:
                outs = list(ins)
            else:
                for var in eqn.outvars:
                    _check(var.aval)
                outs = self._called(eqn, name, ins)
            places.update(zip(eqn.outvars, outs, strict=True))
        return list(map(read, jaxpr.outvars))

    def _called(self, eqn: Any, name: str, ins: tuple[int, ...]) -> list[int]:
        if name not in _RULES:
            raise Unknown(name)
        run = _RULES[name]([v.aval for v in eqn.invars], [v.aval for v in eqn.outvars], eqn.params)
        if all(i in self._constant for i in ins):
            found = run(*[self._slots[i] for i in ins])
            found = found if eqn.primitive.multiple_results else [found]
            outs = [self._new(x) for x in found]
            self._constant.update(outs)
            return outs
        if name in ("reduce", "reduce_sum"):
            ins = tuple(self._flags.get(i, i) for i in ins)
        outs = [self._new() for _ in eqn.outvars]
        if name == "convert_element_type" and eqn.invars[0].aval.dtype == bool:
            self._flags[outs[0]] = ins[0]
        self.written += [var.aval for var in eqn.outvars]
        self.rounds |= _rounds(eqn, name)
        for plan, times in getattr(run, "plans", ()):
            self.written += plan.written * times
            self.rounds |= plan.rounds
        self._calls.append((run, ins, tuple(outs) if eqn.primitive.multiple_results else outs[0]))
        return outs

    def _last_uses(self) -> list[list[int]]:
        """The places that no later call reads, for each call; drops calls that none reads."""
        read, calls, frees = {*self._outs}, [], []
        for call in reversed(self._calls):
            _, ins, out = call
            outs = (out,) if isinstance(out, int) else out
            if read.isdisjoint(outs):
                continue
            last = {*ins, *outs} - read - self._constant
            read |= last
            calls.append(call)
            frees.append(list(last))
        self._calls = calls[::-1]
        return frees[::-1]


def _check(aval: Any) -> None:
    if getattr(aval, "dtype", None) not in _DTYPES:
        raise Unknown(str(aval))


def _rounds(eqn: Any, name: str) -> bool:
    """Whether an equation sums floats, so that what it rounds depends on their order."""
    if name not in _SUMS or eqn.outvars[0].aval.dtype != np.float32:
        return False
    if name == "dot_general":
        (axes, _), _ = eqn.params["dimension_numbers"]
        return math.prod(eqn.invars[0].aval.shape[i] for i in axes) > 1
    if name == "conv_general_dilated":
        kernel, features = eqn.invars[1].aval, eqn.params["dimension_numbers"].rhs_spec[0]
        return math.prod(kernel.shape) > kernel.shape[features]
    if name == "reduce_window_sum":
        return math.prod(eqn.params["window_dimensions"]) > 1
    return math.prod(eqn.invars[0].aval.shape) > math.prod(eqn.outvars[0].aval.shape)


_SUMS = {"dot_general", "conv_general_dilated", "reduce_window_sum", "reduce_sum", "cumsum"}

# Equations that stand for those of another jaxpr, and the parameter that holds it.
_CALLS = {"jit": "jaxpr", "custom_vjp_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}

# Equations that return what they take.
_SAME = {"stop_gradient", "copy", "copy_p", "optimization_barrier"}

Avals = Sequence[Any]
Params = Mapping[str, Any]
_RULES: dict[str, Callable[[Avals, Avals, Params], Run]] = {}


def _rule(*names: str) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        for name in names:
            _RULES[name] = make
        return make

    return register


_UFUNCS: dict[str, Run] = {
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
for _name, _ufunc in _UFUNCS.items():
    _RULES[_name] = lambda _ins, _outs, _params, ufunc=_ufunc: ufunc


@_rule("sign")
def _sign(ins: Avals, _outs: Avals, _params: Params) -> Run:
    return np.sign


@_rule("log")
def _log(_ins: Avals, _outs: Avals, _params: Params) -> Run:
    return lambda x: np.log(x.astype(np.float64)).astype(np.float32)


@_rule("div", "rem")
def _div(ins: Avals, outs: Avals, params: Params) -> Run:
    raise NotImplementedError


def _division(of_floats: Run, of_integers: Run) -> Any:
    def make(ins: Avals, _outs: Avals, _params: Params) -> Run:
        if ins[0].dtype == np.float32:
            return of_floats
        if ins[0].dtype == np.uint32:
            return of_integers
        raise Unknown("division of signed integers")

    return make


_RULES["div"] = _division(np.divide, np.floor_divide)
_RULES["rem"] = _division(np.fmod, np.remainder)


def _shift(ufunc: Run, signed: bool) -> Any:
    def make(ins: Avals, _outs: Avals, _params: Params) -> Run:
        as_ints = np.int32 if signed else np.uint32

        def run(x: Value, by: Value) -> Value:
            if np.any(by.view(np.uint32) > 31):
                raise Unknown("shift")
            return ufunc(x.view(as_ints), by.view(as_ints)).view(x.dtype)

        return run

    return make


_RULES["shift_left"] = _shift(np.left_shift, False)
_RULES["shift_right_logical"] = _shift(np.right_shift, False)
_RULES["shift_right_arithmetic"] = _shift(np.right_shift, True)


@_rule("clamp")
def _clamp(_ins: Avals, _outs: Avals, _params: Params) -> Run:
    return lambda low, x, high: np.minimum(np.maximum(x, low), high)


@_rule("select_n")
def _select_n(ins: Avals, _outs: Avals, _params: Params) -> Run:
    if ins[0].dtype != bool:
        raise Unknown("select_n")
    return lambda which, no, yes: np.where(which, yes, no)[()]


@_rule("convert_element_type")
def _convert(ins: Avals, outs: Avals, _params: Params) -> Run:
    old, new = ins[0].dtype, outs[0].dtype
    if new == bool:
        return lambda x: x != 0
    if old == np.float32 and new == np.int32:
        return _to_int
    if old == np.float32 and new == np.uint32:
        return lambda x: np.nan_to_num(np.clip(x.astype(np.float64), 0, 2**32 - 1)).astype(new)
    return lambda x: x.astype(new)


def _to_int(x: Value) -> Value:
    found = x.astype(np.int32)
    # Where a float is out of range, what C does is not defined.
    if np.any(found == np.int32(-(2**31))):
        return np.nan_to_num(np.clip(x.astype(np.float64), -(2**31), 2**31 - 1)).astype(np.int32)
    return found


@_rule("bitcast_convert_type")
def _bitcast(_ins: Avals, outs: Avals, _params: Params) -> Run:
    new = outs[0].dtype
    return lambda x: x.view(new)


@_rule("broadcast_in_dim")
def _broadcast(ins: Avals, outs: Avals, params: Params) -> Run:
    shape, axes = outs[0].shape, params["broadcast_dimensions"]
    middle = tuple(
        ins[0].shape[axes.index(i)] if i in axes else 1 for i in range(len(shape))
    )
    if middle == shape:
        return lambda x: np.reshape(x, shape)
    return lambda x: np.broadcast_to(np.reshape(x, middle), shape)


@_rule("reshape", "squeeze", "expand_dims")
def _reshape(_ins: Avals, outs: Avals, _params: Params) -> Run:
    shape = outs[0].shape
    return lambda x: np.reshape(x, shape)[()]


@_rule("transpose")
def _transpose(_ins: Avals, _outs: Avals, params: Params) -> Run:
    order = params["permutation"]
    return lambda x: np.transpose(x, order)


@_rule("rev")
def _rev(_ins: Avals, _outs: Avals, params: Params) -> Run:
    axes = params["dimensions"]
    return lambda x: np.flip(x, axes)


@_rule("slice")
def _slice(_ins: Avals, _outs: Avals, params: Params) -> Run:
    strides = params["strides"] or itertools.repeat(1)
    parts = tuple(map(slice, params["start_indices"], params["limit_indices"], strides))
    return lambda x: x[parts]


@_rule("pad")
def _pad(ins: Avals, outs: Avals, params: Params) -> Run:
    shape, config = outs[0].shape, params["padding_config"]
    if any(low < 0 or high < 0 for low, high, _ in config):
        raise Unknown("negative padding")
    parts = tuple(
        slice(low, low + (n - 1) * (between + 1) + 1 if n else low, between + 1)
        for n, (low, _, between) in zip(ins[0].shape, config, strict=True)
    )

    def run(x: Value, value: Value) -> Value:
        padded = np.full(shape, value, x.dtype)
        padded[parts] = x
        return padded

    return run


@_rule("concatenate")
def _concatenate(_ins: Avals, _outs: Avals, params: Params) -> Run:
    axis = params["dimension"]
    return lambda *xs: np.concatenate(xs, axis)


@_rule("stack")
def _stack(_ins: Avals, _outs: Avals, params: Params) -> Run:
    axis = params["axis"]
    return lambda *xs: np.stack(xs, axis)


@_rule("split")
def _split(_ins: Avals, _outs: Avals, params: Params) -> Run:
    ends, axis = np.cumsum(params["sizes"])[:-1], params["axis"]
    return lambda x: np.split(x, ends, axis)


@_rule("dynamic_slice")
def _dynamic_slice(ins: Avals, _outs: Avals, params: Params) -> Run:
    sizes = params["slice_sizes"]
    most = [n - size for n, size in zip(ins[0].shape, sizes, strict=True)]

    def run(x: Value, *starts: Value) -> Value:
        places = [min(max(int(i), 0), end) for i, end in zip(starts, most, strict=True)]
        return x[tuple(slice(i, i + n) for i, n in zip(places, sizes, strict=True))]

    return run


@_rule("dynamic_update_slice")
def _dynamic_update_slice(ins: Avals, _outs: Avals, _params: Params) -> Run:
    sizes = ins[1].shape
    most = [n - size for n, size in zip(ins[0].shape, sizes, strict=True)]

    def run(x: Value, update: Value, *starts: Value) -> Value:
        places = [min(max(int(i), 0), end) for i, end in zip(starts, most, strict=True)]
        found = np.array(x)
        found[tuple(slice(i, i + n) for i, n in zip(places, sizes, strict=True))] = update
        return found

    return run


@_rule("iota")
def _iota(_ins: Avals, outs: Avals, params: Params) -> Run:
    shape, axis = outs[0].shape, params["dimension"]
    row = np.arange(shape[axis]).astype(outs[0].dtype)
    whole = np.broadcast_to(np.expand_dims(row, [i for i in range(len(shape)) if i != axis]), shape)
    return lambda: whole


_REDUCERS: dict[str, np.ufunc] = {
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "or": np.bitwise_or,
    "and": np.bitwise_and,
}


def _reduced(name: str) -> Any:
    ufunc = _REDUCERS[name]

    def make(ins: Avals, _outs: Avals, params: Params) -> Run:
        axes, dtype = tuple(params["axes"]), ins[0].dtype
        if name == "add" and dtype != np.float32:
            return lambda x: _counted(x, axes, dtype)
        if name in ("or", "and") and dtype == bool:
            fold = np.any if name == "or" else np.all
            return lambda x: fold(x, axes)
        return lambda x: ufunc.reduce(x, axes, dtype)

    return make


for _kind, _name in (("sum", "add"), ("max", "max"), ("min", "min"), ("or", "or"), ("and", "and")):
    _RULES[f"reduce_{_kind}"] = _reduced(_name)


@_rule("reduce")
def _reduce(ins: Avals, outs: Avals, params: Params) -> Run:
    axes, n = tuple(params["dimensions"]), len(outs)
    ufuncs = _reducers(params["jaxpr"], n)

    def reduced(ufunc: np.ufunc, x: Value, start: Value) -> Value:
        if ufunc is np.add and start == 0:
            return _counted(x, axes, start.dtype) if x.dtype == bool else ufunc.reduce(x, axes, x.dtype)
        if ufunc is not np.add and all(x.strides[i] == 0 for i in axes):
            only = x[tuple(0 if i in axes else slice(None) for i in range(x.ndim))]
            return only if start == _NEUTRAL.get(ufunc) else ufunc(only, start)
        return ufunc.reduce(x, axes, x.dtype, initial=start)

    def run(*operands: Value) -> list[Value]:
        return list(map(reduced, ufuncs, operands[:n], operands[n:]))

    return run


# What changes no maximum or minimum.
_NEUTRAL = {np.maximum: -np.inf, np.minimum: np.inf}


def _counted(x: Value, axes: tuple[int, ...], dtype: Any) -> Value:
    """The sums of integers, or of flags, in an integer type."""
    if x.dtype != bool:
        return np.add.reduce(x, axes, dtype)
    if x.ndim - 1 in axes:
        # Eight flags at a time.
        return np.add.reduce(np.bitwise_count(np.packbits(x, -1)), axes, dtype)
    few = math.prod(x.shape[i] for i in axes) < 256
    return np.add.reduce(x.view(np.uint8), axes, np.uint8 if few else dtype).astype(dtype)


def _reducers(closed: Any, n: int) -> list[np.ufunc]:
    """What a reduction does to each of its operands."""

    def found(jaxpr: Any, var: Any) -> tuple[str, list[Any]]:
        """The name of what makes a variable, and of what."""
        eqn = next((e for e in jaxpr.eqns if var in e.outvars), None)
        if eqn is None:
            raise Unknown("reduce")
        if eqn.primitive.name in _CALLS:
            inner = eqn.params[_CALLS[eqn.primitive.name]].jaxpr
            name, atoms = found(inner, inner.outvars[eqn.outvars.index(var)])
            return name, [eqn.invars[inner.invars.index(atom)] for atom in atoms]
        return eqn.primitive.name, list(eqn.invars)

    ufuncs = []
    for i, var in enumerate(closed.jaxpr.outvars):
        name, atoms = found(closed.jaxpr, var)
        if name not in _REDUCERS or atoms != [closed.jaxpr.invars[j] for j in (i, n + i)]:
            raise Unknown(f"reduce by {name}")
        ufuncs.append(_REDUCERS[name])
    return ufuncs


@_rule("reduce_window_sum")
def _window_sum(ins: Avals, outs: Avals, params: Params) -> Run:
    window, strides = params["window_dimensions"], params["window_strides"]
    if any(n != 1 for n in (*params["base_dilation"], *params["window_dilation"])):
        raise Unknown("dilated windows")
    padding = params["padding"]
    parts = tuple(slice(None, None, n) for n in strides)
    axes = tuple(range(len(window), 2 * len(window)))

    def run(x: Value) -> Value:
        if any(map(any, padding)):
            x = np.pad(x, padding)
        view = np.lib.stride_tricks.sliding_window_view(x, window)[parts]
        return np.add.reduce(view, axes, x.dtype)

    return run


@_rule("scan")
def _scan(_ins: Avals, outs: Avals, params: Params) -> Run:
    body, n_consts, n_carry = Plan(params["jaxpr"]), params["num_consts"], params["num_carry"]
    order = range(params["length"])[:: -1 if params["reverse"] else 1]
    shapes = [(aval.shape, aval.dtype) for aval in outs[n_carry:]]

    def run(*operands: Value) -> list[Value]:
        consts, state = operands[:n_consts], list(operands[n_consts : n_consts + n_carry])
        rows = operands[n_consts + n_carry :]
        stacked = [np.empty(*shape) for shape in shapes]
        for i in order:
            found = body(*consts, *state, *(row[i] for row in rows))
            state = found[:n_carry]
            for whole, part in zip(stacked, found[n_carry:], strict=True):
                whole[i] = part
        return [*state, *stacked]

    return _made_of(run, (body, params["length"]))


@_rule("while")
def _while(_ins: Avals, _outs: Avals, params: Params) -> Run:
    goes_on, body = Plan(params["cond_jaxpr"]), Plan(params["body_jaxpr"])
    n, m = params["cond_nconsts"], params["body_nconsts"]

    def run(*operands: Value) -> list[Value]:
        of_cond, of_body, state = operands[:n], operands[n : n + m], list(operands[n + m :])
        while goes_on(*of_cond, *state)[0]:
            state = body(*of_body, *state)
        return state

    return _made_of(run, (goes_on, 1), (body, 1))


@_rule("cond")
def _cond(_ins: Avals, _outs: Avals, params: Params) -> Run:
    branches = [Plan(branch) for branch in params["branches"]]

    def run(index: Value, *operands: Value) -> list[Value]:
        return branches[min(max(int(index), 0), len(branches) - 1)](*operands)

    return _made_of(run, *((branch, 1) for branch in branches))


def _made_of(run: Any, *plans: tuple[Plan, int]) -> Run:
    """A rule's function that runs other plans, each about so many times."""
    run.plans = plans
    return run


@_rule("gather")
def _gather(ins: Avals, outs: Avals, params: Params) -> Run:
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if params["mode"] not in (jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,):
        pass
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = [i for i in range(len(sizes)) if i not in dropped]
    shape, rank = ins[0].shape, len(outs[0].shape)
    batch = [i for i in range(rank) if i not in numbers.offset_dims]
    if numbers.operand_batching_dims or params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        raise Unknown("gather")
    most = np.asarray([n - size for n, size in zip(shape, sizes, strict=True)])

    def run(x: Value, starts: Value) -> Value:
        places = []
        for axis in range(len(shape)):
            place: Any = np.zeros((1,) * rank, np.int64)
            if axis in numbers.start_index_map:
                own = starts[..., numbers.start_index_map.index(axis)].astype(np.int64)
                own = np.clip(own, 0, most[axis])
                place = np.expand_dims(own, numbers.offset_dims)
            if axis in windows:
                at = numbers.offset_dims[windows.index(axis)]
                place = place + np.arange(sizes[axis]).reshape(
                    [-1 if i == at else 1 for i in range(rank)]
                )
            places.append(place)
        return np.broadcast_to(x[tuple(places)], outs[0].shape)

    del batch
    return run


@_rule("dot_general")
def _dot(ins: Avals, outs: Avals, params: Params) -> Run:
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    letters = iter(range(64))
    a = [next(letters) for _ in ins[0].shape]
    b = [next(letters) for _ in ins[1].shape]
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        b[j] = a[i]
    out = [a[i] for i in left_batch]
    out += [a[i] for i in range(len(a)) if i not in (*left, *left_batch)]
    out += [b[j] for j in range(len(b)) if j not in (*right, *right_batch)]
    return lambda x, y: np.einsum(x, a, y, b, out, optimize=True)


@_rule("conv_general_dilated")
def _conv(ins: Avals, outs: Avals, params: Params) -> Run:
    numbers = params["dimension_numbers"]
    groups, batches = params["feature_group_count"], params["batch_group_count"]
    if batches != 1:
        raise Unknown("convolution in groups of the batch")
    n_axes, pads = len(params["window_strides"]), params["padding"]
    strides, between = params["window_strides"], params["lhs_dilation"]
    apart = params["rhs_dilation"]
    order = np.argsort(numbers.out_spec)

    def run(x: Value, kernel: Value) -> Value:
        x = np.transpose(x, numbers.lhs_spec)  # (n, c, ...)
        kernel = np.transpose(kernel, numbers.rhs_spec)  # (out, in, ...)
        inner = [(n - 1) * d + 1 for n, d in zip(x.shape[2:], between, strict=True)]
        room = [n + low + high for n, (low, high) in zip(inner, pads, strict=True)]
        padded = np.zeros((*x.shape[:2], *room), x.dtype)
        own, into = [slice(None)] * 2, [slice(None)] * 2
        for n, d, (low, _), size in zip(x.shape[2:], between, pads, room, strict=True):
            places = low + np.arange(n) * d
            inside = np.flatnonzero((places >= 0) & (places < size))
            first, last = (inside[0], inside[-1]) if len(inside) else (0, -1)
            own.append(slice(first, last + 1))
            into.append(slice(max(low + first * d, 0), low + last * d + 1, d))
        padded[tuple(into)] = x[tuple(own)]
        spans = [(k - 1) * d + 1 for k, d in zip(kernel.shape[2:], apart, strict=True)]
        view = np.lib.stride_tricks.sliding_window_view(padded, spans, tuple(range(2, 2 + n_axes)))
        view = view[(slice(None),) * 2 + tuple(slice(None, None, s) for s in strides)
                    + tuple(slice(None, None, d) for d in apart)]
        n, c = view.shape[:2]
        places = view.shape[2 : 2 + n_axes]
        view = view.reshape(n, groups, c // groups, *view.shape[2:])
        kernel = kernel.reshape(groups, -1, *kernel.shape[1:])
        found = np.stack(
            [
                np.tensordot(
                    view[:, g], kernel[g],
                    ([1, *range(2 + n_axes, 2 + 2 * n_axes)], [1, *range(2, 2 + n_axes)]),
                )
                for g in range(groups)
            ],
            -2,
        )  # (n, ..., groups, out)
        found = found.reshape(n, *places, -1)
        found = np.moveaxis(found, -1, 1)
        return np.transpose(found, order)

    return run


@contextlib.contextmanager
def as_xla() -> Iterator[None]:
    """Within the block NumPy takes numbers below the smallest normal one as zero, as XLA does."""
    before, libm = _Environment(), _libm()
    libm.fegetenv(ctypes.byref(before))
    flushing = _Environment.from_buffer_copy(before)
    flushing.flush()
    libm.fesetenv(ctypes.byref(flushing))
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        libm.fesetenv(ctypes.byref(before))


class _Environment(ctypes.Structure):
    """The processor's control of floats, as the C library stores it."""

    _fields_ = (("words", ctypes.c_uint32 * 16),)

    def flush(self) -> None:
        self.words[7] |= 0x8040


@functools.cache
def flushes() -> bool:
    """Whether NumPy can be made to."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    tiny = np.full(64, 2.0**-126, np.float32)
    with as_xla():
        return not np.any(tiny * np.float32(0.5)) and not np.any(np.full(64, 1e-42, np.float32) > 0)


@functools.cache
def _libm() -> ctypes.CDLL:
    return ctypes.CDLL("libm.so.6")
