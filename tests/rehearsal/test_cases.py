"""The list of cases: every pair of values that may occur together is in one, and the project's own rules agree."""

from __future__ import annotations

import pytest

from megatron_lite.config.validate import validate
from megatron_lite.errors import ConfigError
from tests.rehearsal import budget
from tests.rehearsal.cases import AXES, config_of, missing_pairs, read_cases
from tests.rehearsal.layers import LAYERS

CASES = read_cases()


def test_every_pair_of_values_occurs() -> None:
    assert len(CASES) >= 48
    missing = missing_pairs(list(CASES.values()))
    assert not missing, f"python -m tests.rehearsal.cases adds cases for {sorted(map(sorted, missing))}"


def test_the_table_has_a_row_for_each_case_and_layer() -> None:
    table = budget.read()
    assert set(table["cases"]) == set(CASES)
    assert set(table["layers"]) == set(LAYERS)


@pytest.mark.parametrize("name", CASES)
def test_each_case_is_a_run_that_users_can_start(name: str) -> None:
    config = config_of(CASES[name])
    validate(config, config.topology.world_size)


@pytest.mark.parametrize(
    "pair",
    [
        {"zero": "2", "stage": "first"},
        {"zero": "3", "stage": "last"},
        {"zero": "0", "precision": "bf16"},
        {"zero": "0", "precision": "fp16"},
        {"zero": "0", "offload": "yes"},
        {"zero": "1", "optimizer": "adafactor"},
        {"zero": "3", "optimizer": "adafactor"},
        {"family": "bert", "objective": "causal_lm"},
    ],
    ids=lambda pair: "-".join(pair.values()),
)
def test_pairs_that_no_case_has_are_refused_in_a_run(pair: dict[str, str]) -> None:
    usual = {axis: values[0] for axis, values in AXES.items()} | {"zero": "1"}
    config = config_of(usual | pair)
    with pytest.raises(ConfigError):
        validate(config, config.topology.world_size)
