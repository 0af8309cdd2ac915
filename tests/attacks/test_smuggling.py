"""Ways to smuggle a row out of a site by a training process that has turned, each tried with the airlock and without.

The process is the real worker, in its cell, which trains honestly and then changes what it leaves for the daemon. What it
wants out is 40 bits of a patient's row. Without the airlock (whatever lies in the folder is sent as it is) every way
succeeds; with it, none does. What an allowed tensor can carry is not denied: ``client plans`` states it in bits a round.
"""

import json
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from turned import HUB, PLAN, Left, Site

from fedtailor.client import airlock, inbox, visits
from fedtailor.client.workshop import Workshop
from fedtailor.errors import FedtailorError


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory):
    made = Site(tmp_path_factory.mktemp("smuggling"))
    yield made
    made.workshop.stop()
    made.ledger.close()


class Open(NamedTuple):
    """An answer as a site without an airlock would store it."""

    report: Any
    payload: bytes
    reservation: int | None
    listed: dict[str, Any]


class Raw:
    """A report as the training process wrote it."""

    def __init__(self, text: str) -> None:
        known = json.loads(text)
        self.text, self.run, self.round, self.summand_sha256 = text, known["run"], known["round"], ""
        self.epsilon, self.metrics, self.baseline, self.rows, self.seconds = None, None, None, 0, 0.0

    def model_dump_json(self) -> str:
        return self.text


@pytest.fixture
def without_the_airlock(site, monkeypatch):
    """What lies in the folder is sent; a refusal is sent as it was worded; counts are believed."""
    left: list[Open] = []

    def admit(out, outbox, visit, leaves, policy, facts):
        files = sorted(path for path in out.iterdir() if path.suffix == ".safetensors")
        for path in files:
            left.append(Open(Raw((out / "work.json").read_text()), path.read_bytes(), None, {}))
        (outbox / inbox.key_of(visit)).mkdir(exist_ok=True)

    def release(post, envelope, stored, egress):
        for one in left or [stored]:
            post.left.heads.append(one.report.model_dump_json())
            post.left.payloads.append(one.payload)
        left.clear()

    def decline(post, envelope, code, egress):
        post.left.words.append(f"{code} {site.said}")

    def described(answer):
        return visits.Described(**answer)

    real = Workshop._ask

    def ask(self, op, limits, **request):
        try:
            return real(self, op, limits, **request)
        except FedtailorError as error:
            site.said = str(error)
            raise

    site.said = ""
    monkeypatch.setattr(Workshop, "_ask", ask)
    monkeypatch.setattr(airlock, "admit", admit)
    monkeypatch.setattr(airlock, "release", release)
    monkeypatch.setattr(airlock, "decline", decline)
    monkeypatch.setattr(visits, "read", described)
    monkeypatch.setattr(inbox, "stored", lambda outbox, visit: left[0] if left else None)


def digits(text: str) -> int:
    return int("".join(c for c in text if c.isdigit()) or "0")


def of_tensor(left: Left, name: str) -> torch.Tensor:
    from safetensors.torch import load

    return load(left.payloads[0])[name]


