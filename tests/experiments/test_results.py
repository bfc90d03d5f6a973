import dataclasses
import math
import multiprocessing

import pytest

from experiments import results
from experiments.config import Config, ConfigError


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    first = results.make_record(Config(), {"test_accuracy": 0.5, "history": [{"loss": 1.0}]}, 3.0)
    second = results.make_record(Config(seed=1), {"test_accuracy": 0.7, "history": []}, 4.0)
    results.append(path, first)
    results.append(path, second)
    assert results.read(path) == [first, second]
    assert path.read_text().count("\n") == 2


def test_a_record_tells_versions_and_hardware():
    record = results.make_record(Config(), {}, 1.0)
    assert {"python", "jax", "flax", "numpy"} <= set(record["versions"])
    assert record["versions"]["jax"] != "not installed"
    assert record["hardware"]["cpu"]
    assert record["hardware"]["cpu_count"] >= 1
    assert record["hardware"]["platform"] == "cpu"


def test_numbers_that_json_lacks_become_null(tmp_path):
    metrics = {"topology": {"log_paths": -math.inf, "layers": [math.nan, 1]}}
    record = results.make_record(Config(), metrics, 1.0)
    assert record["metrics"] == {"topology": {"log_paths": None, "layers": [None, 1]}}
    results.append(tmp_path / "results.jsonl", record)
    assert results.read(tmp_path / "results.jsonl") == [record]


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path):
    path = tmp_path / "results.jsonl"
    whole = results.make_record(Config(), {}, 1.0)
    results.append(path, whole)
    with path.open("a") as file:
        file.write('{"config": {"seed": ')
    assert results.read(path) == [whole]
    results.append(path, whole)
    assert results.read(path) == [whole, whole]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"config": {}}\nnot json\n')
    with pytest.raises(ValueError, match=r"results.jsonl, line 2 is not JSON"):
        results.read(path)


def _append_many(path, worker):
    for count in range(40):
        results.append(path, {"worker": worker, "count": count, "padding": "x" * 20_000})


def test_processes_that_append_at_once_leave_whole_lines(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(path, worker)) for worker in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = sorted((record["worker"], record["count"]) for record in results.read(path))
    assert found == [(worker, count) for worker in range(2) for count in range(40)]


def test_a_job_is_found_by_its_whole_configuration(tmp_path):
    path = tmp_path / "results.jsonl"
    config = Config(seed=4)
    assert results.find(path, config) is None
    for seconds in (1.0, 2.0):
        results.append(path, results.make_record(config, {}, seconds))
    assert results.find(path, config)["seconds"] == 2.0
    for field, value in (("seed", 5), ("sparsity", 0.9), ("epochs", 7), ("method", "random")):
        assert results.find(path, dataclasses.replace(config, **{field: value})) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 0),
        ("epochs", 0),
        ("batch_size", -1),
        ("sparsity", 1.0),
        ("sparsity", -0.1),
        ("sparsity", math.nan),
        ("learning_rate", 0.0),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("warmup", 1.0),
    ],
)
def test_a_senseless_value_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"{field} must .* got {value}"):
        Config(**{field: value}).check()


def test_the_dense_method_has_no_sparsity():
    assert Config(method="dense", sparsity=0.9) == Config(method="dense", sparsity=0.0)


def test_jobs_that_differ_have_names_that_differ():
    configs = [
        Config(),
        Config(seed=1),
        Config(learning_rate=0.2),
        Config(method="random"),
        Config(sparsity=0.9),
    ]
    names = {config.name for config in configs}
    assert len(names) == len(configs)
    assert Config().name.startswith("digits-resnet20-dpai-0.99-seed0-")
