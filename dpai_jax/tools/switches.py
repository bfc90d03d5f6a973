"""JAX's debugging switches, which are meant for the user's own programs."""

import contextlib
import gc
from collections.abc import Iterator

import jax


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
    """Within the block Python does not look for garbage, which would take a fifth of a trace."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
