"""What a site's own host says of itself before anything runs, or when something is wrong: one row a check.

It works with the daemon up or down, changes nothing of the site, and sends nothing but a TLS handshake and GET /health.
"""

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedtailor import control, plugins
from fedtailor.client import papers, route, verify_audit
from fedtailor.client.audit import gather
from fedtailor.client.confine import Confinement
from fedtailor.client.finding import Row, tried, unchecked
from fedtailor.client.ledger import Ledger
from fedtailor.client.site import Home, SiteConfig
from fedtailor.client.workshop import Workshop
from fedtailor.config import build, choices, load
from fedtailor.contract import Contract, check
from fedtailor.errors import ContractError, FedtailorError, StoreError
from fedtailor.proposal import parsed
from fedtailor.recipe import Recipe
from fedtailor.sources import CsvSource
from fedtailor.study import Spec

MESSAGES = 3  # of the greatest size: one in the inbox, one in the outbox, one on its way
LIBRARIES_MB = 600  # of memory, for the training process to start
MOST_PROBLEMS = 100  # of the data, told at once
WITHIN = (
    "keys",
    "certificate",
    "consortium",
    "plans.pub",
    "proxy",
    *route.AFTER,
    "disk",
    "memory",
    "records",
    "data",
    "worker",
)


class Site(NamedTuple):
    """What the checks look at."""

    home: Home
    config: SiteConfig
    recipe: str | None  # the name of an installed one; None: of the newest proposal, or of the site's study


def examine(folder: Path, recipe: str | None = None) -> list[Row]:
    """Every check's rows, in the order in which one rests on another. It raises nothing.

    Args:
        folder: the site's home.
        recipe: whose contract the data are held against; None: the newest proposal's, or the site's study's.
    """
    home, now = Home(folder), time.time()
    rows = tried("home", lambda: _home(home))
    try:
        site = Site(home, home.config(), recipe)
    except FedtailorError as error:
        unreadable = Row("site.yaml", "wrong", str(error), "mend the line; docs/sites.md shows a whole site.yaml")
        rows += tried("site.yaml", lambda: [unreadable])
        rows += [unchecked(name, "site.yaml") for name in WITHIN]
        return rows + tried("daemon", lambda: _daemon(home))
    config = site.config
    plugins.only(config.policy.plugins)
    rows += tried("site.yaml", lambda: _settings(site))
    rows += tried("keys", lambda: papers.files(config))
    rows += tried("certificate", lambda: papers.certificate(config, now))
    rows += tried("consortium", lambda: papers.authority(config, now))
    rows += tried("plans.pub", lambda: papers.plans(config))
    rows += tried("proxy", lambda: route.checks(config))
    rows += tried("disk", lambda: _disk(site))
    rows += tried("memory", lambda: _memory(site, *host_memory()))
    rows += tried("records", lambda: _records(site))
    rows += tried("data", lambda: _data(site))
    held = next(row.state for row in reversed(rows) if row.name == "data") == "ok"
    rows += tried("worker", lambda: _worker(site, held))
    return rows + tried("daemon", lambda: _daemon(home))


def _home(home: Home) -> Iterator[Row]:
    if not home.folder.is_dir():
        yield Row(
            "home", "wrong", f"{home.folder} is not there", "name the site's folder: --home, or FEDTAILOR_SITE_HOME"
        )
        return
    info = os.stat(home.folder)
    if info.st_mode & 0o077:
        found = f"{home.folder} has mode {info.st_mode & 0o777:o}, which lets others in"
        yield Row("home", "wrong", found, f"chmod 700 {home.folder}")
    elif info.st_uid != os.geteuid():
        found = f"{home.folder} belongs to user {info.st_uid}, and this is user {os.geteuid()}"
        yield Row("home", "warning", found, "run this as the daemon's user: what follows is only true of this one")
    else:
        yield Row("home", "ok", f"{home.folder}, its owner's alone")


def _settings(site: Site) -> Iterator[Row]:
    path, policy = site.home.folder / "site.yaml", site.config.policy
    if os.stat(path).st_mode & 0o022:
        yield Row("site.yaml", "wrong", f"{path} can be changed by others, and with it the policy", f"chmod 600 {path}")
    else:
        allowed = f"studies {', '.join(policy.studies)}; epsilon {policy.epsilon:g} at delta {policy.delta:g}"
        yield Row("site.yaml", "ok", f"{site.config.site} for {site.config.server}; {allowed}")


def _disk(site: Site) -> Iterator[Row]:
    state = site.home.state
    free = shutil.disk_usage(state).free // 2**20
    needed = MESSAGES * site.config.policy.max_download_mb
    try:
        with tempfile.TemporaryFile(dir=state, buffering=0) as file:
            file.write(bytes(2**16))
    except OSError as error:
        mend = "make room on the disk, or let the daemon's user own the folder"
        yield Row("disk", "wrong", f"nothing can be written in {state}: {error.strerror}; {free} MB are free", mend)
        return
    if free < needed:
        found = f"{free} MB are free at {state}; {MESSAGES} messages of policy.max_download_mb take {needed} MB"
        yield Row("disk", "warning", found, "make room, or lower policy.max_download_mb to what your studies need")
    else:
        yield Row("disk", "ok", f"{free} MB are free at {state}")


