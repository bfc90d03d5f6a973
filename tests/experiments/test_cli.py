import json
import os
import subprocess
import sys

import matplotlib.image
import pytest

from experiments import demo, jobs, train
from experiments.__main__ import main
from experiments.config import Config, ConfigError
from experiments.methods import METHODS
from experiments.store import Store

# Optax's schedules promote their integer step count.
pytestmark = pytest.mark.standard_promotion

TINY = ["--model", "tiny", "--width", "2", "--epochs", "1"]


def test_help_names_the_commands_without_importing_jax():
    code = (
        "import sys; from experiments.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: print('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "train" in done.stdout
    assert "demo" in done.stdout
    assert done.stdout.endswith("False\n")


def test_the_module_runs_and_documents_each_option():
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "train", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    for option in ("--dataset", "--model", "--method", "--sparsity", "--seed", "--folder"):
        assert option in done.stdout


def test_a_command_keeps_what_it_compiles_in_the_users_cache_folder(tmp_path):
    code = "from experiments.__main__ import keep_compiled; keep_compiled()\n"
    code += "import jax.numpy as jnp; jnp.arange(3) + 1; print('done')"
    (tmp_path / "file").touch()
    for name, said in (("cache", ""), ("file", "Compiled programs are not kept")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / name)},
            timeout=60,
        )
        assert done.stdout == "done\n"
        assert done.stderr.startswith(said)
    assert any((tmp_path / "cache" / "dpai_jax" / "compiled").iterdir())


