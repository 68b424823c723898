"""A seeded share of tests/chaos.py, which tries as many strikes as there is time for."""

import random
import shutil

import chaos
import pytest
import ranks


def test_what_is_struck_follows_from_the_seed_and_is_something_that_can_be_struck():
    drawn = [chaos.drawn(random.Random(7), ranks.SCRIPTS) for _ in range(2)]
    assert drawn[0] == drawn[1]
    rng = random.Random(7)
    many = [chaos.drawn(rng, ranks.SCRIPTS) for _ in range(500)]
    assert {strike["kind"] for strike in many} == {*chaos.KINDS}
    assert {strike["place"] for strike in many} == {"time", *chaos.PLACES}
    assert {strike["script"] for strike in many} == {*ranks.SCRIPTS}
    assert all(strike["rank"] < strike["size"] for strike in many)
    assert all(len(chaos.flags_of(strike)) == 1 for strike in many)


@pytest.mark.slow
def test_a_few_strikes_end_in_the_weights_of_a_run_left_alone():
    done = list(chaos.strikes(600, 3, ["gpt_scratch"], most=3))
    assert len(done) == 3 and [failure for _, _, failure in done if failure] == []
    shutil.rmtree("out")
