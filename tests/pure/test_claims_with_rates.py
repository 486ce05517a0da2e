"""`claims` about trials that also differ in a setting which each side has for itself."""

from typing import Any

from test_claims import ERRORS, TARGET, Study, of

from jepa_cluster.report import claims

RATE = "optim.lr"
RATES = {"representation": 0.003, "pixels": 0.006, "frozen": 0.006}


def with_rate(target: str) -> dict[str, Any]:
    return {TARGET: target, RATE: RATES[target]}


def test_a_setting_that_each_side_has_for_itself_is_part_of_the_claim() -> None:
    """As the best learning rate of each target. A claim that leaves it out compares nothing."""
    study = Study()
    for target, error in ERRORS.items():
        study.add(with_rate(target), error)
    sides = with_rate("representation"), with_rate("pixels")
    assert study.judge(*sides)[0].verdict == claims.HOLDS
    assert study.judge(of("representation"), of("pixels"))[0].verdict == claims.UNKNOWN
    study.add({TARGET: "pixels", RATE: 0.003}, 0.6)
    assert study.judge(*sides)[0].verdict == claims.HOLDS


def test_sizes_may_have_rates_of_their_own() -> None:
    study = Study()
    study.add({RATE: 0.01, "model": "m100000"}, 0.6, 1e5)
    study.add({RATE: 0.02, "model": "m200000"}, 0.5, 2e5)
    sides = [{"model": "m200000", RATE: 0.02}, {"model": "m100000", RATE: 0.01}]
    assert study.judge(*sides)[0].verdict == claims.HOLDS
