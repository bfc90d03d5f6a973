"""One of two processes that prune a network together.

Run by `python -m tests.support.one_of_two PORT ID FILE`.
"""

import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

import dpai_jax as dpai
from dpai_jax.tools.meshes import on_host
from tests.support import sharded

METHODS = {"dpai": dpai.DPaI(steps=12), "magnitude": dpai.Magnitude(), "random": dpai.Random()}
"""What both prune by, and what one process alone is held against."""


def prune(params: Any, how: Any) -> dpai.Result:
    """Prunes the network, wherever its parameters lie."""
    fn, _, x = sharded.network("mlp")
    return dpai.prune(fn, params, x, 0.8, method=how, key=jax.random.key(1), progress=False)


def main(port: str, process: str, path: str) -> None:
    """Prunes a network that lies on the devices of both, and writes its masks to a file."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
    assert (len(jax.local_devices()), jax.device_count()) == (4, 8)
    _, params, _ = sharded.network("mlp")
    spread = sharded.spread(params, sharded.mesh("mixed", AxisType.Explicit))
    found = {}
    for name, how in METHODS.items():
        result = prune(spread, how)
        for key, mask in result.masks.items():
            assert not mask.is_fully_addressable
            assert mask.sharding == spread[key].sharding
            found[f"{name} {key}"] = on_host(mask)
        found[f"{name} log_paths"] = np.asarray(result.topology.log_paths)
    np.savez(path, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
