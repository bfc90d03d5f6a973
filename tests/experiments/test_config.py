import dataclasses
import json

import pytest

from dpai_jax.paths import interpreter
from experiments.config import GATES, Config, ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "adam"}, r"optimizer must be one of \('sgd', 'adamw'\); got 'adam'."),
        ({"augmentation": "flip"}, r"augmentation must be one of \('none', .*\); got 'flip'."),
        ({"dtype": "float16"}, r"dtype must be one of .*; got 'float16'."),
        ({"train_images": 0}, r"train_images must be at least 1; got 0."),
        ({"image_size": -1}, r"image_size must be at least 1; got -1."),
        ({"drops": (0,)}, r"drops must rise and lie in \[1, 30\), the epochs; got \(0,\)."),
        ({"drops": (30,)}, r"drops must rise and lie in \[1, 30\)"),
        ({"drops": (20, 10)}, r"drops must rise .*; got \(20, 10\)."),
        ({"gates": "open"}, r"gates must be one of \('balanced', .*\); got 'open'."),
        ({"drops": (20, 20)}, r"drops must rise .*; got \(20, 20\)."),
        ({"drops": (2, 20)}, r"drops must come after the warm-up, which takes 3 epochs; got"),
        ({"learning_rate": float("inf")}, r"learning_rate must be positive and finite; got inf."),
        ({"learning_rate": float("nan")}, r"learning_rate must be positive and finite; got nan."),
        ({"weight_decay": float("nan")}, r"weight_decay must be finite .*; got nan."),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        Config(**fields).check()


@pytest.mark.parametrize(
    ("setting", "label"),
    [
        ({"granularity": "channel"}, "dpai 90% by channel"),
        ({"gates": "signal"}, "dpai 90% with gates signal"),
    ],
)
def test_a_dense_network_has_no_settings_of_its_masks_and_others_say_theirs(setting, label):
    assert Config(method="dense", **setting) == Config(method="dense")
    assert Config(method="dpai", sparsity=0.9, **setting).label == label


def test_gates_are_the_librarys():
    assert set(GATES) == set(interpreter.GATES)


def test_the_papers_settings_are_accepted():
    Config(epochs=160, drops=(80, 120), warmup=0.0, augmentation="crop-flip").check()
    Config(optimizer="adamw", image_size=224, train_images=100, epochs=1).check()


def test_a_configuration_survives_json():
    config = Config(drops=(3, 5), train_images=7)
    assert Config.of(json.loads(json.dumps(config.as_dict()))) == config


def test_a_name_is_one_file_name_and_tells_all_configurations_apart():
    long = Config(dataset="npz:/some/folder/" + "x" * 300 + ".npz", method="dpai[alpha=0.9]")
    configs = [long, dataclasses.replace(long, method="dpai[alpha=0.8]"), Config()]
    names = [config.name for config in configs]
    assert len(set(names)) == 3
    assert all(len(name) < 200 and not set(name) & set("/[]:,") for name in names)
