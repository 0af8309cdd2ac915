"""The training process, a real one: it knows no secrets, its death is mended, and it ends when the daemon does."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fedtailor
from fedtailor.client.site import SiteConfig
from fedtailor.client.workshop import WorkerDied, WorkerStopped, Workshop
from fedtailor.config import load
from fedtailor.datasets import heart_disease, write_csv
from fedtailor.errors import ContractError, FedtailorError

RECIPE = load(["study=heart"]).plan.recipe.model_dump(by_alias=True)
SECRETS = {
    "HTTPS_PROXY": "http://user:password@proxy:3128",
    "all_proxy": "http://proxy",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "FEDTAILOR_TOKEN": "secret",
}


def table(path):
    write_csv({name: cells[:60] for name, cells in heart_disease()["va"].table().items()}, path)


def config(folder):
    return SiteConfig.model_validate({
        "site": "va",
        "server": "hub.example:8443",
        "keys": str(folder / "keys"),
        "data": {"name": "heart", "path": str(folder / "data.csv")},
        "policy": {"studies": ["heart"], "epsilon": 8.0, "delta": 1e-4},
    })  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A workshop at work, started in an environment full of secrets, by a process that holds the key open."""
    folder = tmp_path_factory.mktemp("site")
    table(folder / "data.csv")
    (folder / "keys").mkdir()
    (folder / "keys" / "site.key").write_text("the key")
    it = Workshop(config(folder), folder / "worker.log")
    with pytest.MonkeyPatch.context() as patch, (folder / "keys" / "site.key").open() as key:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        os.set_inheritable(key.fileno(), True)
        it.start()
        yield it
    it.stop()


