"""Verify the signature over this bundle's SHA256SUMS, with fedtailor installed: python verify.py KEY.pub"""

import hashlib
import sys
from pathlib import Path

from fedtailor import seals
from fedtailor.errors import ConfigError


def main(key_file: str) -> int:
    """0 if SHA256SUMS is signed by the key in ``key_file``, 1 if it is not."""
    here = Path(__file__).parent
    try:
        key = seals.load_public(Path(key_file))
        signature = (here / "SHA256SUMS.sig").read_bytes().hex()
    except (ConfigError, OSError) as error:
        print(f"verify.py: {error}", file=sys.stderr)
        return 1
    if not seals.genuine(key, "bundle", (here / "SHA256SUMS").read_text(), signature):
        return 1
    digest = hashlib.sha256(bytes.fromhex(seals.spelled(key))).hexdigest()
    print("signed by the key " + " ".join(digest[i : i + 4] for i in range(0, 64, 4)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
