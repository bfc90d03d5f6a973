"""Pictures of pruned networks, with matplotlib.

Every function draws into `ax`, or into a new figure, and returns the Axes. matplotlib is loaded by
the first call: `pip install 'dpai_jax[show]'`.
"""

from dpai_jax.plot.charts import density, history, masks
from dpai_jax.plot.flowing import flow

__all__ = ["density", "flow", "history", "masks"]
