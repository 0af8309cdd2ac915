"""A strategy that shrinks what sites send saves the bytes on a real wire, and changes nothing else."""

import pytest
from safetensors.torch import load_file

from fedtailor import store
from fedtailor.datasets import heart_disease
from fedtailor.simulations.run import simulate
from fedtailor.tree import norm

pytestmark = [pytest.mark.deployment, pytest.mark.slow]


def test_packed_answers_save_bytes_and_the_model_is_the_simulators(deployment):
    overrides = ["privacy=none", "rounds=2", "recipe=heart_mlp", "recipe.hidden=512", "evaluation.baseline=false"]
    plan = deployment.plan(*overrides, "strategy=topk", "strategy.fraction=0.01")
    run = deployment.submit(plan)
    result = deployment.finish(run)
    simulated, params = simulate(plan, heart_disease())
    deployed = load_file(deployment.run_folder(run) / "model.safetensors")
    assert norm({name: deployed[name] - params[name] for name in params}) < 1e-5
    dense = plan.rounds * sum(len(piece) for piece in store.safetensors(params))
    rows = deployment.ask_site("va", "Egress")["rows"]
    egress = [row for row in rows if row.get("run") == run and "tensors" in row]
    assert [bool(row["tensors"]) for row in egress] == [True, True, False]
    for site, found in simulated.sites.items():
        sent, received = (result["sites"][site][kind] for kind in ("bytes_sent", "bytes_received"))
        assert found.bytes_sent < dense / 30 and sent < dense / 8  # the heads are the greater part here
        heads = sent - found.bytes_sent
        assert 0 < heads < (plan.rounds + 1) * 4096
        assert 0 < received - found.bytes_received < (plan.rounds + 1) * 64 * 1024
