"""Sweeps: what their jobs are, and that each runs once, whatever happens to the processes."""

import collections
import io
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import rich.console

from experiments import board, jobs, train
from experiments.__main__ import main
from experiments.config import Config, ConfigError
from experiments.processes import join
from experiments.store import Store
from experiments.sweep import Sweep, configs
from tests.support import stand_in

ROOT = Path(__file__).parents[2]
ACCURACIES = ("validation_accuracy", "test_accuracy")
RECIPE = """
from experiments.config import Config
from experiments.sweep import Sweep

def sweep(scale):
    base = Config(epochs=5 if scale == "full" else 2)
    return [
        Sweep(base, ("random", "snip"), (0.5, 0.9), seeds=2),
        Sweep(Config(model="lenet", epochs=5), ("dpai",), (0.9,), seeds=2),
    ]
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def forks():
    """Starts processes that have imported all already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.stand_in"])
    running = []

    def start(arguments, output):
        process = context.Process(target=stand_in.sweep, args=(arguments, str(output)))
        process.start()
        running.append(process)
        deadline = time.monotonic() + 60
        while not Path(f"{output}.begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return process

    yield start
    for process in running:
        process.kill()
        process.join()


def names(records):
    return sorted(Config.of(record["config"]).name for record in records)


def begun(folder):
    log = folder / "checkpoints" / "begun.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for_a_job_of(process, folder):
    deadline = time.monotonic() + 60
    while process.pid not in {run["process"] for run in begun(folder)}:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_recipe_file_gives_the_jobs_of_its_sweeps(recipe):
    todo = configs([recipe], "full")
    assert len(todo) == len(set(todo)) == 2 * (1 + 4) + 2 * (1 + 1)
    assert {config.model for config in todo} == {"resnet20", "lenet"}
    assert {config.epochs for config in todo} == {5}
    assert {config.epochs for config in configs([recipe], "small")} == {2, 5}
    both = configs([recipe, "digits_resnet20"], "full")
    assert both == todo + configs(["digits_resnet20"], "full")


def test_what_is_given_replaces_the_recipe_s_own(recipe):
    todo = configs([recipe], "full", methods=("force",), sparsities=(0.7,), seeds=1, epochs=9)
    assert {(c.method, c.sparsity, c.seed, c.epochs) for c in todo} == {
        ("dense", 0.0, 0, 9),
        ("force", 0.7, 0, 9),
    }


def test_with_other_epochs_the_learning_rate_falls_at_the_same_fractions_of_them():
    full = Sweep(Config(epochs=160, drops=(80, 120)), ("snip",), (0.9,))
    assert full.changed(epochs=20).base.drops == (10, 15)
    assert full.changed(seeds=1).base.drops == (80, 120)


@pytest.mark.parametrize("content", [None, "x = 1"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content):
    path = tmp_path / "other.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"recipe .*other\.py"):
        configs([str(path)], "full")


def test_after_twenty_kills_all_records_are_there_once_and_as_if_nothing_had_happened(
    forks, recipe, tmp_path
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = forks([recipe, "--folder", str(whole)], tmp_path / "whole.out")
    process.join(60)
    assert process.exitcode == 0

    moments = random.Random(0)
    left = []
    for count in range(20):
        process = forks([recipe, "--folder", str(killed)], tmp_path / f"{count}.out")
        if count % 2:  # else while it sets up
            wait_for_a_job_of(process, killed)
        time.sleep(moments.uniform(0.0, 0.12))
        process.kill()
        process.join()
        assert process.exitcode == -9
        left.append(len(Store(killed / "results.jsonl").read()))
    assert 0 < left[-1] < 14, "the kills came before or after all the work"

    process = forks([recipe, "--folder", str(killed)], tmp_path / "last.out")
    process.join(60)
    assert process.exitcode == 0
    expected, found = (Store(folder / "results.jsonl").read() for folder in (whole, killed))
    assert len(expected) == 14

    def by_name(record):
        return Config.of(record["config"]).name

    assert sorted(found, key=by_name) == sorted(expected, key=by_name)
    printed = (tmp_path / "last.out").read_text().splitlines()
    assert [json.loads(line) for line in printed] == expected


def test_two_processes_share_the_jobs_and_both_end_with_all_records(forks, recipe, tmp_path):
    arguments = [recipe, "--folder", str(tmp_path / "runs")]
    processes = [forks(arguments, tmp_path / f"{count}.out") for count in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    runs = begun(tmp_path / "runs")
    assert len(runs) == len({run["job"] for run in runs}) == 14
    shares = collections.Counter(run["process"] for run in runs)
    assert len(shares) == 2
    assert min(shares.values()) >= 4
    records = Store(tmp_path / "runs" / "results.jsonl").read()
    assert len(records) == 14
    for count in range(2):
        printed = [json.loads(x) for x in (tmp_path / f"{count}.out").read_text().splitlines()]
        assert names(printed) == names(records)


def test_a_process_takes_over_the_job_of_one_that_died(forks, recipe, tmp_path):
    arguments = [recipe, "--folder", str(tmp_path / "runs")]
    doomed, other = (forks(arguments, tmp_path / f"{count}.out") for count in range(2))
    wait_for_a_job_of(doomed, tmp_path / "runs")
    doomed.kill()
    other.join(60)
    assert other.exitcode == 0
    assert len(names(Store(tmp_path / "runs" / "results.jsonl").read())) == 14
    assert len(set(names(Store(tmp_path / "runs" / "results.jsonl").read()))) == 14


@pytest.fixture
def training(monkeypatch):
    """Makes training instant; a job whose method has an error raises it."""
    calls, errors = [], {}

    def train_and_evaluate(config, *_, report, **__):
        calls.append(config)
        report("train", config.epochs, config.epochs, dict.fromkeys(ACCURACIES, 0.5))
        if config.method in errors:
            raise errors[config.method]
        layers = [{"name": "head/kernel", "nodes": 5, "outputs": 10}]
        topology = {"log_paths": 9.0, "nodes": 5, "kernels": 7, "weights": 11, "layers": layers}
        metrics = {"test_accuracy": 0.5, "prune_seconds": 0.1, "seconds": 1.0, "diverged": None}
        return metrics | {"topology": topology, "best_test_accuracy": 0.5}

    monkeypatch.setattr(train, "train_and_evaluate", train_and_evaluate)
    return calls, errors


def test_a_job_that_fails_is_reported_at_the_end_and_tried_again(training, tmp_path, capsys):
    calls, errors = training
    errors |= {
        "snip": ConfigError("too small"),
        "force": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory\nmuch more"),
        "grasp": MemoryError(),
        "npb": TypeError("got a tracer"),
    }
    command = ["sweep", "digits_resnet20"]
    command += ["--methods", "snip", "force", "random", "grasp", "npb", "dpai"]
    command += ["--sparsities", "0.9", "--seeds", "1", "--folder", str(tmp_path)]
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code.startswith("error: 4 of 7 jobs failed; ")
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "failed: snip 90%, seed 0, resnet20 on digits: too small",
        "failed: force 90%, seed 0, resnet20 on digits: RESOURCE_EXHAUSTED: no memory",
        "failed: grasp 90%, seed 0, resnet20 on digits: MemoryError",
        "failed: npb 90%, seed 0, resnet20 on digits: TypeError: got a tracer",
    ]
    records = Store(tmp_path / "results.jsonl").read()
    assert [r["config"]["method"] for r in records] == ["dense", "random", "dpai"]

    calls.clear()
    errors.clear()
    main(command)
    assert [config.method for config in calls] == ["snip", "force", "grasp", "npb"]
    assert "3 of 7 jobs finished before" in capsys.readouterr().out


def test_an_interruption_ends_a_sweep(training, tmp_path):
    calls, errors = training
    errors["random"] = KeyboardInterrupt()
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "digits_resnet20", "--methods", "random", "--folder", str(tmp_path)])
    assert caught.value.code == 130
    assert [config.method for config in calls] == ["dense", "random"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "snip", "snipe"], "got 'snipe'"),
        (["--methods", "snip+repaired"], "got 'snip+repaired'"),
        (["--sparsities", "0.9", "1.5"], "got 1.5"),
        (["--dataset", "mnits"], "got 'mnits'"),
        (["--epochs", "0"], "got 0"),
    ],
)
def test_what_cannot_be_right_is_refused_before_the_first_job(
    training, tmp_path, arguments, message
):
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "digits_resnet20", *arguments, "--folder", str(tmp_path)])
    assert message in caught.value.code
    assert "\n" not in caught.value.code
    assert not training[0]


