"""The coordinator: Flower's FedAvg over every site, with the clock read after every round."""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from stock_app.model import initial

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study."""
    config = context.run_config
    sites = int(config["num-sites"])
    clock: list[float] = []

    def note(round: int, arrays: ArrayRecord) -> MetricRecord:
        clock.append(time.monotonic())  # called once before the first round and once after each
        return MetricRecord({})

    strategy = FedAvg(min_train_nodes=sites, min_evaluate_nodes=sites, min_available_nodes=sites)
    start = ArrayRecord(initial(int(config["parameters"]), int(config["width"])))
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=int(config["num-rounds"]), evaluate_fn=note)
    metrics = [dict(m) for m in result.evaluate_metrics_clientapp.values()]
    Path(str(config["times"])).write_text(json.dumps({"clock": clock, "metrics": metrics}))
