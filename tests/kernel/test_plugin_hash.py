"""What a site approves is every file of a plug-in, and what it approved is what its processes run."""

import py_compile
import sys
from importlib.util import cache_from_source

import plugged
import pytest

from fedtailor import Strategy, plugins
from fedtailor.config import build
from fedtailor.errors import ConfigError, RefusedError
from fedtailor.study import Spec


@pytest.fixture
def folder(tmp_path):
    with plugged.folder(tmp_path / "installed") as made:
        yield made


def made(target):
    return build(Spec.model_validate({"_target_": target}), Strategy)


@pytest.mark.parametrize("name", ["plug_m/__init__.py", "plug_m/other.py", "plug_m/configs/strategy/plug_m.yaml",
                                  "plug_m/weights.bin", "plug_m/new.py", "beside.py"])  # fmt: skip
def test_every_file_counts(folder, name):
    package = folder.install("plug_m", plug_m__other="", beside="")
    (package / "weights.bin").write_bytes(b"1")
    before = plugins.installed()[0].sha256()
    assert plugins.installed()[0].sha256() == before
    with (folder.path / name).open("a") as file:
        file.write("#")
    assert plugins.installed()[0].sha256() != before


def test_a_file_that_moves_counts_and_who_installed_it_does_not(folder):
    package = folder.install("plug_n", plug_n__a="x = 1\n", plug_n__b="")
    before = plugins.installed()[0].sha256()
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").touch()
    (folder.path / "plug_n-1.0.dist-info" / "INSTALLER").write_text("pip")
    (folder.path / "beside.py").touch()  # of somebody else
    assert plugins.installed()[0].sha256() == before
    (package / "b.py").rename(package / "c.py")  # still the last one, with the same text
    assert plugins.installed()[0].sha256() != before


@pytest.mark.parametrize("name", ["more", "more.py"])
def test_links_are_refused(folder, name):
    package = folder.install("plug_o")
    (package / name).symlink_to(folder.path)
    with pytest.raises(ConfigError, match=f"{name} is a link"):
        made("plug_o.mine")
    assert not folder.imported


def test_a_cache_that_holds_other_code_is_not_run(folder):
    package = folder.install("plug_p")
    evil = folder.path / "evil.py"
    evil.write_text(plugged.MODULE + "raise SystemExit('evil')\n")
    target = cache_from_source(str(package / "__init__.py"))
    py_compile.compile(str(evil), target, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    with pytest.raises(SystemExit, match="evil"):
        __import__("plug_p")  # as Python would
    folder.forget()
    before = sys.pycache_prefix, sys.dont_write_bytecode
    assert isinstance(made("plug_p.mine"), Strategy)
    assert (sys.pycache_prefix, sys.dont_write_bytecode) == before


# --- what a process may import ---


def test_a_process_of_a_site_imports_only_what_is_approved(folder):
    folder.install("plug_q")
    sha256 = plugins.installed()[0].sha256()
    for approved in ({}, {"plug_q": "0" * 64}, {"other": sha256}):
        plugins.only(approved)
        with pytest.raises(RefusedError, match=f"plug_q 1.0, sha256 {sha256}") as error:
            made("plug_q.mine")
        assert error.value.code == "plugin" and not folder.imported
    plugins.only({"plug_q": sha256})
    assert isinstance(made("plug_q.mine"), Strategy) and folder.imported


def test_what_changes_under_a_process_is_not_mixed(folder):
    package = folder.install("plug_r")
    made("plug_r.mine")
    (package / "__init__.py").write_text(plugged.MODULE + "\n")
    with pytest.raises(ConfigError, match="changed after this process had loaded it; start it again"):
        made("plug_r.mine")


def test_a_module_that_comes_from_elsewhere_is_not_taken_for_the_one_that_was_hashed(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "deep.py").write_text(plugged.MODULE)
    package = f"__path__.insert(0, {str(elsewhere)!r})"
    folder.install("plug_s", package, entry="s = plug_s.deep", plug_s__deep=plugged.MODULE)
    with pytest.raises(ConfigError, match="was loaded from .*elsewhere"):
        made("plug_s.deep.mine")
