"""Settings that every test runs under. They must come before JAX starts its backend."""

import gc
import importlib.metadata
import os
import re
import tempfile

# The tests' numbers are held on the CPU; another platform can be asked for by the environment.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Eight simulated devices, so that sharded networks and masks are tested on any machine.
_FLAGS = "--xla_force_host_platform_device_count=8"
# Each program is compiled in one piece, as the other core has tests of its own.
_FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
# JAX 0.10 still has XLA's older code generator for CPUs, which compiles in less than half the time.
# The tests on JAX 0.12 (see .ci/run) use the one that users have.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
# A worker inherits the variable from the process that starts it.
if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()

# All processes of a run share compiled programs on disk, including those that tests start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from collections.abc import Iterator  # noqa: E402
from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

# A count of one rank must never broadcast silently against one of another.
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline, as an example's first call compiles. The same examples in every run, so that a
# failure can be had again; hence no database. Few of them, as most compile a new network.
hypothesis.settings.register_profile(
    "dpai_jax", deadline=None, derandomize=True, database=None, max_examples=25
)
hypothesis.settings.load_profile("dpai_jax")


@pytest.fixture(autouse=True)
def dtype_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Strict promotion of dtypes, so that no mask or index becomes a count by accident.

    Optax's Adam and its kin promote their integer step count themselves; a test that runs them is
    marked `standard_promotion`.
    """
    standard = request.node.get_closest_marker("standard_promotion")
    with jax.numpy_dtype_promotion("standard" if standard else "strict"):
        yield


@pytest.fixture(autouse=True)
def shared_cache() -> Iterator[None]:
    """Returns to the run's cache after a test that chose another folder."""
    yield
    if jax.config.jax_compilation_cache_dir != os.environ["JAX_COMPILATION_CACHE_DIR"]:
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        compilation_cache.reset_cache()


@pytest.fixture(autouse=True, scope="session")
def rare_garbage_collection() -> None:
    """Collects seldom: tracing makes many objects, and each collection visits all modules' own."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True)
def quick_compilation(request: pytest.FixtureRequest) -> None:
    """Compiles quickly: most programs run once, so optimizing them costs more than it saves.

    Tests whose numbers depend on how XLA fuses operations are marked `optimized`, and stand before
    others that use the same programs.
    """
    quick = request.node.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(autouse=True, scope="module")
def fresh_caches() -> Iterator[None]:
    """Drops what a file's tests compiled.

    Each program holds memory pages of its own, and the operating system limits how many a process
    may map: after thousands of programs the compiler crashes.
    """
    yield
    jax.clear_caches()
    gc.collect()


# Started first, so that no worker is left with one of them when the other has finished.
LONGEST = ("test_sharding.py", "test_documents.py", "test_contract.py", "test_train.py")
# Last, as their groups are small.
SMALL = NOTEBOOKS, ZOO = "test_notebooks.py", "test_zoo.py"


# What `make test` leaves to `make test-all`, so that it ends within ten minutes on two cores: the
# longest tests, of which it runs a smaller sibling. A pattern matches somewhere in a test's name.
SLOW = (
    r"test_a_notebook_runs",
    r"test_the_code_of_a_document_runs\w*\[docs/",
    # Other methods, networks, libraries and meshes than those that stay.
    r"test_masks_are_those_recorded\[(residual|transformer)",
    r"test_sharding.*(residual|transformer|automatic|fsdp|mlp-data|other_methods|seen_through)",
    r"test_(memory_of_a_device|what_the_optimizer_remembers|networks_keep_their_shares)",
    r"test_masks_keep_exactly\w*\[.*-(equinox|flax_nnx|scanned)-",
    r"test_cut_networks\w*\[(?!linen/resnet|plain/(scanned|convolution))",
    r"test_groups_are_kept\w*\[(DPaI, global|GraSP|NTK-SAP|ProsPr)",
    r"test_masks_are_the_same_under_every_switch\[(?!DPaI)",
    r"test_networks_are_pruned_as_xla\w*\[(?!lenet|resnet20-default)",
    r"test_zoo.*\[(equinox|haiku|nnx|linen/(?!resnet_basic|vit_class|lstm))",
    r"test_contract_of_every_optimizer\[(?!sgd|adam|lion)",
    r"experiments/models/|experiments/test_(mesh|report_page|cpu)\.py",
    r"test_mean_field",
    r"test_granularity.*::test_(many_masks|masks_on_a_mesh)",
    r"test_many.*::test_(many_masks|only_what)",
    r"test_(every_method_prunes_a|it_prunes_networks_of|every_name_makes)",
    r"test_(so_are_the_results|every_kept_weight|synflow_of_fifty_layers)",
    r"test_(topology_is_that_of_a_graph|a_network_written_per_device|whatever_any_masks)",
    r"test_folding.*::test_pruning",
    r"test_(first_calls_and_many|two_processes|after_twenty_kills|a_decoder_learns_a_text)",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks slow tests; long files go first and small groups last, so that workers end together."""
    for item in items:
        if any(re.search(pattern, item.nodeid) for pattern in SLOW):
            item.add_marker(pytest.mark.slow)
    order = {name: place for place, name in enumerate(LONGEST)}
    order |= {name: len(LONGEST) + 1 + place for place, name in enumerate(SMALL)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps together what shares compiled programs: a file, or all tests of a network of the zoo.

    Notebooks share nothing: each goes to the next worker that is free.

    (The `xdist_group` mark would do, but pytest-xdist 3.8 ignores it under pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            network = re.search(r"\[(\w+/\w+)", test) if file.endswith(ZOO) else None
            if file.endswith(NOTEBOOKS):
                return nodeid
            return network[1] if network else file

    return Scheduling(config, log)
