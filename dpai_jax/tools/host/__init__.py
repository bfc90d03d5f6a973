"""Programs run by NumPy, which has nothing to compile: the first calls of small ones on CPUs.

XLA takes some ten milliseconds for each kernel, and a deep network's step has hundreds. NumPy
starts on the same equations at once. A call takes it longer, so programs are compiled in the end.

`calls` decides which calls NumPy runs, `plan` makes a list of NumPy's calls of a trace, `rules`
and `contractions` have a rule for each of JAX's primitives, and `floats` makes NumPy compute as XLA
does.
"""

from dpai_jax.tools.host import contractions, rules  # noqa: F401  (they register rules)
from dpai_jax.tools.host.calls import ByNumpy, Calls, Quick, compiled_only

__all__ = ["ByNumpy", "Calls", "Quick", "compiled_only"]
