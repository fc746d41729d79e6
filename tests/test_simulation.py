"""The daemon in some hundred simulated worlds, and defects that they must catch; tests/simulate.py runs more."""

from __future__ import annotations

import pytest
from simulate import describe, first_caught
from simulation.plants import PLANTS
from simulation.simulation import Simulation

SEEDS = 300
AT_ONCE = 20
PLANT_SEEDS = 150


@pytest.mark.parametrize("first", range(0, SEEDS, AT_ONCE))
def test_what_is_shown_is_what_the_clusters_say(first: int) -> None:
    outcomes = [Simulation(seed).run() for seed in range(first, first + AT_ONCE)]
    assert not [describe(outcome) for outcome in outcomes if outcome.problem]


def test_a_seed_is_one_world() -> None:
    told: list[list[str]] = [[], []]
    for lines in told:
        Simulation(11, lines.append).run()
    assert told[0] == told[1]
    assert len(told[0]) > 50


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_defect_is_caught(plant: str) -> None:
    assert first_caught(plant, 0, PLANT_SEEDS) is not None
