"""Ways to smuggle 40 bits of a row out: what a training process does with its outcome, and how they are read again."""

import struct
from collections.abc import Callable
from typing import Any

import torch
from turned import Left


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
    "metrics of a model that the plan does not give the site": (
        "report['personal'] = {'auroc': float(f'0.5{secret:013d}')}",
        lambda left: int(f"{left.report()['personal']['auroc']:.14f}"[3:]),
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
