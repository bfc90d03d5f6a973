"""JAX's switches; those for debugging are meant for the user's own programs."""

import contextlib
import gc
from collections.abc import Iterable, Iterator
from typing import Any

import jax

# Switches that make no difference to a program begin so.
_ASIDE = ("jax_compilation_cache", "jax_persistent_cache", "jax_dump", "jax_log", "jax_explain")


def switch(name: str) -> Any:
    """One of JAX's switches, as it is in this thread."""
    return getattr(jax.config, name)


def all_switches() -> str:
    """JAX's switches and its mesh, as they are in this thread."""
    values = {name: getattr(jax.config, name, value) for name, value in jax.config.values.items()}
    own = sorted((name, x) for name, x in values.items() if not name.startswith(_ASIDE))
    return repr((own, jax.sharding.get_abstract_mesh()))


def are_on_default_device(leaves: Iterable[Any]) -> bool:
    """Whether all arrays among some values are on the default device alone."""
    shardings = {x.sharding for x in leaves if isinstance(x, jax.Array)}
    return all(sharding.device_set == {default_device()} for sharding in shardings)


def default_device() -> jax.Device:
    """The default device."""
    device: jax.Device = switch("jax_default_device") or jax.local_devices()[0]
    return device


@contextlib.contextmanager
def usual_switches() -> Iterator[None]:
    """Turns JAX's debugging switches off; a context, and a decorator of functions.

    Without compilation pruning would take minutes. It moves small constants to the device, and some
    of its results are −∞: the score of a removed weight, and log R_P without a path. Checks for NaN
    stay on.
    """
    with jax.disable_jit(False), jax.transfer_guard("allow"), jax.debug_infs(False):
        yield


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Within the block Python does not look for garbage, which would take a fifth of a trace.

    A context, and a decorator of functions.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
