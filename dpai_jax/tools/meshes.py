"""Arrays on several devices: compiled functions that keep every array where it is.

Everything about meshes is here. Other modules decorate a function with `program` and say what its
results are sharded like.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from dpai_jax.tools import disk, host
from dpai_jax.tools.host import ByNumpy, Quick
from dpai_jax.tools.signatures import of_shapes, shapes_of
from dpai_jax.tools.switches import are_on_default_device, default_device, uncollected

PyTree = Any
T = TypeVar("T")

# How the layers' arrays are sharded while a program is traced.
_LAYERS: ContextVar[tuple[Sharding | None, ...]] = ContextVar("layers", default=())

# The programs of functions without an owner.
_SHARED: dict[Any, Any] = {}


def program(
    *,
    like: Callable[..., PyTree] = lambda *_: None,
    layers: Callable[..., Sequence[Any]] | None = None,
    donate: tuple[int, ...] = (),
    by_numpy: ByNumpy = "never",
) -> Callable[[Callable[..., Any]], Program]:
    """Compiles a function of an owner (a network) and arrays, on one device or many.

    The function is `fn(owner, *args, **settings)`; `settings` are hashable. Compiled programs are
    kept in `owner.programs`, so they are freed with the owner; without an owner they are never
    freed. Arrays on one device are replicated over the mesh of the others.

    Args:
      like: takes `args` and returns a pytree, or a prefix of one, with an array that each result is
        sharded like, or None for a replicated one.
      layers: takes `args` and returns those with one array for each layer (see `layer_shardings`).
        If not given, the compiler chooses all shardings.
      donate: which of `args` give their memory to the results.
      by_numpy: when NumPy may run the first calls, as it runs a small program many times before XLA
        has compiled it: "exactly" if no sum of floats can round, so that the results are the same
        bit by bit; "vouched" if they are also where one could; or "roughly", if they need not be.
        Or a function of `settings` that returns one of these, or what does the same as the program
        with NumPy's arrays; as `Quick` if that need not be compiled in the end (see `tools.host`).

    Returns:
      A decorator.
    """
    return functools.partial(Program, like=like, layers=layers, donate=donate, by_numpy=by_numpy)


class Program:
    """A function that is compiled when it is called (see `program`)."""

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        like: Callable[..., PyTree],
        layers: Callable[..., Sequence[Any]] | None,
        donate: tuple[int, ...],
        by_numpy: ByNumpy,
    ):
        self.fn, self.like, self.layers, self.donate = fn, like, layers, donate
        self.by_numpy = by_numpy
        functools.update_wrapper(self, fn)

    def __call__(self, owner: Any, *args: Any, **settings: Any) -> Any:
        """Runs the program."""
        if _LAYERS.get():  # part of another program
            return self.fn(owner, *args, **settings)
        compiled, args = self._prepared(owner, args, settings)
        return compiled(*args)

    def lower(self, owner: Any, *args: Any, **settings: Any) -> Any:
        """Lowers the program, to look at it."""
        compiled, args = self._prepared(owner, args, settings)
        return compiled.jitted.lower(*args)

    def ahead(self, owner: Any, *args: Any, calls: int = 1, **settings: Any) -> None:
        """Starts to compile the program for these arguments in a thread; not on a mesh.

        So several programs compile at the same time. A call waits for the thread. Nothing is
        compiled if NumPy is to run the next calls, of which `calls` are expected.
        """
        if self.layers is None or not any(map(_sharding, self.layers(*args))):
            compiled, args = self._prepared(owner, args, settings)
            compiled.expect(*args, calls=calls)

    def _prepared(
        self, owner: Any, args: tuple[Any, ...], settings: Mapping[str, Any]
    ) -> tuple[_Compiled, tuple[Any, ...]]:
        """The compiled function for these arguments, and the arguments as it takes them."""
        shardings = () if self.layers is None else tuple(map(_sharding, self.layers(*args)))
        mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
        results = None
        if any(shardings):
            args = _replicated_beside(args, mesh)
            results = jax.tree.map(_sharding, self.like(*args), is_leaf=_is_none)
        flat, treedef = jax.tree.flatten(results, is_leaf=_is_none)
        key = (self, shardings, tuple(flat), treedef, tuple(sorted(settings.items())))
        programs = _SHARED if owner is None else owner.programs
        if key not in programs:
            traced: Any = functools.partial(self.fn, owner, **settings)
            if self.layers is not None:
                traced = functools.partial(_traced, traced, self.like, shardings, results, mesh)
            traced.__name__ = self.fn.__name__  # for profiles
            by_numpy = self.by_numpy
            if callable(by_numpy):
                by_numpy = by_numpy(**settings)
            name = functools.partial(
                disk.name_of, self.fn.__name__, self.fn, owner, tuple(sorted(settings.items()))
            )
            # Another thread may have been faster.
            programs.setdefault(key, _Compiled(traced, self.donate, by_numpy, name))
        return programs[key], args


# At this level of optimization XLA on CPUs compiles faster what then runs as fast. Vectors are as
# wide as the processor has them, where XLA would use half of that.
_ON_CPU = {"xla_backend_optimization_level": 1, "xla_cpu_prefer_vector_width": 512}


class _Compiled:
    """A compiled function; threads may still be compiling it."""

    def __init__(
        self,
        fn: Callable[..., Any],
        donate: tuple[int, ...],
        by_numpy: ByNumpy,
        name: Callable[[str], str | None],
    ):
        jit = functools.partial(jax.jit, fn, donate_argnums=donate, keep_unused=True)
        options = _ON_CPU if jax.default_backend() == "cpu" else None
        self.jitted = jit(compiler_options=options)
        # Within another program options are refused.
        self.within = jit() if options else self.jitted
        # None for a file that turned out to be of no use.
        self._ahead: dict[Any, Future[jax.stages.Compiled | None]] = {}
        self._is_compiled: set[Any] = set()
        # Held by a thread that traces, compiles or lets NumPy run; others wait for it.
        self._first = threading.RLock()
        self._by_numpy = None if by_numpy == "never" else host.Calls(self.jitted, by_numpy)
        self._is_quick = isinstance(by_numpy, Quick)
        # The names on disk, None where a program is not kept there.
        self._name = name
        self._names: dict[Any, str | None] = {}

    def expect(self, *args: Any, calls: int) -> None:
        """Starts to compile, unless NumPy is to run the next calls alone."""
        key = shapes_of(args)
        self._look_up(key, args)
        if key in self._is_compiled:
            return
        if self._by_numpy is not None and self._by_numpy.expect(key, args, calls):
            return
        self._start(key)

    def _start(self, key: Hashable) -> Future[jax.stages.Compiled | None]:
        """Starts to compile for arguments of these shapes on the default device."""
        if key not in self._ahead or self._ahead[key].cancelled():
            # Traced in this thread, as JAX's switches are per thread. XLA needs no Python lock.
            with uncollected():
                lowered = self.jitted.lower(*of_shapes(key))
            self._submit(key, lowered.compile)
        return self._ahead[key]

    def _submit(self, key: Hashable, compiler: Callable[[], jax.stages.Compiled]) -> None:
        name = self._names.get(key)
        if name is not None:
            compiler = functools.partial(disk.kept, name, compiler)
        self._ahead[key] = _COMPILERS.submit(compiler)
        _UNDER_WAY.add(self._ahead[key])

    def _compiled(self, key: Hashable) -> jax.stages.Compiled:
        """Compiles for arguments of these shapes on the default device, or waits for that."""
        with self._first:
            found = self._start(key).result()
            if found is None:
                del self._ahead[key]
                found = self._start(key).result()
        assert found is not None
        return found

    def _look_up(self, key: Hashable, args: tuple[Any, ...]) -> bool:
        """Whether the program is one of those on disk; starts to read it when first asked."""
        if not disk.is_on() or not are_on_default_device(jax.tree.leaves(args)):
            return False
        if key not in self._names:
            is_there = self._is_quick or key in self._is_compiled or key in self._ahead
            self._names[key] = name = None if is_there else self._name(repr(key))
            if name is not None and disk.has(name):
                self._ahead[key] = _COMPILERS.submit(disk.read, name, default_device())
                self._is_compiled.add(key)
            elif name is not None:
                _TO_KEEP.append((weakref.ref(self), key))
        return self._names[key] is not None

    def keep(self, key: Hashable) -> None:
        """Compiles what only NumPy has run so far, for the next process."""
        if key not in self._ahead:
            with uncollected():
                traced = self.jitted.trace(*of_shapes(key))
            self._submit(key, lambda: traced.lower().compile())

    def __call__(self, *args: Any) -> Any:
        if self.within is not self.jitted and _are_traced(args):
            return self.within(*args)
        key = shapes_of(args)
        if key in self._is_compiled:
            return self._run(key, args)
        with self._first:
            self._look_up(key, args)
            compiling = self._ahead.get(key)
            is_ready = key in self._is_compiled or (compiling is not None and compiling.done())
            if self._by_numpy is not None and not is_ready:
                found = self._by_numpy.run(key, args)
                if found is not None:
                    return found
            if compiling is not None:
                wait([compiling])  # an error is raised again by the call below
            found = self._run(key, args)
            self._is_compiled.add(key)
            return found

    def _run(self, key: Hashable, args: tuple[Any, ...]) -> Any:
        if self._look_up(key, args) or _are_committed(args):
            # JAX would compile for them once more, and again where only some are committed.
            return self._compiled(key)(*args)
        return self.jitted(*args)


def _are_traced(args: tuple[Any, ...]) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))


def _are_committed(args: tuple[Any, ...]) -> bool:
    """Whether arrays, the first of them at least, are committed to the default device."""
    arrays = (x for x in jax.tree.leaves(args) if isinstance(x, Array))
    first = next(arrays, None)
    # The first decides for most calls, which take little longer themselves than to look at all.
    if first is None or isinstance(first, jax.core.Tracer) or not first.committed:
        return False
    device = jax.device_put(np.float32(0)).devices()
    return all(
        not isinstance(x, jax.core.Tracer) and x.devices() == device for x in (first, *arrays)
    )


_COMPILERS = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="dpai_jax_compiler")
_UNDER_WAY: weakref.WeakSet[Future[Any]] = weakref.WeakSet()
# Programs to be kept on disk, and for which shapes.
_TO_KEEP: list[tuple[weakref.ref[_Compiled], Hashable]] = []


def keep_on_disk() -> None:
    """Starts to compile what is to be kept on disk (see `tools.disk`) and NumPy has run so far."""
    while _TO_KEEP:
        reference, key = _TO_KEEP.pop()
        program = reference()
        if program is not None:
            program.keep(key)


@contextlib.contextmanager
def given_up_on_failure() -> Iterator[None]:
    """Cancels what is still to be compiled ahead if the block fails.

    Otherwise the process could not end before its threads have compiled it.
    """
    try:
        yield
    except BaseException:
        for compiling in list(_UNDER_WAY):
            compiling.cancel()
        raise


def _traced(
    run: Callable[..., Any],
    like: Callable[..., PyTree],
    shardings: tuple[Sharding | None, ...],
    results: PyTree,
    mesh: Mesh | AbstractMesh | None,
    *args: Any,
) -> Any:
    """Runs a program's function while it is traced, and constrains its results."""
    with _sharded_layers(shardings):
        outputs = auto_sharded(run, *args, like=like(*args))
    if not any(shardings):
        return outputs

    def constrain(sharding: Sharding | None, part: PyTree) -> PyTree:
        if sharding is None and mesh is not None:
            sharding = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda x: _constrained(x, sharding), part)

    return jax.tree.map(constrain, results, outputs, is_leaf=_is_none)


