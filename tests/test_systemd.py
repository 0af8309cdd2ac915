"""The service files: they parse, they start commands that exist, and they leave the training process what it confines itself with."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from fedtailor.cli import app
from fedtailor.client import confine

FOLDER = Path(__file__).parent.parent / "scripts" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
SYSTEM = [unit for unit in UNITS if "user" not in unit.stem]
KNOWN = {
    "Unit": "Description Wants After StartLimitIntervalSec",
    "Service": "User Group ExecStart EnvironmentFile WorkingDirectory Restart RestartSec RestartPreventExitStatus KillMode "
    "TimeoutStopSec UMask MemoryMax LimitCORE StateDirectory StateDirectoryMode ReadWritePaths ProtectSystem ProtectHome "
    "PrivateTmp PrivateDevices ProtectProc ProtectClock ProtectControlGroups ProtectHostname ProtectKernelLogs "
    "ProtectKernelModules ProtectKernelTunables NoNewPrivileges CapabilityBoundingSet AmbientCapabilities LockPersonality "
    "RestrictRealtime RestrictSUIDSGID RemoveIPC KeyringMode RestrictAddressFamilies RestrictNamespaces "
    "SystemCallArchitectures SystemCallFilter SystemCallErrorNumber",
    "Install": "WantedBy",
}
HARD = {"NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes",
        "CapabilityBoundingSet": "", "Restart": "always", "UMask": "0077"}  # fmt: skip
needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def parsed(unit):
    """Its lines as (section, key, value)."""
    found, section = [], ""
    for line in unit.read_text().splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            section = heading[1]
        elif line and not line.startswith("#"):
            key, sign, value = line.partition("=")
            assert sign and section and key.isalnum(), f"{unit.name}: {line}"
            found.append((section, key, value))
    return found


def values(unit, key):
    return [value for _, each, value in parsed(unit) if each == key]


def test_there_are_three():
    assert [unit.stem for unit in UNITS] == ["fedtailor-client-user", "fedtailor-client", "fedtailor-server"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_every_line_is_known_where_it_stands(unit):
    assert all(key in KNOWN[section].split() for section, key, _ in parsed(unit))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_what_it_starts_is_a_command(unit):
    (line,) = values(unit, "ExecStart")
    program, *words = line.split()
    assert Path(program).name == "fedtailor" and program.startswith(("/", "%h/"))
    command, context = get_command(app), None
    while hasattr(command, "commands"):
        context = command.make_context(words[0], [], parent=context, resilient_parsing=True)
        command = command.commands[words[0]]
        words = words[1:]
    asked = command.make_context(command.name, words, parent=context).params
    assert command.name == "up" and str(asked["home"]).startswith(("/var/lib/fedtailor", "%h/"))


@pytest.mark.parametrize("unit", SYSTEM, ids=lambda unit: unit.stem)
def test_a_service_of_the_system_has_a_user_of_its_own_and_one_place_to_write(unit):
    assert {key: values(unit, key) for key in HARD} == {key: [value] for key, value in HARD.items()}
    (user,), (home,) = values(unit, "User"), values(unit, "ReadWritePaths")
    assert user == unit.stem.removesuffix("-client") and home == f"/var/lib/{user}"
    assert f"--home {home}/" in values(unit, "ExecStart")[0] and values(unit, "StateDirectory") == [user]


@pytest.mark.parametrize("unit", [unit for unit in UNITS if "client" in unit.stem], ids=lambda unit: unit.stem)
def test_the_training_process_may_enter_its_namespaces(unit):
    kinds = {"user": confine.CLONE_NEWUSER, "net": confine.CLONE_NEWNET, "ipc": confine.CLONE_NEWIPC}
    assert set(values(unit, "RestrictNamespaces")[0].split()) == set(kinds)
    assert not [k for k in ("MemoryDenyWriteExecute", "PrivateUsers", "ProcSubset") if values(unit, k)]


def members(name):
    """The system calls of a set, and of the sets in it."""
    told = subprocess.run(
        ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
    ).stdout
    words = [line.strip() for line in told.splitlines()[1:] if not line.strip().startswith("#")]
    return {call for word in words for call in (members(word) if word.startswith("@") else {word})}


@needs_analyze
@pytest.mark.parametrize("unit", [unit for unit in UNITS if "client" in unit.stem], ids=lambda unit: unit.stem)
def test_the_filter_lets_through_what_confinement_calls(unit):
    words = " ".join(values(unit, "SystemCallFilter")).split()
    allowed = {call for word in words for call in (members(word) if word.startswith("@") else {word})}
    needed = {"unshare", "capset", "prctl", "seccomp", "prlimit64", "setrlimit", "landlock_create_ruleset",
              "landlock_add_rule", "landlock_restrict_self"}  # fmt: skip
    assert needed <= allowed and not allowed & {"mount", "ptrace", "bpf", "init_module", "reboot"}


@needs_analyze
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_itself_finds_nothing_wrong(unit, tmp_path):
    copy = tmp_path / unit.name
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE))
    scope = ["--user"] if "user" in unit.stem else []
    done = subprocess.run(
        ["systemd-analyze", *scope, "verify", str(copy)],
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
