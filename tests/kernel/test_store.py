"""Files: whole or not at all, and every tensor comes back bit by bit or not at all."""

import errno
import hashlib
import json
import os
import stat
import threading

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedtailor import store, tree
from fedtailor.errors import StoreError

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.bin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trees")


def fails(*_):
    raise FULL


def full_in_the_middle():
    yield b"new, but only "
    raise FULL


def bits(leaf):
    return leaf.contiguous().as_strided((leaf.numel(),), (1,)).view(torch.uint8).tolist()


def assert_equal_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape, bits(a[name])) == (b[name].dtype, b[name].shape, bits(b[name]))


@st.composite
def tensors(draw):
    """Any bits, NaN with payloads among them, of any storable dtype, contiguous or not."""
    dtype, shape = draw(st.sampled_from(list(store.DTYPES))), draw(st.lists(st.integers(0, 3), max_size=3))
    wide = [*shape[:-1], 2 * shape[-1]] if shape else []
    count = torch.Size(wide).numel()
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    made = torch.tensor(list(raw), dtype=torch.uint8).view(dtype).reshape(wide)
    way = draw(st.sampled_from(["contiguous", "strided", "transposed"])) if shape else "scalar"
    return {"strided": made[..., ::2], "transposed": made.transpose(0, -1)}.get(way, made) if shape else made


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_on_a_full_disk_the_old_file_is_unharmed(path, monkeypatch, failing):
    store.write_bytes(path, b"old")
    pieces = [b"new"] if failing != "write" else full_in_the_middle()
    if failing != "write":
        monkeypatch.setattr(os, failing, fails)
    with pytest.raises(StoreError, match=r"state\.bin cannot be written: No space left.*free space") as refusal:
        store.write_pieces(path, pieces)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["state.bin"]
    assert refusal.value.code == "store" and refusal.value.__cause__ is FULL


def test_a_writer_that_is_interrupted_leaves_nothing(path):
    def interrupted():
        yield b"new"
        raise KeyboardInterrupt

    store.write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        store.write_pieces(path, interrupted())
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["state.bin"]


def test_data_are_on_the_disk_before_they_take_the_name(path, monkeypatch):
    happened, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda h: (happened.append(stat.S_IFMT(os.fstat(h).st_mode)), sync(h)))
    monkeypatch.setattr(os, "replace", lambda a, b: (happened.append("replace"), replace(a, b)))
    store.write_bytes(path, b"new")
    assert happened == [stat.S_IFREG, "replace", stat.S_IFDIR]


def test_a_folder_that_cannot_be_synchronised_is_told_and_the_file_is_new(path, monkeypatch):
    store.write_bytes(path, b"old")
    monkeypatch.setattr(store, "_sync", fails)
    with pytest.raises(StoreError, match="is written, but .* may not survive a power failure"):
        store.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("mask", [0o000, 0o027, 0o277])
def test_the_mode_is_what_was_asked_for_whatever_the_umask(path, mask):
    before = os.umask(mask)
    try:
        store.write_bytes(path, b"secret")
        store.write_bytes(path.with_name("public"), b"", mode=0o644)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path, path.with_name("public"))] == [0o600, 0o644]


def test_a_draft_left_by_a_crash_is_taken_over_with_neither_its_bytes_nor_its_mode(path):
    draft = path.with_name(".state.bin.draft")
    draft.write_bytes(b"much longer than what comes next")
    draft.chmod(0o666)
    store.write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["state.bin"]


def test_a_symlink_in_the_drafts_place_is_not_followed(path):
    victim = path.with_name("victim")
    victim.write_bytes(b"precious")
    path.with_name(".state.bin.draft").symlink_to(victim)
    with pytest.raises(StoreError, match="cannot be written"):
        store.write_bytes(path, b"new")
    assert victim.read_bytes() == b"precious" and not path.exists()


