"""Answers as a training process leaves them, honest or not, for the airlock's tests."""

import json

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.torch import save

from fedtailor import leaving
from fedtailor.client import airlock, inbox
from fedtailor.client.fleet import Envelope
from fedtailor.client.signing import Signer
from fedtailor.client.site import Policy
from fedtailor.config import load as configured
from fedtailor.errors import RefusedError
from fedtailor.receipts import Head
from fedtailor.wire import Visit

PLAN = configured(["study=heart", "privacy=none", "strategy=fedavg"]).plan.canonical()
VISIT = Visit(run="r", round=3, train=True, evaluate=True, baseline=True, plan=PLAN, cast_sha256="0" * 64)
LEAVES = leaving.agreed(PLAN)
POLICY = Policy(studies=("heart",), epsilon=8.0, delta=1e-4)
METRICS = {"auroc": 0.75, "loss": None}
SIGNER = Signer(ec.generate_private_key(ec.SECP384R1()))
HEAD = Head(count=7, hash="0" * 64, signature="cd")
ENVELOPE = Envelope(7, "m" * 64, 1.0, 60.0, 2.0)


def honest():
    return {name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in LEAVES.spec().items()}


def written(tmp_path, flat=None, raw=None, **changed):
    """What the training process leaves: ``flat`` or ``raw`` bytes, and a report."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    fields = {"run": "r", "round": 3, "rows": 200, "train_rows": 134, "metrics": METRICS, "baseline": METRICS,
              "seconds": 1.23456, "epsilon": 99.0, "summand_sha256": "0" * 64, "salt": "0" * 64}  # fmt: skip
    (out / "summand.safetensors").write_bytes(save(honest() if flat is None else flat) if raw is None else raw)
    (out / "work.json").write_text(json.dumps(fields | changed))
    return out


FACTS = airlock.Facts(epsilon=1.5, rows=200, train_rows=134, test_rows=66, reservation=4, witness="ab", head=HEAD)


def admitted(tmp_path, out, visit=VISIT, policy=POLICY, test_rows=66, leaves=LEAVES):
    outbox = tmp_path / "outbox"
    outbox.mkdir(exist_ok=True)
    airlock.admit(out, outbox, visit, leaves, policy, FACTS._replace(test_rows=test_rows))
    return inbox.stored(outbox, visit)


def dropped(tmp_path, out, code, visit=VISIT, leaves=LEAVES):
    with pytest.raises(RefusedError, match="the airlock dropped an answer") as error:
        admitted(tmp_path, out, visit, leaves=leaves)
    assert error.value.code == f"airlock-{code}"
    assert list((tmp_path / "outbox").iterdir()) == []
