"""The air-gap bundle, with one tiny wheel in place of ours: what was changed on the way is not installed."""

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedtailor import seals, store
from fedtailor.errors import FedtailorError

ROOT = Path(__file__).parent.parent
BUNDLE = runpy.run_path(str(ROOT / "scripts" / "bundle.py"))


def tiny(folder, version="1.0"):
    """A wheel with one module; what the bundle's own verifier imports, it finds where this test does."""
    about = f"tiny-{version}.dist-info"
    with zipfile.ZipFile(folder / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", f"version = '{version}'\n")
        wheel.writestr(
            "tiny_deps.pth", "".join(f"{path}\n" for path in [str(Path(seals.__file__).parents[1]), *sys.path] if path)
        )
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        names = ["tiny.py", "tiny_deps.pth", f"{about}/METADATA", f"{about}/WHEEL", f"{about}/RECORD"]
        wheel.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in names))


@pytest.fixture
def bundle(tmp_path):
    made = tmp_path / "bundle"
    (made / "wheels").mkdir(parents=True)
    tiny(made / "wheels")
    seals.make_signer(tmp_path / "key", tmp_path / "key.pub")
    BUNDLE["seal"](made, tmp_path / "key")
    return made


def install(bundle, *key):
    """Run install.sh; its exit code and what it said, and the folder it was to make."""
    made = bundle.parent / "installed"
    done = subprocess.run(
        ["sh", str(bundle / "install.sh"), str(made), *map(str, key)],
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHON": sys.executable, "PIP_INDEX_URL": "https://nowhere.invalid/", "PIP_CONSTRAINT": "/nowhere"},
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, made


def sum_again(bundle):
    """Write the sums anew, as whoever changed a file would; the signature he cannot write."""
    (bundle / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in BUNDLE["summed"](bundle)))


def test_a_bundle_installs_what_it_lists_and_says_whose_it_is(bundle):
    tiny(bundle / "wheels", "2.0")  # planted: no list names it
    code, said, made = install(bundle, bundle.parent / "key.pub")
    assert code == 0, said
    asked = subprocess.run(
        [made / "bin" / "python", "-c", "import tiny; print(tiny.version)"], capture_output=True, text=True
    )
    assert asked.stdout == "1.0\n"
    assert "signed by the key " in said and len(said.split("signed by the key ")[1].splitlines()[0].split()) == 16


def test_a_changed_wheel_is_refused_before_anything_is_installed(bundle):
    with (bundle / "wheels" / "tiny-1.0-py3-none-any.whl").open("ab") as file:
        file.write(b"\0")
    code, said, made = install(bundle)
    assert code == 1 and "not what SHA256SUMS says" in said and not made.exists()


@pytest.mark.slow
def test_changed_sums_are_refused_and_what_was_installed_is_removed(bundle):
    (bundle / "MANIFEST.json").write_text((bundle / "MANIFEST.json").read_text() + "\n")
    sum_again(bundle)
    code, said, made = install(bundle)
    assert code == 1 and "is not signed by that key" in said and not made.exists()


@pytest.mark.slow
def test_a_wheel_whose_hash_is_not_in_the_requirements_is_refused(bundle):
    path = bundle / "wheels" / "tiny-1.0-py3-none-any.whl"
    path.unlink()
    tiny(bundle / "wheels")
    with zipfile.ZipFile(path, "a") as wheel:
        wheel.writestr("more.py", "")
    sum_again(bundle)
    code, said, made = install(bundle)
    assert code == 1 and "the wheels could not be installed" in said and not made.exists()


@pytest.mark.slow
def test_a_bundle_that_somebody_else_signed_is_refused_by_the_key_that_is_known(bundle):
    seals.make_signer(bundle.parent / "other", bundle.parent / "other.pub")
    BUNDLE["seal"](bundle, bundle.parent / "other")
    code, said, made = install(bundle, bundle.parent / "key.pub")
    assert code == 1 and "is not signed by that key" in said and not made.exists()


def test_a_bundle_for_another_python_or_into_a_folder_that_is_there_is_refused(bundle):
    manifest = bundle / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace(f'"{sys.version_info[0]}.{sys.version_info[1]}"', '"2.7"'))
    sum_again(bundle)
    code, said, made = install(bundle)
    assert code == 1 and "for Python 2.7" in said and not made.exists()
    made.mkdir()
    (made / "mine").touch()
    code, said, _ = install(bundle)
    assert code == 1 and "exists" in said and (made / "mine").exists()


def test_everything_in_it_is_summed_and_names_no_path_of_this_machine(bundle):
    summed = {line.split("  ")[1] for line in (bundle / "SHA256SUMS").read_text().splitlines()}
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files - summed == {"SHA256SUMS", "SHA256SUMS.sig"} and {"install.sh", "verify.py", "bundle.pub"} < summed
    texts = [path.read_text() for path in bundle.iterdir() if path.suffix in (".sh", ".py", ".json", ".txt")]
    assert len(texts) == 4 and not [text for text in texts if str(bundle.parent) in text or str(ROOT) in text]
    wheel = bundle / "wheels" / "tiny-1.0-py3-none-any.whl"
    assert (bundle / "requirements.txt").read_text() == f"tiny==1.0 --hash=sha256:{store.digest(wheel)}\n"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_it_as_install_sh_says(bundle):
    told = [
        line.removeprefix("#   ")
        for line in (bundle / "install.sh").read_text().splitlines()
        if line.startswith("#   ")
    ]
    script = "\n".join(told[1:]).replace("/tmp/signed", str(bundle.parent / "signed")).replace("KEY.pub", "../key.pub")
    for changed, code in ((False, 0), (True, 1)):
        if changed:
            (bundle / "SHA256SUMS").write_text((bundle / "SHA256SUMS").read_text() + "\n")
        done = subprocess.run(["sh", "-c", script], cwd=bundle, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr


def test_what_pip_says_when_it_fails_names_no_registry():
    with pytest.raises(FedtailorError, match="pip download failed") as error:
        BUNDLE["_run"](
            "pip", "download", "--retries", "0", "--no-deps", "https://ann:s3cret@127.0.0.1:9/tiny-1.0-py3-none-any.whl"
        )
    assert "s3cret" not in str(error.value) and "127.0.0.1" not in str(error.value)


def test_a_key_and_a_folder_that_are_there_are_not_replaced(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert BUNDLE["main"]([str(tmp_path / "out"), "--key", str(tmp_path / "key")]) == 1
    assert "exists" in capsys.readouterr().err and not (tmp_path / "key").exists()