@contextlib.contextmanager
def _sharded_layers(shardings: tuple[Sharding | None, ...]) -> Iterator[None]:
    token = _LAYERS.set(shardings)
    try:
        yield
    finally:
        _LAYERS.reset(token)


def layer_shardings(arrays: Sequence[Any]) -> tuple[Sharding | None, ...]:
    """The shardings of the layers' arrays; None for an array on one device.

    While a program is traced, arrays may not know their shardings. The call's arguments do.
    """
    return _LAYERS.get() or tuple(map(_sharding, arrays))


def _is_none(x: Any) -> bool:
    return x is None


def auto_sharded(fn: Callable[..., T], *args: PyTree, like: PyTree) -> T:
    """Calls a function within `jax.jit`, and lets the compiler choose the shardings inside.

    On explicit mesh axes (the default of `jax.make_mesh`) the sharding of an array is part of its
    type, and an operation whose result could be sharded in several ways must be told which one to
    use. Inside `fn` this is not needed.

    Args:
      fn: function of pytrees of arrays.
      args: its arguments.
      like: pytree prefix of arrays or shardings that the results are sharded like; None means
        replicated.

    Returns:
      `fn(*args)`.
    """
    mesh = next(filter(_explicit_axes, map(_mesh, jax.tree.leaves((args, like)))), _context())
    axes = _explicit_axes(mesh)
    if not axes:
        return fn(*args)

    def of_result(x: Any) -> NamedSharding:
        spec = None if x is None else x.spec if _is_named(x) else jax.typeof(x).sharding.spec
        return NamedSharding(mesh, PartitionSpec() if spec is None else spec)

    shardings = jax.tree.map(of_result, like, is_leaf=_is_none)
    return jax.sharding.auto_axes(fn, axes=axes, out_sharding=shardings)(*args)


