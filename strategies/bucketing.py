"""Bucketing. Karimireddy et al. 2022, https://arxiv.org/abs/2006.09365."""

import torch
from pydantic import NonNegativeInt, PositiveInt, validate_call

from fedtailor import Strategy, seeds
from fedtailor.strategies.inner import Inner
from fedtailor.strategies.stacked import combined, norms, size, through
from fedtailor.tree import Tree


@validate_call
def bucketing(of: Inner, bucket: PositiveInt = 2, seed: NonNegativeInt = 0) -> Strategy:
    """Average replies in random buckets: the rule inside sees fewer that differ less, and each liar spoils one.

    Args:
        of: the rule to prepare replies for, such as {name: krum, attackers: 1}; alone it withstands nothing.
        bucket: replies in a bucket; the last one may have fewer.
        seed: of the draw. Replies are ranked by their norms and dealt out by the round's own permutation, so that the
            order in which they arrive does not matter.
    """

    def average(replies: Tree, round: int) -> Tree:
        dealt = torch.randperm(size(replies), generator=seeds.generator(seed, "bucketing", round))
        buckets = torch.split(norms(replies).argsort()[dealt], bucket)
        rows = torch.zeros(len(buckets), size(replies), dtype=torch.double)
        for row, members in zip(rows, buckets, strict=True):
            row[members] = 1 / len(members)
        return combined(rows, replies)

    return through(of, average)
