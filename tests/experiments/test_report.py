import io
import struct

import numpy as np
import pytest
import rich.console

from experiments import documents, report
from experiments.board import Board
from experiments.config import Config, ConfigError
from experiments.report.records import group
from experiments.store import Store

ORIGIN = {
    "commit": "0123456789",
    "versions": {"jax": "1", "python": "3"},
    "hardware": {"cpu": "a chip", "cpu_count": 2},
}


def _record(
    method,
    sparsity,
    seed=0,
    accuracy=0.9,
    log_paths=30.5,
    nodes=1234,
    kernels=56789,
    **settings,
):
    layers = [
        {"name": f"stage{index}", "nodes": 10 + index, "outputs": 16, "effective": 9, "weights": 9}
        for index in range(1, 5)
    ]
    topology = {"log_paths": log_paths, "nodes": nodes, "kernels": kernels, "weights": 270608}
    return {
        "config": Config(method=method, sparsity=sparsity, seed=seed, **settings).as_dict(),
        "metrics": {
            "test_accuracy": accuracy,
            "best_test_accuracy": accuracy,
            "prune_seconds": 12.34,
            "topology": topology | {"layers": layers},
        },
    }


def _show(table, width):
    console = rich.console.Console(file=io.StringIO(), width=width)
    console.print(table.rich())
    return console.file.getvalue()


