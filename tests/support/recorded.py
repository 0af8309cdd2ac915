"""A stand-in for CUDA graphs on a CPU: the operations of one run, done again on the very same tensors.

As in a graph, whatever Python decided or remembered while it was recorded is decided for good, and nothing but the contents
of tensors that were there before it can change what a replay makes.
"""

import torch
from strays import WAITING
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM = 2


class _Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in WAITING:
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        found = func(*args, **kwargs)
        self.done.append((func, args, kwargs, found))
        return found


def capture(run):
    """A :data:`fedtailor.simulations.graphs.Capture`."""
    for _ in range(WARM):
        run()
    with _Record() as record:
        results = run()

    def again():
        with torch.no_grad():
            for func, args, kwargs, found in record.done:
                given = {_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
                for old, new in zip(tree_leaves(found), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and _place(old) not in given:  # else a view, or done in place
                        old.copy_(new)

    return again, results


def _place(x):
    return x.untyped_storage().data_ptr()