def _explicit_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def _mesh(x: Any) -> AbstractMesh:
    return x.mesh.abstract_mesh if _is_named(x) else jax.typeof(x).sharding.mesh


def _context() -> AbstractMesh:
    return jax.sharding.get_abstract_mesh()


def _is_named(x: Any) -> bool:
    return isinstance(x, NamedSharding)


def shardings_of(arrays: Iterable[Any]) -> tuple[Sharding | None, ...]:
    """The shardings of arrays on several devices; None for an array on one."""
    return tuple(map(_sharding, arrays))


def _sharding(array: Any) -> Sharding | None:
    """An array's sharding over several devices; for a traced array, over explicit axes only."""
    if isinstance(array, jax.core.Tracer):
        return jax.typeof(array).sharding if _explicit_axes(_mesh(array)) else None
    sharding = getattr(array, "sharding", None)
    return sharding if sharding is not None and sharding.num_devices > 1 else None


def _constrained(x: Array, sharding: Sharding | None) -> Array:
    if sharding is None:
        return x
    if isinstance(sharding, NamedSharding) and _explicit_axes(sharding.mesh.abstract_mesh):
        return jax.sharding.reshard(x, sharding)
    return lax.with_sharding_constraint(x, sharding)


def moved_off(sharding: NamedSharding, shape: Sequence[int], axes: Sequence[int]) -> NamedSharding:
    """Moves mesh axes from the given array axes to others that they divide.

    Args:
      sharding: an array's sharding.
      shape: the array's shape.
      axes: the array axes that should not be split.

    Returns:
      A sharding with as many parts.
    """
    names = mesh_axes(sharding)
    names += [()] * (len(shape) - len(names))
    sizes = sharding.mesh.shape

    def part(axis: int) -> float:
        return shape[axis] / math.prod(sizes[name] for name in names[axis])

    for axis in axes:
        for name in names[axis]:
            others = [i for i in range(len(shape)) if i not in axes and part(i) % sizes[name] == 0]
            if others:
                place = max(others, key=part)
                names[axis] = tuple(other for other in names[axis] if other != name)
                names[place] = (*names[place], name)
    return NamedSharding(sharding.mesh, PartitionSpec(*names))


