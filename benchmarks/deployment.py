"""Overhead of a round, a 100 MB model there and back, and memory: fedtailor beside stock Flower, in one run.

    python -m benchmarks.deployment [--json] [--rounds 8] [--parameters 25000000] [--skip-stock]

Overhead is the median round time minus the slowest site's own work in it. Memory is the coordinator's peak above what
it held when idle, before the study began. Both systems run on the same machine, one after the other.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import Family, PeakMemory, resident
from benchmarks.stock_flower import measure as measure_stock
from fedtailor import control
from fedtailor.cli.demo import free_port
from fedtailor.cli.rehearsal import admit
from fedtailor.client.joining import Settings
from fedtailor.config import load
from fedtailor.datasets import heart_disease, write_csv
from fedtailor.errors import ConnectionFailed
from fedtailor.leaving import agreed
from fedtailor.privacy.planning import resolve
from fedtailor.server.home import Home, ServerConfig

SITES = ("cleveland", "hungary", "switzerland", "va")
WIDTH = 45  # parameters of the mlp per hidden unit: 41 inputs, bias, LayerNorm's two, output


def measure(overrides: list[str]) -> dict[str, Any]:
    """Run one study over a real deployment on loopback and say what it took."""
    with tempfile.TemporaryDirectory(prefix="fedtailor-bench-") as made:
        folder = Path(made)
        home = Home(folder / "server")
        home.init(ServerConfig(name="bench", port=free_port(), hosts=("127.0.0.1",)))
        sources = heart_disease()
        for site in SITES:
            data, place = folder / f"{site}.csv", folder / site
            write_csv(sources[site].table(), data)
            admit(home, site, place, Settings(data, ["heart"], 100.0, 1e-4))
            config = place / "site.yaml"
            config.write_text(
                config.read_text().replace("policy:\n", "policy:\n  without_privacy: true\n  approval: policy\n")
            )
        environment = os.environ | {"NO_PROXY": "127.0.0.1,localhost"}
        with Family(folder, environment) as family:
            command = [sys.executable, "-m", "fedtailor"]
            server = family.start("server", [*command, "server", "up", "--home", str(home.folder)])
            for site in SITES:
                family.start(site, [*command, "client", "up", "--home", str(folder / site)])
            _until(lambda: all(_ask(home, "Status")["sites"].get(site) for site in SITES))
            idle = resident(server.pid)
            plan = resolve(load(["study=heart", "deadline_s=600", *overrides]).plan)
            with PeakMemory(server.pid, 0.02) as peak:
                request = {"plan": plan.canonical(), "config": "", "leaves": agreed(plan.canonical()).model_dump_json()}
                run = _ask(home, "Submit", request)["run"]  # as `fedtailor server submit` asks it
                _until(lambda: _status(home, run) in ("completed", "failed"))
            if _status(home, run) != "completed":
                raise RuntimeError(f"the study failed: {_ask(home, 'Runs')}")
            result = json.loads((home.studies / run / "result.json").read_text())
    timing = result["timing"]
    rounds, work = timing["round_s"][1:] or timing["round_s"], timing["work_s"][1:] or timing["work_s"]
    return {
        "median_round_s": statistics.median(rounds),
        "overhead_s": statistics.median(rounds) - statistics.median(work),
        "round_s": timing["round_s"],
        "work_s": timing["work_s"],
        "parameters": result["model"]["parameters"],
        "idle_bytes": idle,
        "peak_bytes": peak.largest,
        "epsilon": (result["privacy"] or {}).get("epsilon_max"),
    }


def _ask(home: Home, method: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
    return control.call(control.socket_of(home.folder), "Server", method, request)


def _status(home: Home, run: str) -> str:
    return str(next(r["status"] for r in _ask(home, "Runs")["runs"] if r["run"] == run))


def _until(condition: Any, timeout: float = 900.0) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            if condition():
                return
        except ConnectionFailed:
            pass
        time.sleep(0.2)
    raise TimeoutError


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--parameters", type=int, default=25_000_000)
    parser.add_argument("--skip-stock", action="store_true", help="measure fedtailor only")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    hidden = arguments.parameters // WIDTH
    large = ["privacy=none", "rounds=3", "norm=null", "recipe=heart_mlp", f"recipe.hidden={hidden}", "local.steps=1",
             "local.rate=0.03", "evaluation.every=1000", "evaluation.baseline=false"]  # fmt: skip
    found: dict[str, Any] = {
        "heart": {"fedtailor": measure([f"rounds={arguments.rounds}"])},
        "large": {"fedtailor": measure(large)},
    }
    if not arguments.skip_stock:
        found["heart"]["stock"] = measure_stock(3)
        found["large"]["stock"] = measure_stock(2, arguments.parameters)
    if arguments.json:
        print(json.dumps(found))
        return
    for name, pair in found.items():
        ours = pair["fedtailor"]
        size = 4 * ours["parameters"]
        print(f"{name}: {ours['parameters']:,} parameters ({size / 1e6:.1f} MB), four sites")
        print(f"  fedtailor  {ours['median_round_s']:.2f} s a round, overhead {ours['overhead_s']:.2f} s")
        above = ours["peak_bytes"] - ours["idle_bytes"]
        print(f"             coordinator {above / 1e6:.0f} MB above its idle {ours['idle_bytes'] / 1e6:.0f} MB"
              f" ({above / size:.2f} models), {ours['peak_bytes'] / 1e6:.0f} MB in all ({ours['peak_bytes'] / size:.2f})")  # fmt: skip
        if "stock" in pair:
            stock = pair["stock"]
            ratio = stock["median_round_s"] / ours["median_round_s"]
            print(f"  stock      {stock['median_round_s']:.2f} s a round: {ratio:.1f} times ours; "
                  f"server processes {stock['peak_rss_bytes'] / 1e6:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
