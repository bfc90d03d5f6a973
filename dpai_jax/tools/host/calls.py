"""Which calls of a program NumPy runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from dpai_jax.tools.host.floats import as_xla, flushes
from dpai_jax.tools.host.plan import DTYPES, Plan, UnknownError
from dpai_jax.tools.signatures import of_shapes
from dpai_jax.tools.switches import are_on_default_device, switch, uncollected

PyTree = Any


class Quick(NamedTuple):
    """What does the same with NumPy's arrays as a program, and as fast as if that were compiled."""

    fn: Callable[..., Any]


# Whether NumPy may run a program, or what does the same with NumPy's arrays (see `meshes.program`).
ByNumpy = Literal["never", "exactly", "vouched", "roughly"] | Quick | Callable[..., Any]

# What XLA takes to compile a program and, besides, each of its equations; what NumPy takes to write
# a byte; and what it takes, besides, to get a byte of new memory. The unit is what NumPy takes to
# start on an equation, some five microseconds.
_TO_COMPILE = 8192.0
_TO_COMPILE_EQUATION = 192.0
_TO_WRITE = 2.0**-15
_TO_GET = 2.0**-14

# Arrays of so many bytes get new memory each time, and smaller ones that of others. (In glibc, the
# most that `M_MMAP_THRESHOLD` comes to be.)
_ALWAYS_NEW = 2**25

# How much of what compiling takes NumPy may take before the program is compiled.
_UNTIL_COMPILED = 0.25

# A function written for NumPy takes as long as so many equations that write each of its arguments.
_EQUATIONS_OF_AN_ARRAY = 5

_COMPILED_ONLY: ContextVar[bool] = ContextVar("compiled_only", default=False)


@contextlib.contextmanager
def compiled_only() -> Iterator[None]:
    """Within the block NumPy runs no calls."""
    token = _COMPILED_ONLY.set(True)
    try:
        yield
    finally:
        _COMPILED_ONLY.reset(token)


class Calls:
    """A program's calls that NumPy runs: the first ones.

    They may take about as long as compiling would. After a quarter of that the program is compiled,
    as soon as more calls are announced. NumPy runs it until that is done; but where it rounds
    otherwise it runs no more, so that what comes out does not depend on a clock.

    Args:
      jitted: the program, by `jax.jit`.
      by_numpy: see `meshes.program`; not "never".
    """

    def __init__(self, jitted: Any, by_numpy: ByNumpy):
        self._jitted, self._by_numpy = jitted, by_numpy
        self._budgets: dict[Any, _Budget] = {}

    def expect(self, key: Hashable, args: tuple[Any, ...], calls: int) -> bool:
        """Announces calls for arguments of these shapes.

        Args:
          key: the arguments' shapes (see `shapes_of`).
          args: the arguments, or their shapes.
          calls: how many.

        Returns:
          Whether nothing is to be compiled.
        """
        budget = self._budget(key, jax.tree.leaves(args))
        if budget is None:
            return False
        budget.expected += calls
        is_frequent = budget.left < (1 - _UNTIL_COMPILED) * budget.whole
        is_over = is_frequent and self._by_numpy == "roughly"
        if is_over or budget.expected * budget.cost > budget.left:
            budget.left = 0.0  # from now on it is compiled
        return budget.left > 0 and not is_frequent

    def run(self, key: Hashable, args: tuple[Any, ...]) -> PyTree | None:
        """The program's results, or None if it is to be compiled."""
        leaves, treedef = jax.tree.flatten(args)
        budget = self._budget(key, leaves)
        if budget is None or budget.left < budget.cost:
            return None
        budget.left -= budget.cost
        budget.expected = max(budget.expected - 1, 0)
        arrays = [np.asarray(x)[()] for x in leaves]
        with as_xla():
            found = budget.run(*jax.tree.unflatten(treedef, arrays))
        given = set(map(id, arrays))
        own = jax.tree.map(lambda x: np.array(x) if id(x) in given or _is_view(x) else x, found)
        committed = (x for x in leaves if isinstance(x, jax.Array) and x.committed)
        return jax.device_put(own, next((x.device for x in committed), None))

    def _budget(self, key: Hashable, leaves: Sequence[Any]) -> _Budget | None:
        """What is left for arguments of these shapes; None if NumPy can't run them."""
        if not _can_run(leaves):
            return None
        if key not in self._budgets:
            self._budgets[key] = self._made(of_shapes(key))
        budget = self._budgets[key]
        return budget if budget.run else None

    def _made(self, shapes: tuple[Any, ...]) -> _Budget:
        if isinstance(self._by_numpy, Quick):
            return _Budget(self._by_numpy.fn, [])
        if callable(self._by_numpy):
            return _Budget(self._by_numpy, jax.tree.leaves(shapes) * _EQUATIONS_OF_AN_ARRAY)
        with uncollected():
            traced = self._jitted.trace(*shapes)
            try:
                plan = Plan(traced.jaxpr)
            except UnknownError:
                return _Budget(None, [])
        if plan.rounds and self._by_numpy == "exactly":
            return _Budget(None, [])
        treedef = jax.tree.structure(traced.out_info)

        def run(*args: Any) -> PyTree:
            return jax.tree.unflatten(treedef, plan(*jax.tree.leaves(args)))

        return _Budget(run, plan.written, jax.tree.leaves(traced.out_info))


class _Budget:
    """How long NumPy may still run a program: `left` for calls of `cost` each.

    Args:
      run: takes and returns what the program does, in NumPy's arrays; None if nothing can.
      written: the shapes that its equations write.
      returned: those of its results, as far as these are to be counted by themselves.
    """

    def __init__(
        self,
        run: Callable[..., PyTree] | None,
        written: Sequence[Any],
        returned: Sequence[Any] = (),
    ):
        self.run: Any = run
        new = [*returned, *(x for x in written if _size([x]) >= _ALWAYS_NEW)]
        self.cost = len(written) + _TO_WRITE * _size(written) + _TO_GET * _size(new)
        self.whole = self.left = _TO_COMPILE + _TO_COMPILE_EQUATION * len(written)
        self.expected = 0


def _size(arrays: Sequence[Any]) -> int:
    """How many bytes arrays take."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def _is_view(x: Any) -> bool:
    return np.ndim(x) > 0 and not x.flags.owndata


def _can_run(leaves: Sequence[Any]) -> bool:
    """Whether NumPy can run a program for these arguments: arrays on the default device, a CPU."""
    if _COMPILED_ONLY.get() or jax.default_backend() != "cpu" or not flushes():
        return False
    if switch("jax_debug_nans") or any(getattr(x, "dtype", None) not in DTYPES for x in leaves):
        return False
    return are_on_default_device(leaves)