def test_the_table_fits_eighty_columns_and_shows_every_number():
    records = [_record("dense", 0.0), _record("dpai", 0.9), _record("random", 0.9968)]
    text = _show(report.table(records, "ResNet-20"), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for shown in (
        "dense",
        "0%",
        "90%",
        "99.68%",
        "90.0",
        "1,234",
        "56,789",
        "30.5",
        "12.3",
        "–",
    ):
        assert shown in text


def test_the_front_has_the_methods_that_no_other_one_surpasses():
    counts = {
        "dpai": [(30, 100, 500), (34, 100, 500)],  # the most paths
        "random": [(20, 200, 500), (20, 200, 500)],  # the most nodes
        "npb": [(25, 150, 500), (25, 150, 500)],  # between them
        "synflow": [(31, 90, 500), (31, 90, 500)],  # less of both than dpai in the mean
        "snip": [(25, 150, 490), (25, 150, 490)],  # as npb, with fewer kernels
        "grasp": [(None, 900, 900), (40, 900, 900)],  # one network has no path
    }
    records = [
        _record(method, 0.99, seed, 0.9, *numbers)
        for method, rows in counts.items()
        for seed, numbers in enumerate(rows)
    ]
    (panel,) = report.panels(records)
    assert [group.method for group in panel.front(0.99)] == ["random", "npb", "dpai"]


def test_networks_of_several_widths_are_told_apart_and_ordered_by_their_effective_weights():
    records = []
    for width, method, granularity, effective in (
        (4, "dense", None, 17_000),
        (16, "dpai", "channel", 15_000),
        (16, "dense", None, 270_000),
    ):
        for seed in range(2):
            recipe = {"width": width, "granularity": granularity}
            record = _record(method, 0.9, seed, 0.5 + 0.1 * seed, **recipe)
            record["metrics"]["topology"]["effective"] = effective
            records.append(record)
    rows = report.sizes(records, "").rows
    assert [row[:4] for row in rows] == [
        ("16", "dense", "–", "–"),
        ("4", "dense", "–", "–"),
        ("16", "dpai", "90%", "channel"),
    ]
    assert [row[5] for row in rows] == ["270,000", "17,000", "15,000"]
    assert all(row[6] == "55.0 ± 7.1" and row[-1] == "2" for row in rows)


def test_seeds_are_averaged_and_their_deviation_shown():
    records = [_record("dpai", 0.9, seed, accuracy) for seed, accuracy in enumerate((0.8, 0.9))]
    (line,) = [line for line in _show(report.table(records, ""), 90).splitlines() if "dpai" in line]
    assert "85.0 ± 7.1" in line


def test_rows_are_sorted_by_sparsity_and_keep_the_order_of_methods():
    records = [_record("random", 0.99), _record("dpai", 0.9), _record("random", 0.9)]
    rows = [(row.sparsity, row.method) for row in group(records)]
    assert rows == [(0.9, "dpai"), (0.9, "random"), (0.99, "random")]


def test_choices_of_gates_are_rows_of_their_own():
    records = [_record("dpai", 0.9, seed) for seed in (0, 1, 2)]
    records[1]["config"]["gates"], records[2]["config"]["gates"] = "signal", "jacobian"
    names = [row.method for row in group(records)]
    assert names == ["dpai", "dpai with gates signal", "dpai with gates jacobian"]


def test_a_network_without_a_path_says_so():
    assert "no path" in _show(report.table([_record("random", 0.99, log_paths=None)], ""), 80)


def test_runs_that_diverged_are_counted_and_not_averaged():
    records = [_record("dpai", 0.9, 0, 0.8), _record("dpai", 0.9, 1, None)]
    (line,) = [line for line in _show(report.table(records, ""), 90).splitlines() if "dpai" in line]
    assert "1 of 2 diverged" in line


def test_the_table_of_a_document_is_that_of_the_terminal():
    records = [_record("dense", 0.0), _record("dpai", 0.9)]
    lines = report.table(records, "ResNet-20").markdown().splitlines()
    assert lines[0] == "*ResNet-20*"
    assert lines[2].startswith("| sparsity | method | test % | best % |")
    assert lines[3].startswith("| ---: | --- | ---: |")
    assert lines[5].startswith("| 90% | dpai | 90.0 | 90.0 | 1,234 | 56,789 | 30.5 | 12.3 |")
    assert lines[-1].startswith("test: last epoch;")


def test_the_tables_of_a_document_are_written_from_its_records(tmp_path):
    store = Store(tmp_path / "results" / "jobs.jsonl")
    store.append(_record("dpai", 0.9) | ORIGIN)
    document = tmp_path / "page.md"
    before, after = "# Page\n\nText.\n\n", "\n\nMore text.\n"
    begin = "<!-- table jobs of results/jobs.jsonl ResNet-20, one seed -->\n"
    end = "<!-- end of table -->"
    document.write_text(before + begin + "old\n" + end + after)
    documents.update(document)
    text = document.read_text()
    assert text.startswith(before + begin)
    assert text.endswith(end + after)
    assert "old" not in text
    assert "*ResNet-20, one seed*" in text
    assert "| 90% | dpai | 90.0 |" in text
    assert "Measured at `0123456` on a chip, 2 cores, jax 1, Python 3." in text
    assert documents.updated(document) == text
    empty = "<!-- table jobs of results/jobs.jsonl -->\n" + end
    document.write_text(empty + after + empty)
    documents.update(document)
    assert document.read_text().count("| 90% | dpai | 90.0 |") == 2
    assert after in document.read_text()
    document.write_text("<!-- table step of results/jobs.jsonl -->\n<!-- end of table -->\n")
    with pytest.raises(ConfigError, match="no records for the table step in"):
        documents.update(document)


def test_the_picture_is_written_as_png(tmp_path):
    path = tmp_path / "new" / "picture.png"
    records = [_record("dense", 0.0), _record("dpai", 0.9), _record("other", 0.9)]
    report.draw(records, path, "ResNet-20")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > height > 400


def test_the_figure_of_a_document_is_drawn_from_the_records_of_jobs(tmp_path):
    store = Store(tmp_path / "jobs.jsonl")
    store.append(_record("dpai", 0.9))
    document = tmp_path / "page.md"
    document.write_text("<!-- plot accuracy of jobs.jsonl -->\n![What it shows](accuracy.png)\n")
    documents.update(document)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_control_codes_go_to_terminals_only(terminal):
    console = rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=100)
    config = Config(epochs=2)
    with Board(console, [config]) as board:
        tell = board.report(config)
        tell("prune", 0, 2, {})
        tell("train", 0, 2, {})
        tell("train", 2, 2, {"validation_accuracy": 0.5, "test_accuracy": 0.25})
    text = console.file.getvalue()
    assert ("\x1b" in text) == terminal
    assert "dpai 99%" in text
    assert "epoch 2/2, validation 50.0%, test 25.0%" in text