def mesh_axes(sharding: NamedSharding) -> list[tuple[str, ...]]:
    """The mesh axes that split each array axis named by the sharding."""
    return [() if s is None else (s,) if isinstance(s, str) else tuple(s) for s in sharding.spec]


def split_like(x: Array, sharding: Sharding | None) -> Array:
    """Constrains an array to a sharding, within `auto_sharded`; does nothing for None."""
    if not isinstance(sharding, NamedSharding):
        return x
    return split_along(x, sharding.mesh, dict(enumerate(mesh_axes(sharding))))


def split_along(x: Array, mesh: Mesh | AbstractMesh, axes: Mapping[int, tuple[str, ...]]) -> Array:
    """Splits array axes along mesh axes that divide them, within `auto_sharded`."""
    context = _context()
    divided = [
        axes[i] if i in axes and size % math.prod(mesh.shape[name] for name in axes[i]) == 0 else ()
        for i, size in enumerate(x.shape)
    ]
    sharding = NamedSharding(mesh if context.empty else context, PartitionSpec(*divided))
    return lax.with_sharding_constraint(x, sharding)


def on_each_device(x: Array) -> Array:
    """Has each device of the layers' mesh hold all of an array, while a program is traced."""
    mesh = next((s.mesh for s in _LAYERS.get() if isinstance(s, NamedSharding)), None)
    return x if mesh is None else split_along(x, mesh, {})


