"""What a round of a simulated population takes, by the sizes of the population and of its cohort.

    python -m benchmarks.population [--json]

Each line is a process of its own: the heart study without privacy, 20 rounds, clients that draw 20 rows each. Seconds are
the median round's, by the clock; memory is the process' peak, Python and torch included.
"""

import json
import resource
import subprocess
import sys
from statistics import median

from fedtailor import simulate

SIZES = [(clients, 1000) for clients in (1_000, 10_000, 100_000, 1_000_000, 100_000_000)]
SIZES += [(1_000_000, cohort) for cohort in (100, 300, 3000)]
ROUNDS = 20


def one(clients: int, cohort: int) -> dict[str, float]:
    """Measure in this process."""
    settings = {"population.clients": clients, "population.cohort": cohort, "evaluation.every": ROUNDS}
    done = simulate("heart", settings, population="drawn", privacy=None, rounds=ROUNDS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": median(done.result.timing.round_s), "wall": done.result.timing.wall_s, "peak_mb": peak}


def main() -> None:
    """Measure each size in a process of its own, and print a table."""
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(int(sys.argv[2]), int(sys.argv[3]))))
        return
    rows = []
    for clients, cohort in SIZES:
        command = [sys.executable, "-m", "benchmarks.population", "one", str(clients), str(cohort)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"clients": clients, "cohort": cohort} | json.loads(done.stdout))
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    print("| clients | cohort | a round | clients/s | all of it | peak memory |\n|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['clients']:,} | {row['cohort']:,} | {row['seconds']:.2f} s | {row['cohort'] / row['seconds']:,.0f} | "
            f"{row['wall']:.1f} s | {row['peak_mb']:.0f} MB |"
        )


if __name__ == "__main__":
    main()