def test_again_runs_each_job_once_more_and_forgets_its_checkpoint(training, tmp_path):
    calls, _ = training
    command = ["sweep", "digits_resnet20", "--methods", "snip", "--sparsities", "0.9"]
    command += ["--seeds", "1", "--folder", str(tmp_path)]
    main(command)
    checkpoint = tmp_path / "checkpoints" / calls[0].name
    checkpoint.mkdir(parents=True)
    main([*command, "--again"])
    assert len(calls) == 4
    assert calls[:2] == calls[2:]
    assert not checkpoint.exists()


def test_machines_without_a_common_folder_share_the_jobs_out_by_number(training, tmp_path):
    calls, _ = training
    command = ["sweep", "digits_resnet20", "--methods", "snip", "dpai", "--processes", "3"]
    shares = []
    for process in range(3):
        calls.clear()
        main([*command, "--process", str(process), "--folder", str(tmp_path / str(process))])
        shares.append(set(calls))
    assert [len(share) for share in shares] == [5, 5, 5]
    assert set.union(*shares) == set(configs(["digits_resnet20"], "full", methods=("snip", "dpai")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("jobs", 3, None), "processes and process need each other"),
        (("jobs", None, 1), "processes and process need each other"),
        (("jobs", 3, 3), r"process must lie in \[0, 3\); got 3"),
        (("jobs", 3, 0, "host:1"), "coordinator needs share batch"),
        (("batch",), "share batch needs a cluster"),
    ],
)
def test_processes_that_cannot_find_each_other_are_refused(monkeypatch, arguments, message):
    def initialize(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ConfigError, match=message):
        join([Config()], *arguments)