def test_train_prints_a_table_and_appends_one_line(tmp_path, capsys):
    command = ["train", *TINY, "--method", "random", "--sparsity", "0.5"]
    command += ["--folder", str(tmp_path)]
    main(command)
    shown = capsys.readouterr().out
    (record,) = Store(tmp_path / "results.jsonl").read()
    assert record["config"]["sparsity"] == 0.5
    assert f"{record['metrics']['test_accuracy'] * 100:.1f}" in shown
    assert "results.jsonl" in shown

    main(command)
    assert "finished before" in capsys.readouterr().out
    assert Store(tmp_path / "results.jsonl").read() == [record]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataset", "mnits"],
            (
                "error: dataset must be one of ['cifar10', 'cifar100', 'digits', 'fashion_mnist', "
                "'imagenet', 'mnist', 'tiny_imagenet'], npz:FILE, idx:FOLDER or text:FILE; "
                "got 'mnits'."
            ),
        ),
        (["--sparsity", "2"], "error: sparsity must lie in [0, 1); got 2.0."),
        (["--seed", "-1"], "error: seed must lie in [0, 2**32); got -1."),
        (
            [*TINY, "--sparsity", "0.99999"],
            "error: tiny can't be pruned: sparsity 0.99999 keeps 0 of 250 weights",
        ),
    ],
)
def test_a_bad_value_ends_with_one_line(tmp_path, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(["train", *arguments, "--folder", str(tmp_path)])
    assert caught.value.code.startswith(message)
    assert "\n" not in caught.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--seeds", "0"], "error: seeds must be at least 1; got 0."),
        (["sweep", "digits_resnet20", "--seeds", "-2"], "error: seeds must be at least 1; got -2."),
        (
            ["sweep", "digits_resnet20", "--sparsities"],
            "error: sparsities must name at least one; got none.",
        ),
        (
            ["sweep", "digits_resnet20", "--methods"],
            "error: methods must name at least one; got none.",
        ),
        (["sweep"], "error: recipes must name at least one; got none."),
    ],
)
def test_a_comparison_of_nothing_is_refused(tmp_path, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--folder", str(tmp_path)])
    assert caught.value.code == message
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_ends_with_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        main(["train", *TINY, "--folder", str(tmp_path / "file" / "runs")])
    assert caught.value.code.startswith("error: ")
    assert "Not a directory" in caught.value.code
    assert "\n" not in caught.value.code


def test_a_job_that_another_process_runs_is_refused(monkeypatch, tmp_path):
    def start_it_again(config, *_, **__):
        with pytest.raises(
            ConfigError, match=r"another process is running dpai 99%, seed 3, .* in "
        ):
            jobs.run(config, tmp_path)
        return {"test_accuracy": 0.5}

    monkeypatch.setattr(train, "train_and_evaluate", start_it_again)
    jobs.run(Config(seed=3), tmp_path)
    jobs.run(Config(seed=3), tmp_path)


def _instead_of_training(monkeypatch, calls):
    """Makes training instant, keeping what a job hands out and gets back."""

    def train_and_evaluate(config, *_, **__):
        calls.append(config)
        layers = [{"name": "head/kernel", "nodes": 5, "outputs": 10}]
        topology = {"log_paths": 9.0, "nodes": 5, "kernels": 7, "weights": 11, "layers": layers}
        metrics = {"test_accuracy": 0.5, "prune_seconds": 0.1, "seconds": 1.0, "diverged": None}
        return metrics | {"topology": topology, "best_test_accuracy": 0.5}

    monkeypatch.setattr(train, "train_and_evaluate", train_and_evaluate)


def test_a_job_run_again_forgets_its_checkpoint(monkeypatch, tmp_path):
    calls = []
    _instead_of_training(monkeypatch, calls)
    config = Config()
    jobs.run(config, tmp_path)
    checkpoint = tmp_path / "checkpoints" / config.name
    checkpoint.mkdir(parents=True)
    jobs.run(config, tmp_path)
    assert len(calls) == 1
    jobs.run(config, tmp_path, again=True)
    assert len(calls) == 2
    assert not checkpoint.exists()
    assert len(Store(tmp_path / "results.jsonl").read()) == 2


def test_the_demo_compares_dense_random_and_dpai_at_two_sparsities():
    pairs = {(config.method, config.sparsity) for config in demo.configs(seeds=1)}
    pruned = {(method, sparsity) for method in ("random", "dpai") for sparsity in (0.9, 0.99)}
    assert pairs == {("dense", 0.0)} | pruned
    assert len(demo.configs(seeds=3)) == 15


def test_an_interrupted_demo_goes_on_with_the_jobs_that_are_left(monkeypatch, tmp_path, capsys):
    calls = []
    _instead_of_training(monkeypatch, calls)
    for config in demo.configs(seeds=1)[:2]:
        jobs.run(config, tmp_path)
    calls.clear()
    main(["demo", "--folder", str(tmp_path)])
    assert calls == demo.configs(seeds=1)[2:]
    shown = capsys.readouterr().out
    assert "2 of 5 jobs finished before" in shown
    assert "-m experiments train --dataset digits" in shown
    assert matplotlib.image.imread(tmp_path / "demo.png").shape[2] == 4
    assert len(Store(tmp_path / "results.jsonl").read()) == 5


def test_an_interruption_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_and_evaluate", interrupt)
    with pytest.raises(SystemExit) as caught:
        main(["train", "--folder", str(tmp_path)])
    assert caught.value.code == 130
    assert "goes on from here" in capsys.readouterr().err
    assert Store(tmp_path / "results.jsonl").read() == []


def test_sweep_runs_every_method_at_every_sparsity_for_every_seed(monkeypatch, tmp_path, capsys):
    calls = []
    _instead_of_training(monkeypatch, calls)
    command = ["sweep", "digits_resnet20", "--methods", "snip", "synflow+repair"]
    command += ["--sparsities", "0.9", "0.99", "--seeds", "2", "--epochs", "3"]
    command += ["--folder", str(tmp_path)]
    main(command)
    pruned = {(m, s) for m in ("snip", "synflow+repair") for s in (0.9, 0.99)}
    expected = {(m, s, seed) for seed in (0, 1) for m, s in {("dense", 0.0)} | pruned}
    assert {(c.method, c.sparsity, c.seed) for c in calls} == expected
    assert len(calls) == len(expected)
    assert {c.epochs for c in calls} == {3}
    shown = capsys.readouterr().out
    assert "synflow+repair" in shown
    assert "50.0 ± 0.0" in shown
    main(command)
    assert len(calls) == len(expected)


def test_all_methods_can_be_compared(monkeypatch, tmp_path):
    calls = []
    _instead_of_training(monkeypatch, calls)
    command = ["sweep", "digits_resnet20", "--methods", "all", "--seeds", "1"]
    main([*command, "--folder", str(tmp_path)])
    assert {config.method for config in calls} == set(METHODS)


@pytest.mark.parametrize("command", ["train", "sweep", "report", "demo", "bench", "documents"])
def test_the_help_of_each_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"Example: python -m experiments {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["train", "--sparsty", "0.9"], "--sparsty"),
        (["train", "--sparsity", "many"], "'many'"),
        (["sweep", "digits_resnet20", "--scale", "huge"], "huge"),
        (["trian"], "trian"),
        ([], "train"),
    ],
)
def test_a_wrong_command_line_ends_with_one_line(arguments, what, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert what in shown.err


def test_train_prints_its_record_for_machines(tmp_path, capfd):
    command = ["train", *TINY, "--method", "random", "--sparsity", "0.5", "--json"]
    main([*command, "--folder", str(tmp_path)])
    (line,) = capfd.readouterr().out.splitlines()
    assert [json.loads(line)] == Store(tmp_path / "results.jsonl").read()
