import pytest

import dpai_jax as dpai
from dpai_jax.tools.settings import described
from experiments import methods
from experiments.config import Config, ConfigError


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("dpai[alpha=0.9,beta=1]", dpai.DPaI(alpha=0.9, beta=1.0)),
        ("dpai-published[allocation=uniform]", dpai.DPaI.published(allocation=dpai.uniform)),
        (
            "dpai[normalize=False,counting=exact,steps=7]",
            dpai.DPaI(normalize=False, counting="exact", steps=7),
        ),
        ("random[allocation=er]", dpai.Random(dpai.er)),
        ("magnitude[allocation=erk]", dpai.Magnitude(dpai.erk)),
        ("snip-erk[allocation=global]", dpai.SNIP(dpai.global_threshold)),
        ("npb[alpha=1e-3,chunk=16]", dpai.NPB(alpha=0.001, chunk=16)),
        ("synflow[steps=3]", dpai.SynFlow(steps=3)),
    ],
)
def test_settings_in_brackets_are_those_of_the_method(name, method):
    assert described(methods.find(name).method) == described(method)


def test_what_surrounds_a_method_stays():
    plain, changed = methods.find("grasp"), methods.find("grasp[allocation=erk]")
    assert (changed.batches, changed.temperature) == (plain.batches, plain.temperature)
    assert changed.temperature == 200.0
    assert methods.find("ntk-sap[steps=2]").images == 64


@pytest.mark.parametrize("afterwards", methods.AFTERWARDS)
def test_settings_go_with_what_is_done_afterwards(afterwards):
    found = methods.find(f"dpai[beta=0]+{afterwards}")
    assert found.afterwards == afterwards
    assert found.method.beta == 0.0
    assert methods.find("dpai[beta=0]").afterwards == ""


def test_a_method_that_trains_has_settings_too():
    made = methods.find("imp[fraction=0.5,allocation=erk]").make(lambda variables, _: variables)
    assert (made.fraction, made.allocation) == (0.5, dpai.erk)
    records = [described(methods.find(f"imp[fraction={f}]")) for f in (0.5, 0.25)]
    assert records[0] != records[1]


def test_a_number_may_be_written_in_any_way():
    records = [described(methods.find(f"dpai[alpha={text}]")) for text in ("0", "0.0", ".0", "0e1")]
    assert all(record == records[0] for record in records)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magic[alpha=1]", r"method must be one of .*'dpai'.*; got 'magic\[alpha=1\]'\.$"),
        ("dpai+magic", r"method must be one of .*'\+repair', '\+shuffled'.*; got 'dpai\+magic'\.$"),
        ("dpai[alpha=0.1", r"method must be one of .*; got 'dpai\[alpha=0\.1'\.$"),
        ("dpai[]", r"method must be one of .*; got 'dpai\[\]'\.$"),
        ("dpai[alpha=0.1][beta=0]", r"method must be one of"),
        ("dpai[alpha= 0.1]", r"method must be one of"),
        ("dpai+repair[alpha=0.1]", r"method must be one of"),
        ("dpai\n", r"method must be one of"),
        # It would prune at random, under the name of what prunes nothing.
        ("dense+repair", r"not after dense\); got 'dense\+repair'\.$"),
        ("dense[allocation=erk]", r"not after dense\); got 'dense\[allocation=erk\]'\.$"),
        (
            "dpai[gama=2]",
            r"of \['allocation', 'alpha', 'balance', .*'strength'\]; got 'dpai\[gama=2\]'\.$",
        ),
        ("dpai[optimizer=1]", r"settings in a method's name must be name=value, each once, of"),
        ("dpai[scores=1]", r"settings in a method's name must be"),
        ("imp[train=1]", r"of \['allocation', 'fraction'\]; got 'imp\[train=1\]'\.$"),
        ("dpai[alpha=0.1,alpha=0.2]", r"each once"),
        ("dpai[alpha]", r"alpha must be a number; got '' in 'dpai\[alpha\]'\.$"),
        ("dpai[alpha=True]", r"alpha must be a number; got 'True'"),
        ("dpai[alpha=__import__('os')]", r"alpha must be a number; got \"__import__\('os'\)\""),
        ("dpai[steps=2.5]", r"steps must be a whole number; got '2\.5'"),
        ("dpai[normalize=0]", r"normalize must be True or False; got '0'"),
        ("dpai[allocation=ERK]", r"allocation must be one of \['er', 'erk', 'global', 'uniform'\]"),
        ("dpai[alpha=2]", r"'dpai\[alpha=2\]' can't be: alpha must be in \[0, 1\], got 2\.0"),
        ("dpai[counting=fast]", r"can't be: counting must be one of exact, mean_field"),
        ("imp[fraction=2]", r"can't be: fraction must be in \(0, 1\)"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_what_can_be_set(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        methods.find(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "row"}, r"granularity must be weight, kernel, .* got 'row'"),
        (
            {"granularity": "kernel", "method": "random+repair"},
            r"granularity can't go with \+repair",
        ),
    ],
)
def test_a_granularity_that_cannot_be_is_refused_before_a_job_starts(fields, message):
    with pytest.raises(ConfigError, match=message):
        methods.check_granularity(Config(**fields))
    methods.check_granularity(Config(granularity="2:4", sparsity=0.5))
