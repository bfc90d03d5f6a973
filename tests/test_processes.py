"""Two processes that prune one network together, with the masks of one that prunes it alone."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.support import one_of_two, sharded

ROOT = pathlib.Path(__file__).parent.parent


def test_two_processes_find_the_masks_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    paths = [tmp_path / f"{i}.npz" for i in range(2)]
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.one_of_two", str(port), str(i), str(path)],
            cwd=ROOT,
            env=os.environ | devices,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i, path in enumerate(paths)
    ]
    try:
        for child in children:
            output, _ = child.communicate(timeout=240)
            assert child.returncode == 0, output
    finally:
        for child in children:
            child.kill()
            child.wait()
    _, params, _ = sharded.network("mlp")
    found = [np.load(path) for path in paths]
    for name, how in one_of_two.METHODS.items():
        alone = one_of_two.prune(params, how)
        for masks in found:
            for key, mask in alone.masks.items():
                np.testing.assert_array_equal(masks[f"{name} {key}"], mask)
            assert masks[f"{name} log_paths"] == pytest.approx(alone.topology.log_paths, abs=1e-5)
