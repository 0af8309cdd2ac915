"""The same study under a researcher's plain ``flwr run``: Flower's ServerApp around our rounds.

    flwr run app SUPERLINK --run-config 'overrides="study=heart privacy=none rounds=5" out="outputs/flower"'

No site's policy, ledger or airlock takes part here: it is for trying a study out on Flower's own runtime, never for
private data. A deployment is ``fedtailor server up`` and ``fedtailor client up``.
"""

import hashlib
import os
import shlex
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from flwr.app import ConfigRecord, Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from fedtailor import leaving, store, tree, wire
from fedtailor import recipe as recipes
from fedtailor.config import Experiment, build, load
from fedtailor.errors import ConfigError, ConnectionFailed
from fedtailor.privacy.planning import resolve, strategy_of
from fedtailor.recipe import Recipe
from fedtailor.report import write_run
from fedtailor.result import Result
from fedtailor.server.folding import advance, close_round, counted
from fedtailor.server.record import Progress, noted, result_of
from fedtailor.server.rounds import Answer
from fedtailor.strategy import model_in
from fedtailor.study import Plan, Spec
from fedtailor.tree import Params, Tree
from fedtailor.wire import Report, Visit

PATIENCE_S = 120.0  # for nodes to connect
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one study, its sites dealt out to the connected nodes in order."""
    experiment = load(shlex.split(str(context.run_config.get("overrides", ""))))
    result = run(grid, experiment, Path(str(context.run_config.get("out", "") or "outputs/flower")))
    print(f"{result.study}: {result.metrics['federated']}")


def run(grid: Grid, experiment: Experiment, out: Path) -> Result:
    """Run the study over ``grid`` and write its run folder; raises what :func:`conduct` does."""
    plan = resolve(experiment.plan)
    result, params = conduct(grid, plan, experiment.simulation.data, plan.deadline_s)
    config = yaml.safe_dump(plan.model_dump(mode="json", by_alias=True), sort_keys=False)
    write_run(out, result=result, plan=plan, model=params, config_yaml=config)
    return result


def conduct(
    grid: Grid,
    plan: Plan,
    data: Spec,
    deadline_s: float,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> tuple[Result, Params]:
    """Run a plan whose privacy is resolved over ``grid``: its result and the model.

    Args:
        data: makes ``{site: DataSource}``, at every node.
        deadline_s: when a round closes, with whoever replied.
        on_event: told of each round, and of each site that failed, and why.

    Raises:
        ConfigError: code ``config``, if its rounds do not wait for all sites; code ``quorum`` or ``diverged``.
        ConnectionFailed: if there are fewer nodes than sites.
    """
    began = time.monotonic()
    if plan.buffer is not None:
        asked = f"buffer: {plan.buffer.answers} answers close a round"
        raise ConfigError(f"{asked}; under flwr run every round waits for all sites: buffer=null, or a deployment")
    recipe, strategy = build(plan.recipe, Recipe), strategy_of(plan, os.urandom(32))
    start = recipes.initial(recipe, plan.seed)
    state, like, progress = strategy.init(start), leaving.summand(plan, strategy, start), Progress()
    leaves = leaving.agreed(plan.canonical()).model_copy(update={"packed": False})  # daemons pack; here are none
    nodes = dict(zip(plan.sites, _wait_for(grid, len(plan.sites)), strict=False))
    source = data.model_dump_json(by_alias=True)
    setup_s = time.monotonic() - began
    with TemporaryDirectory() as spool:
        for round in range(plan.rounds + 1):
            train, clock = round < plan.rounds, time.monotonic()
            payload = b"".join(store.safetensors(tree.flatten(strategy.broadcast(state))))
            visit = Visit(
                run="flower",
                round=round,
                train=train,
                evaluate=not train or round % plan.evaluation.every == 0,
                baseline=not train and plan.evaluation.baseline,
                plan=plan.canonical(),
                cast_sha256=hashlib.sha256(payload).hexdigest(),
            )
            messages = {}
            for site in plan.asked(round) if train else plan.sites:
                content = wire.record(visit, payload)
                content["research"] = ConfigRecord({"site": site, "source": source})
                messages[site] = Message(content, dst_node_id=nodes[site], message_type=MessageType.TRAIN)
            stream = _answers(grid, messages, deadline_s, Path(spool), on_event)
            closed = close_round(strategy, visit, leaves, stream, lambda answer: None)
            closed = closed._replace(sent={site: len(payload) for site in messages})
            progress = noted(progress, plan, closed, round, time.monotonic() - clock if train else None)
            if train:
                state = advance(strategy, partial(_same, state), counted(plan, closed, round), round, like)
                progress = progress._replace(round=round + 1)
                done = {"round": round + 1, "clients": len(closed.reports), "seconds": progress.round_s[-1]}
                on_event({"kind": "round", "rounds": plan.rounds} | done)
    params = model_in(strategy.broadcast(state))
    progress = progress._replace(wall_s=time.monotonic() - began)
    made = result_of(plan, progress, params, status="completed", setup_s=setup_s, transport=None)
    return made.model_copy(update={"engine": "flwr run"}), params


def _same(state: Tree) -> Tree:
    return state


def _wait_for(grid: Grid, count: int) -> list[int]:
    end = time.monotonic() + PATIENCE_S
    while len(nodes := sorted(grid.get_node_ids())) < count:
        if time.monotonic() > end:
            raise ConnectionFailed(f"{len(nodes)} nodes are connected; the study needs {count}, one a site")
        time.sleep(0.5)
    return nodes


def _answers(
    grid: Grid,
    messages: dict[str, Message],
    deadline_s: float,
    spool: Path,
    on_event: Callable[[dict[str, Any]], None],
) -> Iterator[Answer]:
    """Send each site its message and yield its answer as it comes."""
    asked = dict(zip(grid.push_messages(list(messages.values())), messages, strict=True))
    end = time.monotonic() + deadline_s
    while asked and time.monotonic() < end:
        for reply in grid.pull_messages(list(asked)):
            site = asked.pop(reply.metadata.reply_to_message_id)
            if reply.has_error():
                on_event({"kind": "failed", "site": site, "why": reply.error.reason})
                yield Answer(site, None, None, "error", 0)
                continue
            head, payload = wire.unpacked(reply.content)
            report, path = wire.parse_head(Report, head), spool / f"{site}.safetensors"
            path.write_bytes(payload)
            yield Answer(site, report, path, None, len(head) + len(payload), hashlib.sha256(payload).hexdigest())
        time.sleep(0.05)
    for site in asked.values():
        yield Answer(site, None, None, "late", 0)
