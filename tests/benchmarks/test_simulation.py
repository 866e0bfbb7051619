"""The simulation of the scheduler, against what can be said without it."""

from __future__ import annotations

import pytest

from benchmarks.simulation import DriverCosts, Simulation, Trouble, Unit

UNITS = [Unit(facts=10, mean_s=10.0)] * 100
TROUBLE = Trouble(lives_s=300.0, restart_s=20.0, stragglers=0.05)


def test_without_trouble_nobody_waits() -> None:
    run = Simulation(UNITS, workers=4).run()
    assert run.done == 100 and run.efficiency == pytest.approx(1.0)
    assert (run.deaths, run.retried, run.copied, run.twice, run.given_up) == (0, 0, 0, 0, 0)


def test_trouble_costs_time_and_loses_no_unit() -> None:
    run = Simulation(UNITS, workers=4, spread=0.2, trouble=TROUBLE, seed=1).run()
    assert run.done + run.given_up == 100
    assert run.deaths > 0 and run.efficiency < 0.95


def test_equal_seeds_give_equal_runs() -> None:
    runs = [
        Simulation(UNITS, workers=4, spread=0.2, trouble=TROUBLE, seed=seed).run()
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_a_driver_that_is_always_busy_sets_the_pace() -> None:
    costs = DriverCosts(event_s=1.0)  # 11 events a unit, which is more than four workers take
    run = Simulation(UNITS, workers=64, costs=costs).run()
    assert run.makespan_s >= 1100.0 and run.driver_share > 0.95


def test_a_long_unit_is_done_by_another_at_the_end() -> None:
    trouble = Trouble(stragglers=0.05)
    run = Simulation(UNITS, workers=4, trouble=trouble, seed=3).run()
    assert run.done == 100 and run.copied > 0