def test_writers_of_one_file_do_not_mix(path):
    wrong = []

    def write(byte):
        for _ in range(25):
            store.write_pieces(path, (bytes([byte]) * 5000 for _ in range(20)))
            found = path.read_bytes()
            if len(found) != 100_000 or len(set(found)) != 1:
                wrong.append(found)

    threads = [threading.Thread(target=write, args=(byte,)) for byte in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and os.listdir(path.parent) == ["state.bin"]


def test_text_is_utf_8_and_json_knows_no_nan(path):
    store.write_text(path, "naïve €")
    assert path.read_bytes() == "naïve €".encode()
    store.write_json(path, {"a": [1, None, "é"]})
    assert json.loads(path.read_bytes()) == {"a": [1, None, "é"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_bytes()) == {"a": [1, None, "é"]}


ONE_OF_STRIDE_TWO = torch.ones(1, 2)[:, 0]  # contiguous by torch's count, and yet it cannot be viewed as bytes


@settings(max_examples=100, deadline=None)
@example({"w": ONE_OF_STRIDE_TWO}, {})
@given(st.dictionaries(st.text('aβ"\\ .', min_size=1), tensors(), max_size=4), st.dictionaries(st.text(), st.text()))
def test_the_safetensors_library_reads_what_is_written(flat, metadata):
    raw = b"".join(store.safetensors(flat, metadata))
    assert_equal_bits(safetensors.torch.load(raw), flat)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header.pop("__metadata__", {}) == metadata
    for entry in header.values():
        begin = 8 + int.from_bytes(raw[:8], "little") + entry["data_offsets"][0]
        widths = {name: dtype.itemsize for dtype, name in store.DTYPES.items()}
        assert begin % widths[entry["dtype"]] == 0, "a tensor that is not aligned is slow, or faults"


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text("ab", min_size=1), tensors(), max_size=3), st.dictionaries(st.text(), st.text()))
def test_a_saved_tree_comes_back(folder, flat, metadata):
    metadata.pop(store.CHECKSUM, None)
    path = folder / "tree.safetensors"
    store.save_tree(path, {"state": flat, "round": torch.tensor(3)}, metadata)
    loaded, found = store.load_tree(path)
    assert_equal_bits(tree.flatten(loaded), tree.flatten({"state": flat, "round": torch.tensor(3)}))
    assert found == metadata


def test_what_was_loaded_is_no_view_of_the_file_nor_of_another_tensor(path):
    shared = torch.ones(2, requires_grad=True)
    store.save_tree(path, {"a": shared, "b": shared}, {})
    loaded, _ = store.load_tree(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    loaded["a"] += 1
    assert loaded["a"].tolist() == [2.0, 2.0] and loaded["b"].tolist() == [1.0, 1.0]


def test_a_changed_bit_anywhere_is_refused_and_the_file_named(path):
    store.save_tree(path, {"w": torch.arange(6.0).reshape(2, 3), "n": {"b": torch.ones(3).bfloat16()}}, {"round": "7"})
    whole = path.read_bytes()
    for i in range(len(whole)):
        for change in (1 << i % 8, 255):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ change]) + whole[i + 1 :])
            with pytest.raises(StoreError, match=r"state\.bin (is damaged|cannot be read).*restore it from a copy"):
                store.load_tree(path)
    path.write_bytes(whole)
    assert store.load_tree(path)[1] == {"round": "7"}


def test_a_file_cut_short_or_grown_is_refused(path):
    store.save_tree(path, {"w": torch.ones(5)}, {})
    whole = path.read_bytes()
    for other in (*(whole[:n] for n in range(len(whole))), whole + b"\0"):
        path.write_bytes(other)
        with pytest.raises(StoreError, match=r"state\.bin cannot be read"):
            store.load_tree(path)


def test_a_file_of_another_hand_or_none_is_refused(path):
    with pytest.raises(StoreError, match=r"state\.bin cannot be read"):
        store.load_tree(path)
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    with pytest.raises(StoreError, match=r"state\.bin is damaged: its checksum"):
        store.load_tree(path)


def test_a_dtype_without_a_word_is_named_and_the_old_file_is_unharmed(path):
    store.save_tree(path, {"w": torch.ones(2)}, {})
    with pytest.raises(StoreError, match=r"tensor 'a/z' has dtype torch\.complex64.*int64, float64, float32"):
        store.save_tree(path, {"a": {"z": torch.ones(2, dtype=torch.complex64)}}, {})
    assert torch.equal(store.load_tree(path)[0]["w"], torch.ones(2)) and os.listdir(path.parent) == ["state.bin"]


def test_a_finished_folder_appears_and_one_already_there_is_kept(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
        store.commit_folder(tmp_path / name, tmp_path / "target")
    assert (tmp_path / "target" / "who").read_text() == "first" and not (tmp_path / "first").exists()
    with pytest.raises(StoreError, match=r"elsewhere/target cannot be written: No such file"):
        store.commit_folder(tmp_path / "second", tmp_path / "elsewhere" / "target")
    assert (tmp_path / "second" / "who").read_text() == "second"


def test_a_digest_is_sha_256(path):
    path.write_bytes(b"abc" * 100_000)
    assert store.digest(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
    with pytest.raises(StoreError, match=r"nothing cannot be read"):
        store.digest(path.with_name("nothing"))


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    folder = tmp_path / "a" / "run"
    with store.alone(folder):
        with pytest.raises(StoreError, match=r"run is being written by another run; wait for it, or choose another"):
            with store.alone(folder):
                pass
        assert folder.is_dir()
    assert not folder.exists()  # nothing was written
    with store.alone(folder):
        (folder / "kept").touch()
    with store.alone(folder):
        pass
    assert (folder / "kept").exists()
    with pytest.raises(StoreError, match="kept cannot be made: File exists; choose another folder"):
        with store.alone(folder / "kept"):
            pass