def test_records_for_machines_are_all_that_standard_output_holds(training, tmp_path, capsys):
    command = ["sweep", "digits_resnet20", "--methods", "snip", "--sparsities", "0.9"]
    main([*command, "--seeds", "1", "--folder", str(tmp_path), "--json"])
    shown = capsys.readouterr()
    records = Store(tmp_path / "results.jsonl").read()
    assert [json.loads(line) for line in shown.out.splitlines()] == records
    assert "2/2 snip 90%" in shown.err


def lines(todo, known, tell):
    console = rich.console.Console(file=io.StringIO(), width=200)
    with board.Board(console, todo, known) as shown:
        tell(shown)
    return console.file.getvalue().splitlines()


def test_a_log_holds_a_line_for_each_job_and_the_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: now[0])
    todo = [Config(seed=seed, epochs=10) for seed in range(4)]
    metrics = {"validation_accuracy": 0.25, "test_accuracy": 0.5}

    def tell(shown):
        for config in todo[1:3]:
            report = shown.report(config)
            report("start", 0, 10, {})
            report("train", 0, 10, {})
            for epoch in range(1, 11):
                now[0] += 5.0
                report("train", epoch, 10, metrics)
        shown.failed(todo[3], "too small")

    assert lines(todo, {todo[0]}, tell) == [
        "1 of 4 jobs finished before.",
        "   50 s  2/4 dpai 99%, seed 1: epoch 10/10, validation 25.0%, test 50.0%, 2 min left",
        "  100 s  3/4 dpai 99%, seed 2: epoch 10/10, validation 25.0%, test 50.0%, 50 s left",
        "  100 s  4/4 dpai 99%, seed 3: failed: too small",
    ]


def test_the_time_left_is_that_of_all_processes_and_of_jobs_of_any_length(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: now[0])
    # The second one is run by another process; a job takes 50 s, whatever its epochs.
    todo = [Config(seed=seed, epochs=epochs) for seed, epochs in enumerate((1, 1, 20, 20))]
    metrics = {"validation_accuracy": 0.25, "test_accuracy": 0.5}

    def tell(shown):
        for number in (0, 2):
            now[0] += 50.0
            epochs = todo[number].epochs
            shown.report(todo[number])("train", epochs, epochs, metrics)
            shown.elsewhere(todo[1])

    first, second = lines(todo, (), tell)
    assert first.endswith("2 min left")  # 3 jobs at 50 s each
    assert second.endswith(", 33 s left")  # a job, where three took 100 s


def test_a_long_job_writes_a_line_a_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: now[0])

    def tell(shown):
        report = shown.report(Config(epochs=100))
        for epoch in range(1, 101):
            now[0] += 20.0
            report("train", epoch, 100, {"validation_accuracy": 0.25, "test_accuracy": 0.5})

    written = lines([Config(epochs=100)], (), tell)
    assert 30 <= len(written) <= 35
    assert "epoch 3/100, validation 25.0%, 32 min left" in written[0]


@pytest.mark.standard_promotion
def test_two_processes_train_each_job_together(tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        RECIPE.replace(
            "return [",
            "return Sweep(Config(model='lenet', width=2, epochs=1, "
            "batch_size=256), ('random',), (0.5,), seeds=1)\n    [",
        )
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments", "sweep", str(recipe), "--json"]
    command += ["--folder", str(tmp_path / "runs")]
    together = ["--share", "batch", "--coordinator", f"localhost:{port}", "--processes", "2"]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    children = [
        subprocess.Popen(
            [*command, *together, "--process", str(process)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    outputs = []
    try:
        for child in children:
            output, errors = child.communicate(timeout=120)
            assert child.returncode == 0, errors
            outputs.append(output)
    finally:
        for child in children:
            child.kill()
            child.wait()
    records = Store(tmp_path / "runs" / "results.jsonl").read()
    assert [json.loads(line) for line in outputs[0].splitlines()] == records
    assert outputs[1] == ""
    assert [record["hardware"]["device_count"] for record in records] == [2, 2]
    for record in records:
        alone = jobs.run(Config.of(record["config"]), tmp_path / "alone")["metrics"]
        assert record["metrics"]["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-3)
