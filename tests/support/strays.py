"""What a GPU would punish, seen without one: tensors on the wrong device, and waiting for the device."""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = torch.device("meta")


class Nothing(TorchDispatchMode):
    """Fails where an operation is given or makes a tensor on ``OTHER``, as torch's default device it is to be."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        strays = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor) and x.device == OTHER]
        assert not strays, f"{func} on another device than that of a round's inputs"
        return found


def elsewhere_by_default(fn):
    """``fn()``, where every tensor that is made without a device would end on ``OTHER``, and would be seen."""
    with OTHER, Nothing():
        return fn()


WAITING = {  # operations whose result, or its shape, the host has to know
    "_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount",
}  # fmt: skip
READING = {"tolist", "numpy", "cpu"}  # methods that no operation shows on a CPU


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = Counter()
        self.reads = _Reads(self.found)

    def __enter__(self):
        self.reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.reads.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
        to_host = name == "_to_copy" and kwargs.get("device") is not None
        if name in WAITING or by_mask or repeats or to_host:
            self.found[name] += 1
        return func(*args, **kwargs)


class _Reads(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READING:
            self.found[func.__name__] += 1
        return func(*args, **kwargs or {})
