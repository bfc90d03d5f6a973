"""A zoo of small networks, each written the way its library's users write one.

`CASES` lists them all; `by_name` finds one. A case tells which leaves of its parameters can be
pruned, so a test can hold what the library finds against it.
"""

from tests.support.networks import (
    equinox_networks,
    haiku_networks,
    linen_images,
    linen_loops,
    linen_tokens,
    nnx_images,
    nnx_tokens,
    plain_control,
    plain_layers,
    plain_tokens,
)
from tests.support.networks.case import Case

CASES: tuple[Case, ...] = (
    *linen_images.CASES,
    *linen_tokens.CASES,
    *linen_loops.CASES,
    *nnx_images.CASES,
    *nnx_tokens.CASES,
    *haiku_networks.CASES,
    *equinox_networks.CASES,
    *plain_layers.CASES,
    *plain_tokens.CASES,
    *plain_control.CASES,
)


def by_name(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)


__all__ = ["CASES", "Case", "by_name"]
