"""Metrics of a binary classifier on one held-out part. What cannot be estimated is None: never 0, NaN or 0.5."""

import numpy as np
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fedtailor.recipe import Metrics

RARE = 5  # a ranking over fewer examples of a class than this says nothing


def binary(outputs: Tensor, y: Tensor) -> Metrics:
    """Ranking, decision (threshold 0.5) and loss metrics; none of a model whose logits are not finite.

    Shapes:
        outputs: logits ``[N]``; y: ``[N]`` of 0.0 and 1.0.
    """
    # Here, because only what holds data measures: a coordinator never needs scikit-learn's second and 110 MB.
    from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

    truth, logits = y.numpy().astype(int), outputs.double().numpy()
    if not len(truth) or not np.isfinite(logits).all():
        return dict.fromkeys(("auroc", "auprc", "accuracy", "f1", "precision", "recall", "loss"))
    decided = (logits > 0).astype(int)
    ranked = min(truth.sum(), len(truth) - truth.sum()) >= RARE
    return {
        "auroc": float(roc_auc_score(truth, logits)) if ranked else None,
        "auprc": float(average_precision_score(truth, logits)) if ranked else None,
        "accuracy": float((decided == truth).mean()),
        "f1": float(f1_score(truth, decided)) if truth.any() else None,
        "precision": float(precision_score(truth, decided)) if decided.any() else None,
        "recall": float(recall_score(truth, decided)) if truth.any() else None,
        "loss": float(binary_cross_entropy_with_logits(outputs.double(), y.double())),
    }
