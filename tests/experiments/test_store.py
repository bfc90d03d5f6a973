"""The store of records: whole lines, whatever happens; and what a record is found by."""

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import optax
import pytest

import dpai_jax as dpai
from dpai_jax.tools.settings import described
from experiments import jobs, methods, provenance, store
from experiments.config import Config, ConfigError
from experiments.store import Store


@pytest.fixture
def records(tmp_path):
    return Store(tmp_path / "new" / "results.jsonl")


def test_records_come_back_as_they_were_written(records):
    first = records.append({"metrics": {"test_accuracy": 0.5, "history": [{"loss": 1.0}]}})
    second = records.append({"metrics": {"test_accuracy": 0.7, "history": []}})
    assert records.read() == [first, second]
    assert first["metrics"]["history"] == [{"loss": 1.0}]
    assert records.path.read_text().count("\n") == 2


def test_numbers_that_json_lacks_become_null(records):
    record = records.append({"log_paths": -math.inf, "layers": [math.nan, 1]})
    assert record == {"log_paths": None, "layers": [None, 1]}
    assert records.read() == [record]


def test_a_line_that_a_crash_cut_off_is_dropped(records):
    whole = records.append({"a": 1})
    with records.path.open("a") as file:
        file.write('{"config": {"seed": ')
    assert records.read() == [whole]
    records.append({"a": 1})
    assert records.read() == [whole, whole]


@pytest.mark.parametrize("line", [b"not json", b"[1, 2]", b'{"a": \xff}', b"", b"\0\0", b'{"a": '])
def test_a_damaged_line_is_named_and_left_out(records, caplog, line):
    first = records.append({"a": 1})
    with records.path.open("ab") as file:
        file.write(line + b"\n")
    last = Store(records.path).append({"a": 2})
    assert records.read() == [first, last]
    assert [record.getMessage() for record in caplog.records] == [
        f"{records.path}, line 2 is damaged and left out."
    ]
    assert records.find({"a": 1}) == first
    assert records.find({"a": 2}) == last


def test_records_that_other_processes_append_are_found(records):
    assert records.find({"a": 1}) is None
    other = Store(records.path)
    other.append({"a": 1, "b": 1})
    assert records.find({"a": 1}) == {"a": 1, "b": 1}
    with records.path.open("a") as file:
        file.write('{"a": 1, "b": ')
    assert records.find({"a": 1}) == {"a": 1, "b": 1}
    other.append({"a": 1, "b": 2})
    assert records.find({"a": 1}) == {"a": 1, "b": 2}
    assert records.find({"b": 1}) == {"a": 1, "b": 1}


def test_a_store_that_another_file_replaced_is_read_anew(records):
    for number in range(3):
        records.append({"a": number})
    assert records.find({"a": 2}) is not None
    records.path.write_text('{"a": 7}\n')
    assert records.find({"a": 2}) is None
    assert records.find({"a": 7}) == {"a": 7}
    records.path.unlink()
    assert records.find({"a": 7}) is None


def test_only_records_since_a_size_are_found(records):
    records.append({"a": 1})
    size = records.size()
    assert records.find({"a": 1}) is not None
    assert records.find({"a": 1}, since=size) is None
    records.append({"a": 1, "b": 2})
    assert records.find({"a": 1}, since=size) == {"a": 1, "b": 2}


def test_each_line_is_parsed_once_however_many_records_are_asked_for(records, monkeypatch):
    for number in range(50):
        records.append({"a": number})
    parsed = []
    parse = store._record

    def counting(line):
        parsed.append(line)
        return parse(line)

    monkeypatch.setattr(store, "_record", counting)
    assert [records.find({"a": number}) for number in range(60)] == [
        *({"a": number} for number in range(50)),
        *[None] * 10,
    ]
    assert len(parsed) == 50


