"""Two of FLamby's federated data sets, made from the public files as FLamby makes them, and what is measured on them.

du Terrail et al. 2022, https://arxiv.org/abs/2210.04620; settings as of https://github.com/owkin/FLamby, 2023.
"""

import csv
from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from benchmarks.data import DATA
from fedtailor.tree import Tree

HEART, BRCA = DATA / "heart_disease_uci", DATA / "tcga_brca"
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
TRAINED_ON = 0.66


class Site(NamedTuple):
    """One site's rows, in two parts that FLamby fixes. A label is ``[n, 1]``, or event and time ``[n, 2]``."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


class Sites(NamedTuple):
    """The sites, and all their rows together as FLamby's pooled training has them."""

    each: list[Site]
    pooled: Site


def heart() -> Sites:
    """Heart disease at four hospitals: 13 features, standardised by each hospital's training rows.

    Three columns that are mostly missing are left out, then each row with a missing value. Kinds of chest pain and of
    ECG become indicators without their first. The pooled rows are standardised together.
    """
    tables = [_complete(name) for name in HOSPITALS]
    kinds = {column: sorted({float(v) for t in tables for v in t[:, column]})[1:] for column in (2, 6)}
    parts = []
    for table in tables:
        plain = np.delete(table[:, :-1], list(kinds), 1)
        indicators = [table[:, column] == kind for column, some in kinds.items() for kind in some]
        x = torch.from_numpy(np.column_stack([plain, *indicators])).float()
        y = torch.from_numpy(table[:, -1:] > 0).float()
        ill = int(y.sum())
        train, test = train_test_split(
            np.arange(len(x)),
            test_size=1 - TRAINED_ON,
            train_size=TRAINED_ON,
            random_state=43,
            stratify=y[:, 0].numpy() if min(ill, len(y) - ill) > 2 else None,
        )
        train, test = np.sort(train), np.sort(test)
        parts.append(Site(x[train], y[train], x[test], y[test]))
    together = Site(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    return Sites([_standardised(part) for part in parts], _standardised(together))


def _complete(name: str) -> np.ndarray:
    """A hospital's rows without columns 10 to 12, where nothing else is missing: ``[n, 11]``, the diagnosis last."""
    lines = (HEART / f"processed.{name}.data").read_text().split()
    rows = [[v for i, v in enumerate(line.split(",")) if i not in (10, 11, 12)] for line in lines]
    return np.array([[float(v) for v in row] for row in rows if "?" not in row])


def _standardised(site: Site) -> Site:
    mean, std = site.x.mean(0), site.x.std(0) + 1e-9
    return site._replace(x=(site.x - mean) / std, test_x=(site.test_x - mean) / std)


def brca() -> Sites:
    """Survival with breast cancer in six regions: 39 features as they are, event and time."""
    with (BRCA / "train_test_split.csv").open() as file:
        fold = {row["pid"]: row["fold2"] for row in csv.DictReader(file)}
    with (BRCA / "brca.csv").open() as file:
        next(rows := csv.reader(file))
        patients = [(fold[row[0]], torch.tensor([float(v) for v in row[1:]])) for row in rows if row[0] in fold]

    def part(*names: str) -> tuple[Tensor, Tensor]:
        rows = torch.stack([values for where, values in patients if where in names])
        return rows[:, :39], rows[:, 39:]

    each = [Site(*part(f"train_{k}"), *part(f"test_{k}")) for k in range(6)]
    everywhere = [part(*(f"{kind}_{k}" for k in range(6))) for kind in ("train", "test")]
    return Sites(each, Site(*everywhere[0], *everywhere[1]))


def scores(params: Tree, x: Tensor) -> Tensor:
    """A linear model's outputs ``[n]``."""
    return (x @ params["weight"].T + params["bias"])[..., 0]


def cross_entropies(params: Tree, x: Tensor, y: Tensor) -> Tensor:
    """Each row's loss ``[n]``."""
    return torch.nn.functional.binary_cross_entropy_with_logits(scores(params, x), y[..., 0], reduction="none")


def cox(params: Tree, x: Tensor, y: Tensor, live: Tensor) -> Tensor:
    """Each row's part of the negative partial log-likelihood of what is live in one batch ``[n]``, 0 where no event is.

    Cox 1972 with Breslow's ties. It is no sum over examples: a patient's part depends on who else is in the batch.
    """
    found, event, time = scores(params, x), y[:, 0], y[:, 1]
    at_risk = (time[None, :] >= time[:, None]) & (live[None, :] > 0) | torch.eye(len(found), dtype=torch.bool)
    reach = found.expand(len(found), -1).masked_fill(~at_risk, -torch.inf).logsumexp(1)
    return (reach - found) * event * live


def accuracy(params: Tree, x: Tensor, y: Tensor) -> float:
    """In percent, at a probability of one half."""
    return 100 * float(((scores(params, x) > 0) == (y[:, 0] > 0.5)).float().mean())


def c_index(params: Tree, x: Tensor, y: Tensor) -> float:
    """Harrell's, in percent: of all pairs of which it is known who died first, how often that one had the greater risk.

    Equal risks count half. Of two equal times, an event comes before a censoring; two events are no pair.
    """
    risk, event, time = scores(params, x), y[:, 0] > 0, y[:, 1]
    earlier = (time[:, None] < time[None, :]) | (time[:, None] == time[None, :]) & ~event[None, :]
    known = (event[:, None] & earlier).fill_diagonal_(False)
    right = (risk[:, None] > risk[None, :]).double() + (risk[:, None] == risk[None, :]).double() / 2
    return 100 * float(right[known].mean())