Way = tuple[str, Callable[[Left], Any]]
FIRST = "next(n for n in sorted(flat) if flat[n].dim() == 2)"
WAYS: dict[str, Way] = {
    "an extra tensor": (
        "flat['rows'] = torch.tensor(float(secret), dtype=torch.float64)",
        lambda left: int(of_tensor(left, "rows")),
    ),
    "an extra metric": ("report['metrics']['age'] = float(secret)", lambda left: int(left.report()["metrics"]["age"])),
    "a metric's name": (
        "report['metrics'][str(secret)] = 0.5",
        lambda left: next(int(name) for name in left.report()["metrics"] if name.isdigit()),
    ),
    "a metric's digits": (
        "report['metrics']['auroc'] = float(f'0.5{secret:013d}')",
        lambda left: int(f"{left.report()['metrics']['auroc']:.14f}"[3:]),
    ),
    "a large loss": ("report['metrics']['loss'] = float(secret)", lambda left: int(left.report()["metrics"]["loss"])),
    "metrics that were not asked for": (
        "report['baseline'] = {'auroc': float(f'0.5{secret:013d}')}",
        lambda left: int(f"{left.report()['baseline']['auroc']:.14f}"[3:]),
    ),
    "the bits of NaNs": (
        f"n = {FIRST}; raw = bytearray(save(flat)); size = int.from_bytes(raw[:8], 'little'); "
        "at = 8 + size + json.loads(raw[8:8 + size])[n]['data_offsets'][0]\n"
        "for i in range(2): raw[at + 4 * i:at + 4 * i + 4] = struct.pack('<I', 0x7fc00000 | (secret >> (20 * i)) & 0xfffff)\n"
        "raw = bytes(raw)",
        lambda left: sum((v & 0xFFFFF) << (20 * i) for i, v in enumerate(_words(left)[:2])),
    ),
    "which values are infinite": (
        f"n = {FIRST}; x = torch.zeros(1, 40); x[0] = torch.tensor([float('inf') if secret >> i & 1 else 0 for i in range(40)])\n"
        "x = torch.nn.functional.pad(x, (0, max(0, flat[n].numel() - 40)))[:, :flat[n].numel()]; flat[n] = x",
        lambda left: sum(1 << i for i, v in enumerate(_words(left)[:40]) if v == 0x7F800000),
    ),
    "an integer where a float was agreed": (
        "flat['weight'] = torch.tensor(secret, dtype=torch.int64)",
        lambda left: int(of_tensor(left, "weight")),
    ),
    "a double where a float was agreed": (
        "flat['weight'] = torch.tensor(float(secret), dtype=torch.float64)",
        lambda left: int(of_tensor(left, "weight")),
    ),
    "a value beyond the norm": (
        "flat['weight'] = torch.tensor(float(secret))",
        lambda left: float(of_tensor(left, "weight")),
    ),
    "a shape": (
        f"flat[{FIRST}] = torch.zeros(0, secret >> 20, secret & 0xfffff)",
        lambda left: next(
            (v["shape"][1] << 20) + v["shape"][2] for v in left.header().values() if len(v["shape"]) == 3
        ),
    ),
    "a longer tensor": (
        f"n = {FIRST}; flat[n] = torch.cat([flat[n], torch.tensor([[float(secret >> 20), float(secret & 0xfffff)] + [0.0] * (flat[n].shape[1] - 2)])])",
        lambda left: _last_row(left),
    ),
    "a tensor's name": (
        "flat[str(secret)] = flat.pop('weight')",
        lambda left: next(int(name) for name in left.header() if name.isdigit()),
    ),
    "text in the file": (
        "raw = save(flat, metadata={'note': str(secret)})",
        lambda left: int(left.header()["__metadata__"]["note"]),
    ),
    "fields in the file's header": (
        "whole = save(flat); size = int.from_bytes(whole[:8], 'little'); h = json.loads(whole[8:8 + size])\n"
        "h['weight']['note'] = str(secret); text = json.dumps(h).encode(); raw = len(text).to_bytes(8, 'little') + text + whole[8 + size:]",
        lambda left: int(left.header()["weight"]["note"]),
    ),
    "blanks in the file's header": (
        "whole = save(flat); size = int.from_bytes(whole[:8], 'little'); text = whole[8:8 + size].rstrip() + b' ' * (secret % 997)\n"
        "raw = len(text).to_bytes(8, 'little') + text + whole[8 + size:]",
        lambda left: _blanks(left),
    ),
    "the order of tensors in the file": (
        "h, data = {}, b''\n"
        "for n in reversed(sorted(flat)):\n"
        "    b = bytes(flat[n].contiguous().view(-1).view(torch.uint8).tolist()); "
        "h[n] = {'dtype': 'F32', 'shape': list(flat[n].shape), 'data_offsets': [len(data), len(data) + len(b)]}; data += b\n"
        "text = json.dumps(h).encode(); raw = len(text).to_bytes(8, 'little') + text + data",
        lambda left: list(left.header()),
    ),
    "bytes after the tensors": (
        "raw = save(flat) + str(secret).encode()",
        lambda left: digits(left.payloads[0][-13:].decode("latin1")),
    ),
    "a file much larger than agreed": (
        "flat['more'] = torch.tensor([float(secret >> 20), float(secret & 0xfffff)] + [0.0] * 100_000)",
        lambda left: (int(of_tensor(left, "more")[0]) << 20) + int(of_tensor(left, "more")[1]),
    ),
    "the number of rows": ("report['rows'] = secret", lambda left: left.report()["rows"]),
    "the number of training rows": ("report['train_rows'] = secret", lambda left: left.report()["train_rows"]),
    "epsilon": ("report['epsilon'] = float(secret)", lambda left: int(left.report()["epsilon"])),
    "seconds": (
        "report['seconds'] = float(f'0.{secret:013d}')",
        lambda left: int(f"{left.report()['seconds']:.13f}"[2:]),
    ),
    "the salt": ("report['salt'] = f'{secret:064x}'", lambda left: int(left.report()["salt"], 16)),
    "the hash": (
        "report['summand_sha256'] = f'{secret:064x}'",
        lambda left: int(left.report()["summand_sha256"], 16),
    ),
    "a signature": ("report['witness'] = f'{secret:064x}'", lambda left: int(left.report()["witness"], 16)),
    "a ledger's head": (
        "report['head'] = {'count': secret, 'hash': '', 'signature': ''}",
        lambda left: left.report()["head"]["count"],
    ),
    "the run's name": ("report['run'] = f'r{secret}'", lambda left: digits(left.report()["run"])),
    "the round's number": ("report['round'] = secret", lambda left: left.report()["round"]),
    "one more field": ("report['note'] = str(secret)", lambda left: int(left.report()["note"])),
    "the text of an error": ("raise FedtailorError(f'row {secret}')", lambda left: digits(left.words[0])),
    "the code of an error": (
        "raise FedtailorError('', code='x' + ''.join(chr(97 + int(d)) for d in str(secret)))",
        lambda left: int("".join(str(ord(c) - 97) for c in left.words[0].split()[0][1:] if c != "-")),
    ),
    "the text of a crash": ("raise KeyError(secret)", lambda left: digits(left.words[0])),
    "a second message": (
        "(out / 'zz.safetensors').write_bytes(save({'rows': torch.tensor(float(secret), dtype=torch.float64)}))",
        lambda left: int(struct.unpack("<d", left.payloads[-1][-8:])[0]),
    ),
}