def test_what_a_method_is_ahead_of_others_is_the_mean_difference_by_seed():
    # Differences to "snip" of 2.0, 2.1 and 1.9 points, and to "random" of 5, -5 and 0.3.
    accuracies = {
        "dpai": (0.80, 0.82, 0.81),
        "snip": (0.78, 0.799, 0.791),
        "random": (0.75, 0.87, 0.807),
    }
    records = [
        _record(method, 0.9, seed, value)
        for method, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    grid = report.against(*report.panels(records), "dpai")
    *rows, (_, found) = grid.rows
    assert dict(rows) == {"snip": "+2.00 ahead", "random": "+0.10"}
    assert float(found) == pytest.approx(np.median([_found(0.1), _found(5.003)]), abs=0.02)


def _found(deviation):
    """From tables of power: the mean of three values that a t-test finds with a chance of 80 %."""
    return 3.26 * deviation


def _network(model, accuracies, sparsity=0.9):
    """Records of one network: the accuracies of each method, seed by seed."""
    return [
        _record(method, sparsity, seed, value, model=model)
        for method, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


def test_where_a_method_stands_is_told_network_by_network():
    first = {
        "snip": (0.70, 0.719, 0.711),  # 10 points less at each seed, about
        "dpai": (0.80, 0.82, 0.81),
        "synflow": (0.90, 0.921, 0.909),  # 10 points more
        "random": (0.75, 0.87, 0.95),  # 4.7 points more, with a large spread
        "dpai+repair": (0.95, 0.96, 0.97),  # its own masks
        "random+shuffled": (0.99, 0.98, 0.97),  # a control
    }
    second = {"dpai": (0.5, 0.6, 0.7), "snip": (0.3, 0.4, 0.51)}
    sparser = {"dpai": (0.5, 0.6), "snip": (0.6, 0.7)}  # no spread of the difference: no test
    without = {"snip": (0.3, 0.4, 0.5)}
    records = _network("lenet", first) + _network("resnet20", second) + _network("mlp", without)
    records += _network("resnet20", sparser, 0.99)
    grid = report.standing(report.panels(records), "dpai")
    assert grid.rows == (
        ("lenet on digits", "90%", "81.0 ± 1.0", "synflow", "-10.0", "1", "1", "1"),
        None,
        ("resnet20 on digits", "90%", "60.0 ± 10.0", "snip", "+19.7", "1", "0", "0"),
        ("", "99%", "55.0 ± 7.1", "snip", "-10.0", "0", "1", "0"),
    )


def test_distances_are_those_to_the_best_of_each_network():
    records = _network("lenet", {"dpai": (0.8, 0.6), "snip": (0.9, 0.7), "npb": (0.9, 0.9)})
    second = {"snip": (0.5, 0.4), "dpai": (0.5, 0.5), "snip+shuffled": (0.9, 0.9)}
    records += _network("resnet20", second)
    records += _network("resnet20", {"snip": (0.4, 0.4), "dpai": (0.1, 0.5)}, 0.99)
    grid = report.distances(report.panels(records))
    assert grid.headings == ("method", "90%, 2 networks", "99%, 1 network", "all")
    assert grid.rows == (  # npb is on one network alone, but its best; shuffled masks are a control
        ("snip", "7.5 (10.0)", "0.0 (0.0)", "5.0 (10.0)"),
        ("dpai", "10.0 (20.0)", "10.0 (10.0)", "10.0 (20.0)"),
    )


def test_a_title_calls_data_by_its_file():
    datasets = ("idx:/some/fashion-mnist", "npz:data/cifar10.npz", "cifar10")
    records = [_record("dpai", 0.9, model="lenet", dataset=dataset) for dataset in datasets]
    assert [panel.title for panel in report.panels(records)] == [
        "lenet on fashion-mnist",
        "lenet on cifar10, dataset npz:data/cifar10.npz",
        "lenet on cifar10, dataset cifar10",
    ]


def test_a_table_of_a_document_takes_several_files(tmp_path):
    for name, model in (("one", "lenet"), ("two", "resnet20")):
        for record in _network(model, {"dpai": (0.8,), "snip": (0.7,)}):
            Store(tmp_path / f"{name}.jsonl").append(record | ORIGIN)
    document = tmp_path / "page.md"
    end = "<!-- end of table -->\n"
    document.write_text(
        f"<!-- table standing of one.jsonl,two.jsonl dpai -->\n{end}"
        f"<!-- table distances of one.jsonl,two.jsonl -->\n{end}"
    )
    documents.update(document)
    text = document.read_text()
    assert "| lenet on digits | 90% | 80.0 | snip | +10.0 | 0 | 1 | 0 |" in text
    assert "| resnet20 on digits | 90% | 80.0 | snip | +10.0 | 0 | 1 | 0 |" in text
    assert "| snip | 10.0 (10.0) | 10.0 (10.0) |" in text
