"""The path semantics of JAX's primitives, grouped by what they mean."""

from dpai_jax.paths.rules import (  # noqa: F401  (importing a group registers its rules)
    contraction,
    control,
    elementwise,
    indexing,
    reduction,
    shape,
)
