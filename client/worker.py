"""The training process: no key, no network, the installed ClientApp only. It is kept warm and does one thing at a time.

It speaks JSON lines on its standard input and output with the daemon that started it, and dies with it. The first line
says what it may touch; with that it confines itself, and only then imports what can train.
"""

import errno
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from fedtailor.client.confine import Rules, confine, die_with_parent
from fedtailor.errors import FedtailorError

if TYPE_CHECKING:
    from fedtailor.client.tasks import Tasks


def main() -> None:
    """Serve requests until the daemon closes the pipe."""
    die_with_parent(signal.SIGKILL)
    os.umask(0o077)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log, not into the conversation
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which then ends this process
    tasks: Tasks | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["op"] == "start":
                answer = confine(Rules(**request["rules"]))._asdict()
                tasks = _tasks(request)
            else:
                assert tasks is not None
                answer = tasks.operations[request["op"]](request)
        except FedtailorError as error:
            answer = {"error": error.code, "text": str(error)}
        except Exception as error:  # the recipe is the site's own, but a bug in it must not end the daemon
            answer = {"error": "memory" if _of_memory(error) else "crashed", "text": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def _tasks(request: dict[str, Any]) -> "Tasks":
    from fedtailor.client.tasks import Tasks  # torch and Flower: within the cell

    tasks = Tasks(request)
    tasks.warm()
    return tasks


def _of_memory(error: Exception) -> bool:
    """Whether memory was refused: Python, the kernel and torch each say so in their own way."""
    refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return refused or isinstance(error, MemoryError) or "t allocate memory" in str(error)


if __name__ == "__main__":
    main()