def test_a_record_that_the_disk_has_no_room_for_leaves_the_others_whole(records, monkeypatch):
    whole = records.append({"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            records.append({"a": 2})
    assert records.read() == [whole]
    assert records.append({"a": 3}) == {"a": 3}
    assert records.read() == [whole, {"a": 3}]


def test_a_lock_is_one_process_s_and_goes_with_it(tmp_path):
    path = tmp_path / "new" / "job.lock"
    code = (
        "import pathlib, sys, time; from experiments.store import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), ''): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="someone else"), store.locked(path, "someone else"):
            pass
        other.kill()
        other.wait()
        with store.locked(path, "someone else"):
            pass


def _append_many(path, worker):
    for count in range(40):
        Store(path).append({"worker": worker, "count": count, "padding": "x" * 20_000})


def test_processes_that_append_at_once_leave_whole_lines(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(path, worker)) for worker in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = sorted((record["worker"], record["count"]) for record in Store(path).read())
    assert found == [(worker, count) for worker in range(2) for count in range(40)]


def test_a_job_is_found_by_its_whole_configuration(records):
    config = Config(seed=4)
    assert records.find(jobs.description(config)) is None
    for seconds in (1.0, 2.0):
        records.append(jobs.description(config) | {"metrics": {"seconds": seconds}})
    assert records.find(jobs.description(config))["metrics"]["seconds"] == 2.0
    for field, value in (("seed", 5), ("sparsity", 0.9), ("epochs", 7), ("method", "random")):
        other = dataclasses.replace(config, **{field: value})
        assert records.find(jobs.description(other)) is None


def test_a_job_is_found_by_the_settings_of_its_method_and_by_the_code(records, monkeypatch):
    config = Config(method="dpai")
    records.append(jobs.description(config))
    with monkeypatch.context() as patch:
        patch.setitem(methods.METHODS, "dpai", methods.Pruning(dpai.DPaI(alpha=0.5)))
        assert records.find(jobs.description(config)) is None
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "code", lambda: "other")
        assert records.find(jobs.description(config)) is None
    assert records.find(jobs.description(config)) is not None


def test_settings_are_described_by_what_they_do():
    def with_rate(rate):
        return dpai.DPaI(optimizer=optax.adam(rate))

    assert described(with_rate(0.1)) == described(with_rate(0.1))
    assert described(with_rate(0.1)) != described(with_rate(0.2))
    assert described(dpai.DPaI()) != described(dpai.DPaI.published())
    assert described(dpai.SNIP(dpai.erk)) != described(dpai.SNIP(dpai.er))
    assert described(optax.cosine_decay_schedule(1.0, 5)) != described(
        optax.cosine_decay_schedule(1.0, 6)
    )
    scores = {"w": [1.0, 2.0]}
    assert described(scores) != described({"w": [1.0, 3.0]})
    every = [described(methods.find(name)) for name in methods.METHODS]
    assert all(json.loads(json.dumps(one, allow_nan=False)) == one for one in every)
    # A dense network is pruned by the random method at sparsity 0.
    assert len({json.dumps(one) for one in every}) == len(every) - 1


def hash_of(code, folder, monkeypatch):
    folder.mkdir(exist_ok=True)
    (folder / "module.py").write_text(code)
    monkeypatch.setattr(provenance, "_COMPUTING", (folder,))
    provenance.code.cache_clear()
    try:
        return provenance.code()
    finally:
        provenance.code.cache_clear()


def test_the_hash_of_the_code_is_that_of_what_it_does(tmp_path, monkeypatch):
    plain = hash_of("def f(x):\n    return x + 1\n", tmp_path, monkeypatch)
    spoken = '"""A module."""\ndef f(x):  # adds\n    """Adds one."""\n    return (x + 1)\n'
    assert hash_of(spoken, tmp_path, monkeypatch) == plain
    assert hash_of("def f(x):\n    return x + 2\n", tmp_path, monkeypatch) != plain


def test_a_record_tells_commit_versions_and_hardware():
    origin = provenance.origin()
    assert {"python", "jax", "flax", "numpy"} <= set(origin["versions"])
    assert origin["versions"]["jax"] != "not installed"
    assert origin["hardware"]["cpu"]
    assert origin["hardware"]["cpu_count"] >= 1
    assert origin["hardware"]["platform"] == "cpu"
    assert origin["commit"] == "unknown" or len(origin["commit"].rstrip("+")) == 40


def test_a_record_tells_how_many_cores_the_process_may_use(monkeypatch):
    for allowed in ({0}, {0, 1, 5}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, own=allowed: own, raising=False)
        assert provenance.hardware()["cpu_count"] == len(allowed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 0),
        ("seed", -1),
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


def test_records_stand_on_the_lines_that_a_reader_counts(records):
    first = records.append({"job": 1})
    with records.path.open("a") as file:
        file.write("torn\n")
    last = records.append({"job": 2})
    assert records.by_line() == {1: first, 3: last}
    assert records.read() == [first, last]
