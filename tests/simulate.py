"""Run the daemon in simulated worlds, one for each seed: see tests/simulation.

python tests/simulate.py --seeds 10000          many worlds; a seed that fails prints how to replay it
python tests/simulate.py --first 7 --verbose    one world, told as it goes
python tests/simulate.py --plant all            plant defects and say which seed caught each
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from simulation.plants import PLANTS, planted  # noqa: E402
from simulation.simulation import Simulation  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulation.simulation import Outcome

SHOWN_CHARS: Final = 2000


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def replay_command(seed: int) -> str:
    return f"python tests/simulate.py --seeds 1 --first {seed} --verbose"


def describe(outcome: Outcome) -> str:
    return f"seed {outcome.seed}: {outcome.problem[:SHOWN_CHARS]}\n  replay: {replay_command(outcome.seed)}"


def run_seeds(first: int, count: int, *, verbose: bool) -> int:
    """Return how many seeds went wrong."""
    began, bad, hours, events = time.monotonic(), 0, 0.0, 0
    for seed in range(first, first + count):
        outcome = Simulation(seed, say if verbose else None).run()
        hours, events = hours + outcome.simulated_s / 3600, events + outcome.events
        if outcome.problem:
            bad += 1
            say(describe(outcome))
    took = time.monotonic() - began
    say(f"{count} seeds, {bad} failed; {hours:.0f} simulated hours, {events} events; {took / count:.3f} s a seed")
    return bad


def first_caught(plant: str, first: int, count: int) -> Outcome | None:
    """Return how the first seed that catches a defect fails, None where none does."""
    with planted(plant):
        for seed in range(first, first + count):
            outcome = Simulation(seed).run()
            if outcome.problem:
                return outcome
    return None


def run_plants(names: Sequence[str], first: int, count: int) -> int:
    """Return how many of the defects nobody caught."""
    missed = 0
    for name in names:
        caught = first_caught(name, first, count)
        missed += caught is None
        told = (
            f"seed {caught.seed:4}  {caught.problem.splitlines()[-1 if 'Traceback' in caught.problem else 0][:90]}"
            if caught
            else "NOT CAUGHT"
        )
        say(f"{name:18} {told}")
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many worlds (1; 300 with --plant)")
    parser.add_argument("--first", type=int, default=0, metavar="S", help="the first seed (0)")
    parser.add_argument(
        "--verbose", action="store_true", help="tell faults and what the daemon logs, in simulated time"
    )
    parser.add_argument("--plant", choices=("all", *PLANTS), metavar="NAME", help=f"all, or one of {', '.join(PLANTS)}")
    options = parser.parse_args(arguments)
    if options.plant is None:
        return int(run_seeds(options.first, options.seeds, verbose=options.verbose) > 0)
    names = list(PLANTS) if options.plant == "all" else [options.plant]
    return int(run_plants(names, options.first, options.seeds if options.seeds > 1 else 300) > 0)


if __name__ == "__main__":
    sys.exit(main())