def _words(left: Left) -> list[int]:
    payload = left.payloads[0]
    name = next(n for n, v in sorted(left.header().items()) if len(v["shape"]) == 2)
    begin, end = left.header()[name]["data_offsets"]
    size = int.from_bytes(payload[:8], "little")
    body = payload[8 + size + begin : 8 + size + end]
    return [word for (word,) in struct.iter_unpack("<I", body)]


def _last_row(left: Left) -> int:
    name = next(n for n, v in sorted(left.header().items()) if len(v["shape"]) == 2)
    row = of_tensor(left, name)
    if row.shape[0] < 2:
        return 0
    return (int(row[-1, 0]) << 20) + int(row[-1, 1])


def _blanks(left: Left) -> int:
    size = int.from_bytes(left.payloads[0][:8], "little")
    header = left.payloads[0][8 : 8 + size]
    return len(header) - len(header.rstrip())


def wanted(way: str, secret: int, names: list[str]) -> Any:
    """What a way brings out: the secret, or as much of it as the way can carry."""
    if way == "a value beyond the norm":
        return float(torch.tensor(float(secret)))
    if way == "blanks in the file's header":
        return secret % 997
    if way == "the order of tensors in the file":
        return list(reversed(sorted(names)))
    return secret


def brought_out(decode: Callable[[Left], Any], left: Left) -> Any:
    try:
        return decode(left)
    except (KeyError, IndexError, StopIteration, ValueError, TypeError, struct.error, OverflowError):
        return None


@pytest.mark.parametrize("way", WAYS)
def test_what_gets_out_without_the_airlock(site, without_the_airlock, way):
    attack, decode = WAYS[way]
    left = site.round(attack)
    names = list(HUB.propose(PLAN).leaves.spec())
    assert brought_out(decode, left) == wanted(way, site.secret, names)


@pytest.mark.parametrize("way", WAYS)
def test_does_not_get_out_with_it(site, way):
    attack, decode = WAYS[way]
    left = site.round(attack)
    names = list(HUB.propose(PLAN).leaves.spec())
    assert brought_out(decode, left) != wanted(way, site.secret, names)
    everything = " ".join([*left.heads, *left.words]) + repr(left.payloads)
    assert str(site.secret) not in everything and f"{site.secret:x}" not in everything
    assert len(left.heads) + len(left.words) == 1  # an answer, or a word why there is none
    assert set(left.words) <= airlock.WORDS


def test_rows_cannot_be_counted_as_somebody_likes(site):
    left = site.round("answer['rows'] = secret", at="describe")
    assert left.heads == [] and left.words == ["worker"]
    left = site.round("answer['notes'] = [str(secret)]", at="describe")
    assert str(site.secret) not in left.heads[0]


def test_the_same_question_brings_the_same_answer(site):
    """A process that answers each repetition differently would have as many messages as it likes."""
    turns = "flat['weight'] = torch.tensor(float(int.from_bytes(os.urandom(1), 'little')))"
    left = site.round(turns, times=3)
    assert len(left.heads) == 3 and len(set(left.payloads)) == 1
    assert len({json.loads(text)["summand_sha256"] for text in left.heads}) == 1


def test_an_answer_cannot_be_planted_before_it_is_asked_for(site):
    """Early: the outbox is not the training process's to write. Its cell forbids it."""
    planted = (
        f"folder = Path({str(site.home.outbox)!r}) / 'planted'\n"
        "try:\n    folder.mkdir(); (folder / 'payload').write_text(str(secret))\nexcept OSError: pass"
    )
    site.round(planted)
    if site.workshop.confinement is None or not site.workshop.confinement.files:
        pytest.skip("this host offers no Landlock")
    assert not (site.home.outbox / "planted").exists()


def test_what_the_process_prints_stays_in_the_sites_own_log(site):
    left = site.round("print(secret); sys.stderr.write(f'row {secret}\\n')")
    assert str(site.secret) in site.log.read_text()
    assert str(site.secret) not in left.heads[0]


def test_the_rows_of_a_site_are_not_told_apart_by_what_it_is_allowed_to_say(site):
    """What is left: the plan says how many bits its tensors could carry, and each metric at most 14."""
    leaves = HUB.propose(PLAN).leaves
    assert leaves.bits() == 32 * sum(leaf.numel() for leaf in _tensors(leaves))
    assert len({leaves.rounded({"auroc": value / 20_000})["auroc"] for value in range(20_001)}) <= 2**14


def _tensors(leaves):
    return [torch.empty(shape, dtype=dtype) for dtype, shape in leaves.spec().values()]


def test_a_study_stops_here_with_the_first_attempt(site):
    left = site.round(WAYS["an extra tensor"][0], times=2)
    assert left.words == ["airlock-keys", "stopped"]