def host_memory() -> tuple[int, int]:
    """Megabytes of this host, or of the control group that this shell is in; and what of them is free to use."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = free = os.sysconf("SC_PHYS_PAGES") * page // 2**20
    if sys.platform != "linux":
        return total, free
    if found := re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE):
        free = int(found[1]) // 1024
    group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
    at = Path("/sys/fs/cgroup") / group.lstrip("/")
    for limit in (folder / "memory.max" for folder in (at, *at.parents)):
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text) // 2**20)
    return total, min(free, total)


def _memory(site: Site, total: int, free: int) -> Iterator[Row]:
    allowed = site.config.policy.task_memory_mb
    found = f"{free} of {total} MB are free; policy.task_memory_mb allows the training process {allowed}"
    if total < allowed:
        yield Row(
            "memory", "warning", found, "lower it below what there is: else this host runs out first, and ends others"
        )
    elif free < min(allowed, LIBRARIES_MB):
        yield Row(
            "memory", "warning", found, f"close other programs: the training process takes {LIBRARIES_MB} MB to start"
        )
    else:
        yield Row("memory", "ok", found)


def _records(site: Site) -> Iterator[Row]:
    """Each hash of the three logs, the last signature under each key, and that the logs agree with each other."""
    try:
        gathered = gather(site.home, site.config)
        ca = (site.config.keys / "ca.pem").read_bytes()
        wrong, _ = verify_audit.examine(gathered, ca=ca, every=False)
    except (OSError, *verify_audit.MALFORMED) as error:
        raise StoreError(f"they cannot be verified: {type(error).__name__}: {error}") from error
    mend = "keep the files as they are, restore the newest copies, and see: fedtailor client audit verify"
    if wrong:
        yield Row("records", "wrong", "; ".join(wrong), mend)
        return
    if gathered["ledger"] and gathered["ledger"][-1]["signature"] is not None:  # else opening would convert it
        Ledger(site.home.state / "ledger.db").close()  # its keys and its count, beside what is exported
    counts = ", ".join(f"{len(gathered[log])} of the {log}" for log in verify_audit.LOGS)
    yield Row("records", "ok", f"{counts}: every hash fits, and the last signature of each")


def _data(site: Site) -> Iterator[Row]:
    path = site.config.data.path
    if not path.is_file():
        yield Row("data", "wrong", f"{path} is not a file", "set data.path in site.yaml")
        return
    table = CsvSource(path).table()
    spec, whose = recipe_of(site)
    if spec is None:
        count = len(next(iter(table.values()), ()))
        found = f"{path}: {count} rows; no contract to hold them against: no plan has come yet, and no installed study "
        yield Row("data", "warning", found + "is in policy.studies", "name an installed recipe: --recipe NAME")
        return
    recipe = build(spec, Recipe)
    try:
        if recipe.contract:
            check(Contract.model_validate_json(recipe.contract), table, MOST_PROBLEMS)
        made = recipe.prepare(table)
    except ContractError as error:
        mend = "mend the file, or ask for another contract; what is found may quote rows: do not send it on"
        yield Row("data", "wrong", f"{path} does not satisfy the contract of {whose}: {error}", mend)
        return
    notes = "".join(f"; {note}" for note in made.notes)
    yield Row("data", "ok", f"{path}: {made.rows} rows satisfy the contract of {whose}{notes}")


def recipe_of(site: Site) -> tuple[Spec | None, str]:
    """The recipe that the data are for, and whose it is in words."""
    if site.recipe is not None:
        return load([f"recipe={site.recipe}"]).plan.recipe, f"recipe {site.recipe}"
    proposals = [parsed(path.read_text()) for path in (site.home.state / "plans").glob("*/proposal.json")]
    if proposals:
        newest = max(proposals, key=lambda each: each.created)
        return newest.plan.recipe, f"run {newest.run}"
    for study in site.config.policy.studies:
        if study in choices("study"):
            return load([f"study={study}"]).plan.recipe, f"study {study}"
    return None, ""


def _worker(site: Site, held: bool) -> Iterator[Row]:
    """Start a training process of the doctor's own, as the daemon does, and let it read the data."""
    with tempfile.TemporaryDirectory(dir=site.home.state, prefix=".doctor-") as folder:
        config = site.config.model_copy(update={"confinement": "best"})
        shop = Workshop(config, Path(folder) / "worker.log")
        try:
            shop.start()
            yield confined(site.config, shop.confinement or Confinement())
            if held and (spec := recipe_of(site)[0]) is not None:
                shop.ask(op="describe", recipe=spec.model_dump(mode="json", by_alias=True))
        except FedtailorError as error:
            log = shop.log.read_text(errors="replace").strip() if shop.log.exists() else ""
            last = f"; it said: {log.splitlines()[-1]}" if log else ""
            mend = (
                "the training process has its user's rights and no more, root's neither: see which file it may not read"
            )
            yield Row("worker", "wrong", f"the confined training process failed: {error}{last}", mend)
        finally:
            shop.stop()


def confined(config: SiteConfig, found: Confinement) -> Row:
    """What confines a training process here, as the site asks for it."""
    text = "; ".join(f"{name}: {what}" for name, what in found.rows())
    if found.network == "none" or not found.files:
        mend = "train on a host with seccomp, and Landlock (Linux 5.13) switched on"
        return Row("worker", "wrong" if config.confinement == "required" else "warning", text, mend)
    mend = (
        "docs/sites.md says what stands in for it; a container may need its own rules loosened" if found.missing else ""
    )
    return Row("worker", "warning" if found.missing else "ok", text, mend)


def _daemon(home: Home) -> Iterator[Row]:
    if control.alive(control.socket_of(home.folder)):
        yield Row("daemon", "ok", "it runs; fedtailor client status says what it does")
    else:
        mend = f"fedtailor client up --home {home.folder}, or start the service"
        yield Row("daemon", "warning", f"none runs in {home.folder}", mend)