@pytest.fixture
def data(shop):
    """The table, given back after the test."""
    path = shop.config.data.path
    whole = path.read_bytes()
    describe(shop)  # by the process that this very file was given to
    yield path
    path.unlink(missing_ok=True)
    path.write_bytes(whole)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Workshops whose process is a shell script, which answers the first request."""
    made = []

    def with_script(script):
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\nread start; echo '{{}}'; read request; {script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        made.append(Workshop(config(tmp_path), tmp_path / "worker.log"))
        return made[0]

    yield with_script
    made[0].stop()


def describe(shop):
    return shop.ask(op="describe", recipe=RECIPE)


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


# --- what it does ---


def test_it_describes_the_data_without_showing_them(shop):
    answer = describe(shop)
    assert set(answer) == {"fingerprint", "rows", "train_rows", "test_rows", "notes"}
    assert answer["rows"] == 60 == answer["train_rows"] + answer["test_rows"] and len(answer["fingerprint"]) == 64
    assert describe(shop) == answer


def test_data_that_break_the_contract_are_an_error_and_the_process_lives(shop, data):
    pid, whole = shop.pid, data.read_text()
    data.write_text(whole.replace("chol", "chl", 1))
    with pytest.raises(FedtailorError, match="column 'chol' is missing; rename 'chl'") as error:
        describe(shop)
    assert error.value.code == ContractError.code
    data.unlink()
    with pytest.raises(FedtailorError, match="cannot read") as error:
        describe(shop)
    assert error.value.code == ContractError.code
    assert shop.pid == pid
    data.write_text(whole)
    assert describe(shop)["rows"] == 60


def test_data_that_were_replaced_are_read_by_a_new_process(shop, data):
    """The kernel lets a process read the file that lay there when it started, not another under its name."""
    pid, draft = shop.pid, data.with_name("draft.csv")
    data.write_text(data.read_text())
    assert describe(shop)["rows"] == 60 and shop.pid == pid, "the same file, written again"
    draft.write_text("".join(data.read_text().splitlines(keepends=True)[:41]))
    draft.replace(data)
    assert describe(shop)["rows"] == 40 and shop.pid != pid


def test_a_bug_is_an_error_and_the_process_lives(shop):
    describe(shop)
    pid = shop.pid
    with pytest.raises(FedtailorError, match="KeyError") as error:
        shop.ask(op="no such operation")
    assert error.value.code == "crashed"
    with pytest.raises(FedtailorError) as error:
        shop.ask(op="describe", recipe={"_target_": "os.system", "command": "true"})
    assert error.value.code == "untrusted"
    assert describe(shop)["rows"] == 60 and shop.pid == pid


# --- what it does not know ---


def test_no_proxy_password_and_no_token_is_in_its_environment(shop):
    names = {line.partition(b"=")[0].decode() for line in Path(f"/proc/{shop.pid}/environ").read_bytes().split(b"\0")}
    assert "PATH" in names and not names & set(SECRETS) and not [n for n in names if "PROXY" in n.upper()]
    assert os.environ["HTTPS_PROXY"] == SECRETS["HTTPS_PROXY"]  # while the daemon has it


def test_it_holds_no_file_of_the_daemons_but_its_own_pipes_and_log(shop):
    key = str(shop.config.keys / "site.key")
    ours = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}  # fmt: skip
    assert key in ours
    theirs = {fd: os.readlink(f"/proc/{shop.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{shop.pid}/fd")}
    assert key not in theirs.values()
    assert not [path for path in theirs.values() if path.startswith("socket:") and path in ours]
    assert theirs["0"].startswith("pipe:") and theirs["1"] == theirs["2"] == str(shop.log)


def test_the_path_of_the_key_is_not_told_to_it(shop):
    keys = os.fsencode(shop.config.keys)
    assert keys not in Path(f"/proc/{shop.pid}/cmdline").read_bytes()
    assert keys not in Path(f"/proc/{shop.pid}/environ").read_bytes()


def test_nothing_is_imported_from_the_folder_that_the_daemon_was_started_in(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "socket.py").write_text("raise SystemExit(3)")
    arguments = {"env": shop._environment(), "stdin": subprocess.DEVNULL, "check": False}
    command = shop._command()
    assert subprocess.run(command, **arguments).returncode == 0
    assert subprocess.run([part for part in command if part != "-P"], **arguments).returncode == 3


def test_it_runs_the_code_that_the_daemon_runs(shop, monkeypatch):
    """Also where that is a checkout in which the daemon was started, while another one is installed."""
    root = Path(fedtailor.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.chdir("/")
    assert shop._environment()["PYTHONPATH"] == "/elsewhere"
    monkeypatch.chdir(root)
    assert shop._environment()["PYTHONPATH"] == f"{root}{os.pathsep}/elsewhere"


# --- its death ---


def test_a_process_that_was_killed_before_a_request_is_started_again(shop):
    before, known = shop.pid, describe(shop)
    (shop.scratch / "left").write_text("half of something")
    os.kill(before, signal.SIGKILL)
    assert describe(shop) == known and shop.pid not in (None, before)
    assert not Path(f"/proc/{before}").exists() and not (shop.scratch / "left").exists()


def test_a_request_whose_process_is_killed_in_it_is_asked_again(shop, data):
    """The data are a pipe that nobody writes to, so that the process is in the middle of reading them."""
    whole, answers = data.read_bytes(), []
    data.unlink()
    os.mkfifo(data)
    asking = threading.Thread(target=lambda: answers.append(describe(shop)))
    asking.start()
    writer = os.open(data, os.O_WRONLY)  # returns when the process has opened the other end
    first = shop.pid
    data.unlink()
    data.write_bytes(whole)
    os.kill(first, signal.SIGKILL)
    os.close(writer)
    asking.join()
    assert answers[0]["rows"] == 60 and shop.pid != first


def test_a_request_that_kills_every_process_is_given_up(fake, tmp_path):
    shop = fake(f'echo died >> "{tmp_path}/starts"; exit 7')
    with pytest.raises(WorkerDied, match="ended with code 7 during describe; its log is .*worker.log"):
        describe(shop)
    assert (tmp_path / "starts").read_text().count("died") == 3 and shop.pid is None


def test_half_an_answer_is_no_answer(fake):
    with pytest.raises(WorkerDied, match="code 0 during describe"):
        describe(fake("printf '{\"rows\": 6'"))


def test_stopping_while_the_process_is_being_started_ends_it_too(fake, monkeypatch):
    shop, start = fake("echo '{}'"), subprocess.Popen

    def stopped_meanwhile(*arguments, **options):
        shop.closed = True  # stop() has come this far and found no process
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", stopped_meanwhile)
    with pytest.raises(WorkerStopped):
        describe(shop)
    assert shop.process is None


def test_it_dies_with_the_daemon(tmp_path):
    """Also when the daemon is killed in the middle of a request, and cannot say goodbye."""
    os.mkfifo(tmp_path / "data.csv")
    program = (
        "import json, sys; from pathlib import Path; from fedtailor.client.site import SiteConfig;"
        "from fedtailor.client.workshop import Workshop;"
        "shop = Workshop(SiteConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]));"
        "shop.start(); print(shop.pid, flush=True); shop.ask(op='describe', recipe=json.loads(sys.argv[3]))"
    )
    given = [config(tmp_path).model_dump_json(), str(tmp_path / "log"), json.dumps(RECIPE)]
    with subprocess.Popen([sys.executable, "-c", program, *given], stdout=subprocess.PIPE, text=True) as daemon:
        worker = int(daemon.stdout.readline())
        handle, writer = os.pidfd_open(worker), os.open(tmp_path / "data.csv", os.O_WRONLY)
        daemon.kill()
        assert select.select([handle], [], [], 60)[0]  # it has ended
    os.close(handle)
    os.close(writer)


def test_stopping_ends_a_request_that_is_under_way_and_leaves_no_process(shop, data):
    """The last test of this file: the workshop is closed for good."""
    outcome = []
    data.unlink()
    os.mkfifo(data)

    def ask():
        try:
            outcome.append(describe(shop))
        except WorkerStopped as stopped:
            outcome.append(stopped)

    asking = threading.Thread(target=ask)
    asking.start()
    writer = os.open(data, os.O_WRONLY)
    pid = shop.pid
    shop.stop()
    asking.join()
    os.close(writer)
    assert isinstance(outcome[0], WorkerStopped) and shop.pid is None and not Path(f"/proc/{pid}").exists()
    with pytest.raises(WorkerStopped):
        describe(shop)
    shop.stop()  # again does no harm
    assert str(pid) not in children(os.getpid())
