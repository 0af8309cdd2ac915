"""Trees on disk by slices: what is read is what was written, and a part of a file is a file of that part."""

import hashlib
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor import store, tree, treefile, wire
from fedtailor.errors import StoreError

SAVED = {
    "params": {"w": torch.arange(10.0).view(2, 5), "b": torch.tensor(7.0), "none": torch.empty(0, 3)},
    "steps": torch.tensor([1, 2, 3]),
    "half": torch.arange(5).to(torch.bfloat16),
}


@pytest.fixture
def path(tmp_path):
    store.save_tree(tmp_path / "saved", SAVED, {"said": "this"})
    return tmp_path / "saved"


@pytest.fixture(autouse=True)
def slices_of_three(monkeypatch):
    monkeypatch.setattr(treefile, "SLICE", 3)


def test_a_saved_tree_is_read_whole_and_by_slices(path):
    file = treefile.opened(path)
    assert file.metadata["said"] == "this"
    found, expected = tree.flatten(file.tree()), tree.flatten(SAVED)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype and torch.equal(found[name], leaf)
        pieces = [file.read(name, *ends) for ends in file.slices(name)]
        assert torch.equal(torch.cat(pieces), leaf.reshape(-1)) and max(map(len, pieces)) <= 3
    assert list(file.slices("params/none")) == [(0, 0)]


def test_what_is_written_by_slices_is_what_save_tree_writes(path, tmp_path):
    spec = {name: (leaf.dtype, tuple(leaf.shape)) for name, leaf in tree.flatten(SAVED).items()}
    with store.replacing(tmp_path / "drafted") as file:
        draft = treefile.draft(file, spec, {"said": "this"})
        for name, leaf in reversed(tree.flatten(SAVED).items()):
            for start, stop in reversed(list(draft.slices(name))):
                draft.write(name, start, leaf.reshape(-1)[start:stop])
        draft.seal()
    assert (tmp_path / "drafted").read_bytes() == path.read_bytes()
    assert store.load_tree(tmp_path / "drafted")[1] == {"said": "this"}


def test_a_file_that_was_changed_or_cut_is_refused_and_named(path):
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StoreError, match="saved.*restore it from a copy"):
            treefile.opened(path)
        path.write_bytes(whole[:at])
        with pytest.raises(StoreError, match="saved.*restore it from a copy"):
            treefile.opened(path)
    path.unlink()
    with pytest.raises(StoreError, match="saved cannot be read"):
        treefile.opened(path)


@pytest.mark.parametrize("text", ["[]", "7", '{"w": 1}', '{"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}',
                                  '{"w": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
                                  '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
                                  '{"w": {"dtype": "F9", "shape": [1], "data_offsets": [0, 4]}}'])  # fmt: skip
def test_a_header_that_promises_what_is_not_there_is_refused(path, text):
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))
    with pytest.raises(StoreError, match="saved"):
        treefile.opened(path)


def test_a_scratch_file_has_no_name(tmp_path):
    file = treefile.scratch(tmp_path, {"a": (torch.float64, (2, 2)), "b": (torch.float64, ())})
    assert not list(tmp_path.iterdir())
    file.write("b", 0, torch.tensor([5.0], dtype=torch.float64))
    file.write("a", 1, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert file.tree()["b"] == 5 and file.read("a", 1, 4).tolist() == [1, 2, 3]


@settings(max_examples=50)
@given(st.integers(0, 300), st.integers(0, 300))
def test_an_excerpt_has_the_bytes_of_the_file_that_it_stands_for(tmp_path_factory, start, stop):
    path = tmp_path_factory.getbasetemp() / "excerpt-of"
    if not path.exists():
        store.save_tree(path, SAVED, {})
    chosen = {"other/w": "params/w", "none": "params/none", "b": "params/b", "h": "half"}
    excerpt = treefile.Excerpt(treefile.opened(path), chosen)
    flat = tree.flatten(SAVED)
    whole = b"".join(store.safetensors({name: flat[at] for name, at in chosen.items()}))
    assert b"".join(excerpt) == whole == b"".join(treefile.pieces_of({n: flat[at] for n, at in chosen.items()}))
    assert excerpt.size == len(whole) and excerpt.parameters == 16 and excerpt.read(start, stop) == whole[start:stop]
    assert wire.digest(excerpt) == wire.digest(whole) == hashlib.sha256(whole).hexdigest()


def test_a_blob_travels_as_its_bytes_do(path, monkeypatch):
    monkeypatch.setattr(wire, "INLINE", 8)
    monkeypatch.setattr(wire, "CHUNK", 40)
    excerpt = treefile.Excerpt(treefile.opened(path), {"w": "params/w", "b": "params/b"})
    whole = excerpt.read(0, excerpt.size)
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute

    with no_object_id_recompute():
        content = wire.record(wire.Visit.model_construct(run="r"), excerpt)
        shelf = {name: item.deflate() for name, item in get_all_nested_objects(content).items()}
        sink = io.BytesIO()
        assert wire.pour(content.object_id, shelf.__getitem__, sink, len(whole))[1] == len(whole)
    assert sink.getvalue() == whole
