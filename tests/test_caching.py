"""The cache on disk: a second process finds all that the first has compiled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import dpai_jax as dpai
from dpai_jax.tools import host

PROCESS = """
import sys
import jax, jax.numpy as jnp
import dpai_jax as dpai
from dpai_jax.tools import host

jnp.ones(3) + 1  # something compiled before, when no cache was looked for
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
folder = dpai.cache(*sys.argv[1:])
fn = lambda params, x: jax.nn.relu(x @ params["hidden"]) @ params["out"]
params = {"hidden": jnp.ones((16, 32)), "out": jnp.ones((32, 4))}
with host.compiled_only():
    result = dpai.prune(fn, params, jnp.ones((1, 16)), 0.9, progress=False)
print(folder, events.count("cache_hits"), events.count("cache_misses"), result.topology.log_paths)
"""


def run(*args: str, **environment: str) -> list[str]:
    # Without the cache that the tests' processes share.
    shared = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    own = {name: value for name, value in os.environ.items() if name not in shared}
    process = subprocess.run(
        [sys.executable, "-c", PROCESS, *args],
        check=True,
        capture_output=True,
        text=True,
        env=own | environment,
    )
    return process.stdout.split()


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    folder, _, misses, log_paths = run(str(tmp_path / "new" / "folder"))
    assert Path(folder) == tmp_path / "new" / "folder"
    assert int(misses) > 5
    again = run(folder)
    assert int(again[1]) >= int(misses)
    assert again[2:] == ["0", log_paths]


def test_the_folder_is_that_of_the_user(tmp_path: Path) -> None:
    folder, *_ = run(XDG_CACHE_HOME=str(tmp_path))
    assert Path(folder) == tmp_path / "dpai_jax" / "compiled"
    assert any(Path(folder).iterdir())


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="folder must be a path, got 3"):
        dpai.cache(3)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        dpai.cache(tmp_path / "file")


METHODS = {
    "dpai": dpai.DPaI(),
    "published": dpai.DPaI.published(steps=2),
    "synflow": dpai.SynFlow(steps=3),
}


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_first_call_lowers_each_program_once(caplog, name, committed):
    """Also for parameters that are committed to a device, as restored checkpoints are."""
    width = 17 + 2 * list(METHODS).index(name) + committed  # a network that no other test has
    params = {"a": jnp.ones((5, width)), "b": jnp.linspace(0.1, 1, width * 3).reshape(width, 3)}
    if committed:
        params = jax.device_put(params, jax.devices()[0])

    def fn(params, x):
        return x @ params["a"] @ params["b"]

    key, method = jax.random.key(0), METHODS[name]
    with jax.log_compiles(), host.compiled_only():
        dpai.prune(fn, params, jnp.ones((1, 5)), 0.5, method=method, key=key, progress=False)
    lowered = re.findall(r"Finished jaxpr to MLIR module conversion jit\((_\w+)\)", caplog.text)
    assert {"_step", "_flow_at_once"} & set(lowered)
    assert len(lowered) == len(set(lowered))
