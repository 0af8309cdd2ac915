"""An invitation survives being pasted, and what is damaged is refused without repeating it."""

import time

import pytest

from fedtailor import pki
from fedtailor.errors import ConfigError
from fedtailor.invitation import BEGIN, END, Invitation, parse


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ca")
    pki.make_ca(folder, "CA")
    key = pki.new_key()
    certificate = pki.sign(folder, key.public_key(), "va", "invitation", days=0.5)
    ca = (folder / "ca.pem").read_text()
    return Invitation(site="va", server="hub:1", ca=ca, certificate=certificate, key=pki.secret_text(key))


@pytest.mark.parametrize("around", ["{}", "Dear all,\n\n{}\nKind regards", "> {}"])
def test_it_reads_as_it_was_written_whatever_stands_around_it(made, around):
    assert parse(around.format(made.text())) == made
    assert parse(around.format(made.text()).replace("\n", "\r\n  ")) == made
    assert max(map(len, made.text().splitlines())) <= 64
    assert abs(made.ends - time.time() - 12 * 3600) < 60


def test_its_secret_does_not_show(made):
    assert "PRIVATE KEY" in made.key and made.key not in repr(made) and "PRIVATE" not in repr(made)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text.replace(BEGIN, ""),
        lambda text: text.replace(END, ""),
        lambda text: text.replace(END, "A" * 70_000 + END),
        lambda text: text[:200] + text[210:],
        lambda text: text.replace("A", "%"),
        lambda text: f"{BEGIN}\ne30=\n{END}",
    ],
)
def test_what_is_damaged_is_refused_and_not_repeated(made, damage):
    with pytest.raises(ConfigError, match="--invitation: (there is no invitation|it is damaged)") as error:
        parse(damage(made.text()))
    assert made.text().splitlines()[2][:20] not in str(error.value) and error.value.__cause__ is None
