"""Benchmarks on tiny networks: what they measure, that they resume, and that their tables print."""

import functools
import io
import math

import numpy as np
import pytest
import rich.console

import dpai_jax as dpai
from experiments.benchmarks import clock, cold, networks, rows, show, smaller
from experiments.benchmarks.networks import Network
from experiments.store import Store

TINY = Network("lenet", 10, (6, 6, 1), 8)


@pytest.fixture
def _tiny(monkeypatch):
    for name in ("STEP", "LARGE", "QUALITY", "SETTINGS", "COLD", "RIVALS", "COPIES", "COMPACT"):
        monkeypatch.setattr(networks, name, (TINY,))
    monkeypatch.setattr(networks, "SPARSITIES", (0.5,))
    few = dict(list(rows.METHODS.items())[1:3])
    monkeypatch.setattr(rows, "METHODS", few)
    # A process of its own would know nothing of all this.
    for module in (rows, cold, smaller):
        monkeypatch.setattr(module, "isolated", lambda function, *args: function(*args))
    monkeypatch.setattr(dpai, "cache", lambda _: None)
    deep = [Network("gpt2", 10, (4,), 12, depth) for depth in (1, 2)]
    monkeypatch.setattr(networks, "GROWTH", deep)
    for name in ("REPEATS", "FEW_REPEATS"):
        monkeypatch.setattr(cold, name, 1)
    once = functools.partial(clock.call_seconds, repeats=1, warmup=0)
    monkeypatch.setattr(clock, "call_seconds", once)


def _printed(names, folder):
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    show.run(names, 1, None, folder, console)
    return console.export_text()


@pytest.mark.usefixtures("_tiny")
@pytest.mark.standard_promotion
def test_tables_print_and_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    first = _printed(("large", "quality", "settings"), tmp_path)
    measured = Store(tmp_path / "rows.jsonl").read()
    assert [row["table"] for row in measured] == ["large", "quality", "settings", "settings"]
    for method in rows.METHODS:
        assert method in first

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(dpai, "prune", fail)
    assert _printed(("large", "quality", "settings"), tmp_path) == first


@pytest.mark.usefixtures("_tiny")
@pytest.mark.standard_promotion
def test_first_calls_and_many_at_once_are_measured(tmp_path, monkeypatch):
    for name in ("_many", "_copies"):
        monkeypatch.setattr(cold, name, functools.partial(getattr(cold, name), number=2))
    printed = _printed(("cold", "rivals", "growth", "many"), tmp_path)
    for call in (*cold.CALLS, "cached on disk", "decoder", "prune_many"):
        assert call in printed
    store = Store(tmp_path / "rows.jsonl").read()
    show.plot("growth", [row for row in store if row["table"] == "growth"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.usefixtures("_tiny")
@pytest.mark.standard_promotion
def test_smaller_networks_and_sparse_products_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(smaller, "METHODS", {"magnitude": dpai.Magnitude()})
    monkeypatch.setattr(smaller, "MATRICES", ((6, 4),))
    printed = _printed(("compact", "sparse"), tmp_path)
    for word in ("magnitude", "6 × 4", *smaller.FORMATS):
        assert word in printed
    row = Store(tmp_path / "rows.jsonl").read()[0]["at"][0]
    assert row["weights after"] <= row["weights before"]
    assert row["bytes before"] == 4 * row["weights before"]


@pytest.mark.standard_promotion
def test_in_a_dense_network_exact_and_mean_field_counts_optimise_the_same():
    row = rows._quality(TINY, 0.5, 0)
    exact, mean_field = (
        {name: row[counting][name] for name in ("nodes", "kernels", "effective")}
        for counting in ("exact", "mean_field")
    )
    assert exact == mean_field
    assert math.isclose(row["exact"]["log_paths"], row["mean_field"]["log_paths"], rel_tol=1e-5)


@pytest.mark.parametrize("network", networks.QUALITY + networks.SETTINGS, ids=lambda n: n.title)
def test_inputs_fit_their_networks(network):
    fn, params, x = network.problem()
    assert x.shape == (1, *network.shape)
    assert callable(fn)
    assert params["params"]


def test_the_peak_of_a_call_is_what_it_holds():
    size = 200 * 2**20
    # Written to, or the pages would not be there.
    # A little of it may have been held before.
    assert 0.95 * size <= clock.peak_bytes(lambda: np.ones(size, np.uint8).sum()) < 1.2 * size
    assert clock.peak_bytes(lambda: None) < size / 10
