"""JAX's switches for debugging, which are meant for a user's own programs."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def usual_switches() -> Iterator[None]:
    """JAX as if nobody were debugging: a context, and a decorator of functions.

    Pruning compiles what would take minutes op by op, moves small constants to the device, and
    has −∞ among its results: the score of a removed weight, and log R_P without a path. Checks for
    NaN stay on.
    """
    with jax.disable_jit(False), jax.transfer_guard("allow"), jax.debug_infs(False):
        yield
