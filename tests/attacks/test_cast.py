"""A coordinator that has turned, and what it casts: pickles, crafted models, messages without end, archives."""

import ast
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from turned import HUB, PLAN, Site

from fedtailor import client, wire
from fedtailor.errors import WireError


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory):
    it = Site(tmp_path_factory.mktemp("cast"))
    it.workshop.attack = "pass"
    yield it
    it.workshop.stop()
    it.ledger.close()


def bomb(path: Path) -> bytes:
    """A pickle that writes a file where it is loaded."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(path), "w"))

    return pickle.dumps(Bomb())


def test_a_pickle_in_the_place_of_tensors_is_not_loaded(site, tmp_path):
    payload = bomb(tmp_path / "loaded")
    pickle.loads(payload)  # as torch.load did by default until its version 2.6
    assert (tmp_path / "loaded").exists()
    inside = site.workshop.scratch / "tmp" / "loaded"  # the one place where the training process may write
    left = site.asked(HUB.propose(PLAN, site.run()), cast=bomb(inside))
    assert left.heads == [] and len(left.words) == 1 and not inside.exists()


# In the training process: the model that was cast is no longer looked at, or again.
OPEN = """
import fedtailor.client.work as work
from types import SimpleNamespace
work.real = getattr(work, "real", work.leaving)
anything = lambda *arguments: None
work.leaving = SimpleNamespace(check=anything, plausible=anything, spec_of=work.real.spec_of, followed=work.real.followed)
"""
SHUT = "import fedtailor.client.work as work\nwork.leaving = getattr(work, 'real', work.leaving)"


def changed(flat: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    first = sorted(flat)[0]
    return {
        "more": lambda: flat | {"hook": torch.ones(1)},
        "dtype": lambda: flat | {first: flat[first].double()},
        "shape": lambda: flat | {first: torch.ones(3, 3)},
        "nan": lambda: {name: torch.full_like(leaf, float("nan")) for name, leaf in flat.items()},
        "infinite": lambda: {name: torch.full_like(leaf, float("inf")) for name, leaf in flat.items()},
        "huge": lambda: {name: torch.full_like(leaf, -1e7) for name, leaf in flat.items()},
    }[what]()


# what is cast -> the word of the check, and what comes of it without: an answer, or a later line of defence
MODELS = {
    "more": ("keys", []),
    "dtype": ("dtype", ["airlock-dtype", "crashed"]),
    "shape": ("shape", ["crashed"]),
    "nan": ("nonfinite", ["airlock-nonfinite"]),
    "infinite": ("nonfinite", ["airlock-nonfinite"]),
    "huge": ("huge", []),
}


@pytest.mark.parametrize("what", MODELS)
def test_a_crafted_model_is_not_trained_on_and_would_be_without_the_check(site, what):
    word, later = MODELS[what]
    cast = save(changed(load(site.cast), what))
    try:
        for attack, words in ((SHUT, [word]), (OPEN, later)):
            site.workshop.attack, site.workshop.at = attack, "describe"
            left = site.asked(HUB.propose(PLAN, site.run()), cast=cast)
            if words:
                assert left.heads == [] and left.words[0] in words
            else:
                assert len(left.heads) == 1 and left.words == []
    finally:
        site.workshop.attack = SHUT
        site.asked(HUB.propose(PLAN, site.run()))
        site.workshop.attack, site.workshop.at = "pass", "visit"


def test_an_oversized_message_is_cut_off_at_the_sites_limit():
    """The daemon pours a message to disk piece by piece; past the policy's max_download_mb it stops."""
    from flwr.app.message.message import make_message
    from flwr.app.metadata import Metadata
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    visit = HUB.visit(HUB.propose(PLAN, "r"))
    message = make_message(Metadata(1, "", 1, 2, "", "", 0.0, 60.0, "train"), wire.record(visit, bytes(3 * 2**20)))
    objects = {key: one.deflate() for key, one in get_all_nested_objects(message).items()}

    class Disk:
        size = 0

        def write(self, piece: bytes) -> None:
            self.size += len(piece)

    disk = Disk()
    with pytest.raises(WireError) as error:
        wire.pour(message.object_id, objects.__getitem__, disk, 2**20)
    assert error.value.code == "oversized" and disk.size <= 2**20
    wire.pour(message.object_id, objects.__getitem__, disk, 2**62)
    assert disk.size >= 3 * 2**20


ARCHIVES = {"zipfile", "tarfile", "gzip", "bz2", "lzma", "zlib", "pickle", "shelve", "marshal", "dill", "cloudpickle"}
RUNNERS = {"eval", "exec", "compile", "__import__"}


def test_a_site_opens_no_archive_and_runs_no_text():
    """Nothing to bomb and no path to traverse. This reads the daemon's and worker's source."""
    folder = Path(client.__file__).resolve().parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {one.name.split(".")[0] for one in node.names} & ARCHIVES, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in ARCHIVES, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in RUNNERS, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                assert ast.unparse(node.func.value) != "torch", path
