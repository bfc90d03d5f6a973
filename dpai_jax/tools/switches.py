"""JAX's debugging switches, which are meant for the user's own programs."""

import contextlib
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
