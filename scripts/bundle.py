"""Make an air-gap bundle: the wheels of fedtailor and of all it needs, their hashes, a signature, and what installs them.

It is for hosts like this one: the same Python and the same platform.
"""

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedtailor import seals, store
from fedtailor.errors import ConfigError, FedtailorError

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "fedtailor.bundle/1"
EXTRAS = "plots"
FROM_SOURCE = "antlr4-python3-runtime,iterators"  # pure Python, of which there are no wheels: built here
UNSUMMED = ("SHA256SUMS", "SHA256SUMS.sig")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--key", type=Path, required=True, help="an Ed25519 key; it and FILE.pub are made if missing")
    given = parser.parse_args(arguments)
    try:
        if given.out.exists():
            raise ConfigError(f"{given.out} exists; name a folder that does not")
        if not given.key.exists():
            seals.make_signer(given.key, given.key.with_name(given.key.name + ".pub"))
        seals.load_signer(given.key)  # before an hour of downloads
        with tempfile.TemporaryDirectory() as work:
            draft = Path(work) / "bundle"
            (draft / "wheels").mkdir(parents=True)
            collect(draft / "wheels", Path(work))
            seal(draft, given.key)
            shutil.copytree(draft, given.out)
    except FedtailorError as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 1
    files = [path for path in given.out.rglob("*") if path.is_file()]
    print(f"{given.out}: {len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:.0f} MB")
    return 0


def collect(wheels: Path, work: Path) -> None:
    """Build fedtailor's wheel, and gather those of its dependencies at the pinned versions; torch first, as in the Makefile."""
    _run("build", "--quiet", "--wheel", "--no-isolation", "--outdir", str(wheels), str(ROOT))
    (ours,) = wheels.iterdir()
    pinned = [
        "-c",
        str(ROOT / "constraints.txt"),
        "--only-binary",
        ":all:",
        "--no-binary",
        FROM_SOURCE,
        "-w",
        str(wheels),
    ]
    for what in ("torch", f"{ours}[{EXTRAS}]"):
        _run("pip", "wheel", "--quiet", "--disable-pip-version-check", *pinned, what)


def seal(folder: Path, key: Path) -> None:
    """Write everything but the wheels into ``folder``: what installs them, the sums, and the signature over the sums."""
    signer = seals.load_signer(key)
    for path in sorted((ROOT / "scripts" / "air_gap").iterdir()):
        if path.is_file():
            shutil.copy(path, folder / path.name)
    found = sorted((folder / "wheels").glob("*.whl"))
    versions = {path.name.split("-")[0]: path.name.split("-")[1] for path in found}
    lines = [
        f"{name}=={versions[name]} --hash=sha256:{store.digest(path)}"
        for name, path in zip(versions, found, strict=True)
    ]
    store.write_text(folder / "requirements.txt", "\n".join(lines) + "\n", mode=0o644)
    manifest = {
        "schema": SCHEMA,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "platform": sysconfig.get_platform(),
        "versions": versions,
    }
    store.write_json(folder / "MANIFEST.json", manifest, mode=0o644)
    store.write_text(folder / "bundle.pub", public_text(signer), mode=0o644)
    sums = "".join(f"{digest}  {name}\n" for name, digest in summed(folder))
    store.write_text(folder / "SHA256SUMS", sums, mode=0o644)
    store.write_bytes(folder / "SHA256SUMS.sig", bytes.fromhex(seals.sign(signer, "bundle", sums)), mode=0o644)


def public_text(signer: Ed25519PrivateKey) -> str:
    """The public key in PEM, for people to keep."""
    return signer.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def summed(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file but the sums and their signature, by its path in the bundle, and its SHA-256."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in UNSUMMED:
            yield path.relative_to(folder).as_posix(), store.digest(path)


def _run(module: str, *arguments: str) -> None:
    """Run a module of this Python; what it says is shown only if it fails, and names no registry."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = re.sub(r"\w+://[^\s/]+|host='[^']*'", "<registry>", done.stdout + done.stderr)
        raise FedtailorError(f"{module} {arguments[0]} failed:\n{said[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
