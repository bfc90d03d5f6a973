"""The cache on disk: a second process finds all that the first has compiled."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpai_jax as dpai
from dpai_jax import paths
from dpai_jax.paths import interpreter
from dpai_jax.paths.counting import COUNTINGS
from dpai_jax.tools import disk, host
from dpai_jax.tools.host.floats import flushes
from dpai_jax.tools.signatures import Alike

PROCESS = """
import hashlib, json, sys
import jax, jax.numpy as jnp, numpy as np
import dpai_jax as dpai
from dpai_jax.tools import host

jnp.ones(3) + 1  # something compiled before, when no cache was looked for
events, numpy = [], []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **about: events.append((event.split("/")[-1], about.get("fun_name")))
)
run = host.Calls.run

def counted(calls, *args):
    found = run(calls, *args)
    if found is not None and not isinstance(calls._by_numpy, host.Quick):
        numpy.append(calls)
    return found

host.Calls.run = counted
folder = dpai.cache(*sys.argv[1:])
fn = lambda params, x: jax.nn.relu(x @ params["hidden"]) @ params["out"]
params = {"hidden": jnp.ones((16, 32)), "out": jnp.ones((32, 4))}
method = dpai.DPaI.published(steps=3)
for _ in range(2):
    result = dpai.prune(fn, params, jnp.ones((1, 16)), 0.9, method=method, progress=False)
masks = b"".join(np.asarray(mask).tobytes() for mask in jax.tree.leaves(result.masks))
lowered = {x[1] for x in events if x[0] == "jaxpr_to_mlir_module_duration"}
print(json.dumps({
    "folder": str(folder),
    "misses": events.count("cache_misses"),
    "lowered": sorted(map(str, lowered)),
    "numpy": len(numpy),
    "masks": hashlib.sha256(masks).hexdigest(),
    "log_paths": result.topology.log_paths,
}))
"""


def run(*args: str, **environment: str) -> dict[str, Any]:
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
    found: dict[str, Any] = json.loads(process.stdout)
    return found | {"warnings": process.stderr}


def test_a_second_process_compiles_and_lowers_nothing_of_ours(tmp_path: Path) -> None:
    first = run(str(tmp_path / "new" / "folder"))
    folder = Path(first["folder"])
    assert folder == tmp_path / "new" / "folder"
    assert first["misses"] > 5
    assert (first["numpy"] > 5) == flushes()
    kept = sorted(path.name.split("-")[0] for path in (folder / "programs").iterdir())
    assert {"take_step", "select", "normal", "reached", "log_count"} <= set(kept)
    again = run(str(folder))
    assert not {name.removeprefix("_") for name in again["lowered"]} & set(kept)
    assert again["misses"] == again["numpy"] == 0
    assert sorted(path.name.split("-")[0] for path in (folder / "programs").iterdir()) == kept
    assert (again["masks"], again["log_paths"]) == (first["masks"], first["log_paths"])


@pytest.mark.parametrize("has_jax", [False, True], ids=["compiled anew", "in JAX's cache"])
def test_what_is_wrong_with_a_file_makes_no_difference(tmp_path: Path, has_jax: bool) -> None:
    first = run(str(tmp_path))
    programs = tmp_path / "programs"
    files = sorted(programs.iterdir())
    for i, file in enumerate(files):
        file.write_bytes(file.read_bytes()[: i % 2 * 1000])
    if not has_jax:
        for file in tmp_path.glob("*-cache"):
            file.unlink()
    again = run(str(tmp_path))
    assert again["masks"] == first["masks"]
    # What JAX's cache gives back is written without its functions, and so not kept again.
    assert sorted(programs.iterdir()) == ([] if has_jax else files)
    assert all(file.stat().st_size > 1000 for file in programs.iterdir())
    third = run(str(tmp_path))
    assert third["masks"] == first["masks"]
    assert (third["numpy"] == 0) != has_jax or not flushes()


def test_a_program_that_cannot_be_kept_is_used_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "programs").touch()
    found = run(str(tmp_path))
    assert found["log_paths"] > 0
    assert "a compiled program could not be kept in" in found["warnings"]


def mean(values: Any) -> Any:
    return jnp.mean(values)


def network(scale: float = 1.0, width: int = 3, gates: str = "balanced") -> dpai.Network:
    table = np.full((2, width), scale, np.float32)  # a constant of the program
    params = {"a": jnp.ones((4, width))}
    return dpai.trace(lambda p, x: (x @ p["a"]) * table, params, jnp.ones((2, 4)), gates=gates)


@pytest.fixture
def only_our_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rules that other tests add."""
    own = {n: r for n, r in interpreter._RULES.items() if r.__module__.startswith("dpai_jax.")}
    monkeypatch.setattr(interpreter, "_RULES", own)


@pytest.mark.usefixtures("only_our_rules")
def test_only_what_is_alike_has_one_name() -> None:
    parts: list[Any] = [
        (network(),),
        (network(2.0),),
        (network(width=5),),
        (network(gates="jacobian"),),
        (network(), 1),
        (network(), 1.0),
        (network(), True),
        (network(), "1"),
        (network(), np.float32(1)),
        (network(), jnp.abs),
        (network(), jnp.square),
        (network(), Alike(optax.sgd(0.1).update)),
        (network(), Alike(optax.sgd(0.2).update)),
        (network(), Alike(optax.adam(0.1).update)),
        (network(), (1, 2), 3),
        (network(), 1, (2, 3)),
        (network(), jax.tree.structure((1, 2))),
        (network(), np.dtype("int32")),
    ]
    names = [disk.name_of("title", *own) for own in parts]
    assert None not in names
    assert len(set(names)) == len(parts)
    assert disk.name_of("title", network(), 1) == names[4]
    with jax.default_matmul_precision("highest"):
        assert disk.name_of("title", network(), 1) not in {*names, None}


def test_what_belongs_to_the_user_has_no_name() -> None:
    """It could do something else in the next process, and be called the same."""
    typed = eval("lambda x: x", {"__name__": "dpai_jax"})
    for own in (
        typed,
        mean,
        lambda x: x,
        functools.partial(mean, 1),
        object(),
        np.ones(3),
        Alike(mean),
    ):
        assert disk.name_of("title", own) is None


@pytest.mark.usefixtures("only_our_rules")
def test_a_network_counted_in_a_way_of_the_user_has_no_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Discounted(paths.Counting):
        pass

    assert disk.name_of("title", network()) is not None
    with monkeypatch.context() as patch:
        patch.setitem(COUNTINGS, "discounted", Discounted())
        assert disk.name_of("title", network()) is None
    dpai.register_rule(jax.extend.core.Primitive("of_the_user"))(lambda *_, **__: None)
    assert disk.name_of("title", network()) is None


def test_the_folder_is_that_of_the_user(tmp_path: Path) -> None:
    folder = run(XDG_CACHE_HOME=str(tmp_path))["folder"]
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
    lowered = re.findall(
        r"Finished jaxpr to MLIR module conversion jit\((_\w+|take_step)\)", caplog.text
    )
    assert {"take_step", "_flow_at_once"} & set(lowered)
    assert len(lowered) == len(set(lowered))
