"""The yardstick: the heart study, or a model of any size, on stock Flower 1.41 in deployment mode on loopback.

One ``flower-superlink`` with TLS, node authentication and a database file; four ``flower-supernode``; ``flwr run``. A
round is what Flower's FedAvg does in one: training and evaluation at every site. Nothing here is private: stock Flower
has no record-level accounting, so the times are those of the frame, not of DP-SGD.

    python -m benchmarks.stock_flower --rounds 3 --json
    python -m benchmarks.stock_flower --rounds 2 --parameters 25000000 --json
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.torch import save_file

from benchmarks.processes import Family, PeakMemory
from fedtailor import pki
from fedtailor.datasets import heart_disease
from fedtailor.recipes.tabular import tabular

SITES = 4


def measure(rounds: int, parameters: int = 0, timeout_s: float = 900.0) -> dict[str, Any]:
    """Run a study on stock Flower and say what it took.

    Args:
        rounds: of training and evaluation at each of four sites.
        parameters: 0 for the heart study, otherwise the size of a random float32 model that sites change at no cost.
        timeout_s: for the whole run.

    Returns:
        ``round_s`` (each), ``median_round_s``, ``traffic_bytes`` (as Flower counts it), ``peak_rss_bytes`` (SuperLink,
        SuperExec and ServerApp together), ``largest_process_bytes``, ``run_s`` (of ``flwr run``), ``setup_s``, ``load``
        (of the machine before and after) and the last ``metrics``.

    Raises:
        RuntimeError: if a process ends early or the run does not complete; the text ends with the log's last lines.
    """
    with tempfile.TemporaryDirectory(prefix="stock-flower-") as made:
        return _measure(Path(made), rounds, parameters, timeout_s)


def _measure(home: Path, rounds: int, parameters: int, timeout_s: float) -> dict[str, Any]:
    port, *node_ports = _free_ports(1 + SITES)
    address, load = f"127.0.0.1:{port}", [os.getloadavg()[0]]
    pki.make_ca(home / "pki", "yardstick")
    pki.issue(home / "pki", home / "pki", "server", "localhost", server=True, hosts=["127.0.0.1", "localhost"])
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "probe"\n\n[superlink.probe]\naddress = "{address}"\n'
        f'root-certificates = "{home / "pki" / "ca.pem"}"\n'
    )
    width = _write_patients(home)
    began = time.monotonic()
    with Family(home, _environment(home)) as processes:
        link = processes.start("superlink", _superlink(home, port))
        _wait_for_port(port, processes, "superlink")
        for i in range(SITES):
            _make_node_key(home / f"site{i}")
            _flwr(home, "supernode", "register", str(home / f"site{i}.pub"), "probe", "--name", f"site{i}")
            processes.start(f"site{i}", _supernode(home, address, i, node_ports[i]))
        sizes = f"num-rounds={rounds} num-sites={SITES} parameters={parameters} width={width}"
        settings = f'{sizes} data="{home}" times="{home / "times.json"}"'
        setup_s, submitted = time.monotonic() - began, time.monotonic()
        with PeakMemory(link.pid) as memory:
            app = str(Path(__file__).parent / "stock_app")
            said = _flwr(home, "run", app, "probe", "--run-config", settings, "--stream", timeout_s=timeout_s)
        run_s = time.monotonic() - submitted
        if not (home / "times.json").exists():
            tails = [said[-3000:], *(processes.log(name)[-600:] for name in processes.started)]
            raise RuntimeError("the run did not complete:\n" + "\n---\n".join(tails))
        listed = json.loads(_flwr(home, "list", "probe", "--format", "json"))["runs"][0]
    times = json.loads((home / "times.json").read_text())
    round_s = [after - before for before, after in zip(times["clock"], times["clock"][1:], strict=False)]
    return {
        "engine": "stock flwr",
        "sites": SITES,
        "rounds": rounds,
        "parameters": parameters,
        "round_s": round_s,
        "median_round_s": statistics.median(round_s),
        "traffic_bytes": listed["network-traffic"]["total-bytes"],
        "peak_rss_bytes": memory.together,
        "largest_process_bytes": memory.largest,
        "run_s": run_s,
        "setup_s": setup_s,
        "load": [*load, os.getloadavg()[0]],
        "metrics": times["metrics"][-1] if times["metrics"] else {},
        "status": listed["status"],
    }


def _write_patients(home: Path) -> int:
    """Prepare the four hospitals' patients as our own study does; returns the number of inputs."""
    recipe, width = tabular("heart", "logistic"), 0
    for i, source in enumerate(heart_disease().values()):
        data = recipe.prepare(source.table())
        tensors = {"train_x": data.train.x, "train_y": data.train.y, "test_x": data.test.x, "test_y": data.test.y}
        save_file(tensors, home / f"site{i}.safetensors")
        width = data.train.x.shape[1]
    return width


def _environment(home: Path) -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "PATH": scripts + os.pathsep + os.environ.get("PATH", ""),  # Flower starts its parts by name
    }


def _superlink(home: Path, port: int) -> list[str]:
    keys = home / "pki"
    return [
        *("flower-superlink", "--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-certfile", str(keys / "server.pem"), "--ssl-keyfile", str(keys / "server.key")),
        *("--ssl-ca-certfile", str(keys / "ca.pem"), "--enable-supernode-auth"),
        *("--database", str(home / "state.db"), "--disable-runtime-dependency-installation"),
    ]


def _supernode(home: Path, address: str, index: int, port: int) -> list[str]:
    return [
        *("flower-supernode", "--superlink", address, "--root-certificates", str(home / "pki" / "ca.pem")),
        *("--auth-supernode-private-key", str(home / f"site{index}"), "--port", str(port)),
        *("--node-config", f"partition-id={index} num-partitions={SITES}"),
    ]


def _make_node_key(path: Path) -> None:
    """An EC key pair as OpenSSH writes it: Flower takes no other."""
    key = ec.generate_private_key(ec.SECP384R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(*form))
    public = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(*public))


def _flwr(home: Path, *arguments: str, timeout_s: float = 60.0) -> str:
    done = subprocess.run(
        ["flwr", *arguments], env=_environment(home), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"flwr {arguments[0]} ended with code {done.returncode}: {(done.stdout + done.stderr)[-3000:]}"
        )
    return done.stdout


def _free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on now; all are held until the last is found, so that they differ."""
    held = [socket.socket() for _ in range(count)]
    try:
        for probe in held:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in held]
    finally:
        for probe in held:
            probe.close()


def _wait_for_port(port: int, processes: Family, name: str, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if processes.started[name].poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{name} does not listen on port {port}: {processes.log(name)[-2000:]}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stock_flower", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parameters", type=int, default=0, help="0: the heart study; otherwise random float32")
    parser.add_argument("--json", action="store_true", help="print the measurement as one line of JSON")
    options = parser.parse_args(arguments)
    found = measure(options.rounds, options.parameters)
    if options.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:22} {value}")


if __name__ == "__main__":
    main()
