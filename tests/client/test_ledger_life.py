"""The ledger over a site's whole life, as hypothesis thinks it up."""

import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedtailor.client.ledger import Cap, Charge, Ledger
from fedtailor.client.signing import Signer
from fedtailor.errors import RefusedError
from fedtailor.privacy.accounting import epsilon

CHARGE, CAP = Charge(1.0, 0.032, 20), Cap(3.0, 1e-5)  # ten of these fit
SIGNER = Signer(ec.derive_private_key(20260101, ec.SECP384R1()))


class Crashes(RuleBasedStateMachine):
    """A site's life: work, crashes at any point, restarts, new names. Every release that could have left is counted."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger"
        self.ledger = Ledger(self.path, SIGNER)
        self.released: set[bytes] = set()  # keys whose noisy output may have been seen
        self.open: dict[int, bytes] = {}

    @rule(visit=st.integers(0, 4), account=st.sampled_from("ab"), again=st.booleans())
    def work(self, visit, account, again):
        what = {"account": account, "fingerprint": "f", "study": "s", "visit": str(visit), "charge": CHARGE}
        try:
            r = self.ledger.reserve(**what, cap=CAP, again=again)
        except RefusedError:
            return
        if r.key is not None:
            self.released.add(r.key)
            self.open[r.id] = r.key

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def settle(self, data):
        id = data.draw(st.sampled_from(sorted(self.open)))
        self.ledger.settle(id, self.open.pop(id).hex())

    @rule()
    def crash_inside_a_transaction(self):
        try:
            with self.ledger._journal.transaction():
                self.ledger._journal.append("reserve", "a", "f", "s", "x", 1.0, 0.032, 20, None, key=bytes(32))
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass

    @rule()
    def restart(self):
        self.ledger.close()
        self.ledger = Ledger(self.path, SIGNER)

    @invariant()
    def never_under_counts(self):
        counted = self.ledger.charges("a", "f")
        assert len(counted) == len(self.released)
        assert epsilon([CHARGE] * len(self.released), CAP.delta) <= CAP.epsilon

    def teardown(self):
        self.ledger.close()
        self.folder.cleanup()


TestCrashes = Crashes.TestCase
TestCrashes.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