def shapes_like(arrays: Iterable[Any], dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """The shapes of arrays with another dtype, with their shardings if on several devices."""
    return [jax.ShapeDtypeStruct(x.shape, dtype, sharding=_sharding(x)) for x in arrays]


def device_put_like(tree: PyTree, like: PyTree) -> PyTree:
    """Puts the arrays of a tree where those of a parallel one are; scalars stay where they are."""

    def put(x: Any, other: Any) -> Any:
        sharding = _sharding(other)
        return x if sharding is None or jnp.ndim(x) == 0 else jax.device_put(x, sharding)

    return jax.tree.map(put, tree, like)


def shared_out(tree: PyTree, number: int) -> PyTree:
    """Splits the leading axis of arrays, of size `number`, over as many devices as divide it."""
    mesh = _shares(number)
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, _BY_PROBLEM))


def in_turn(fn: Callable[..., T], *args: PyTree) -> T:
    """`jax.vmap` of a function over arrays that are `shared_out`, one after another on each device.

    So a loop runs only as long as its own problem needs, on what fits into a core's cache.
    """

    def run(*own: PyTree) -> T:
        return lax.map(lambda each: fn(*each), own)

    mesh = _shares(len(jax.tree.leaves(args)[0]))
    if mesh is not None:
        run = jax.shard_map(
            run, mesh=mesh, in_specs=_BY_PROBLEM, out_specs=_BY_PROBLEM, check_vma=False
        )
    return run(*args)


_BY_PROBLEM = PartitionSpec("problem")


def _shares(number: int) -> Mesh | None:
    """The devices that share a number of problems; None for a single one."""
    devices = jax.local_devices()
    n = max(n for n in range(1, len(devices) + 1) if number % n == 0)
    if n == 1:
        return None
    return Mesh(np.asarray(devices[:n]), ("problem",), axis_types=(AxisType.Auto,))


def on_one_device(tree: PyTree) -> PyTree:
    """Moves arrays from several devices to the default one."""

    def put(x: Array) -> Array:
        return x if _sharding(x) is None else jnp.asarray(jax.device_get(x))

    return jax.tree.map(put, tree)


def _replicated_beside(tree: PyTree, mesh: Mesh | AbstractMesh | None) -> PyTree:
    """Replicates the arrays of a tree that are on one device over a mesh."""

    def put(x: Any) -> Any:
        if mesh is None or isinstance(x, jax.core.Tracer) or _sharding(x) is not None:
            return x
        array, replicated = np.asarray(x), NamedSharding(mesh, PartitionSpec())
        return jax.make_array_from_callback(array.shape, replicated, array.__getitem__)

    return jax.tree.map(put, tree)


def on_host(array: Any) -> np.ndarray:
    """An array as a NumPy array, gathered from all processes."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
