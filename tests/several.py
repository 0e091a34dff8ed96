"""One study in several processes on this machine."""

import contextlib
import resource
import socket
import subprocess

from tests import launched

FIELDS = [
    "--config.method=federated",
    "--config.init.rounds=2",
    "--config.evaluation.every=1",
    "--config.warmup.rounds=0",
    "--config.finetune.rounds=0",
    "--config.compute.devices=0",
]


def start(workdirs, more, count=2, largest_file=None, ids=None):
    """Exit code and output of each process; process i gets `more[i]`.

    The first cannot write files larger than `largest_file` bytes.
    """
    processes = launch(workdirs, more, count, largest_file, ids)
    output = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], output


def launch(
    workdirs,
    more,
    count=2,
    largest_file=None,
    ids=None,
    host="127.0.0.1",
    inside=None,
    output=None,
):
    """The processes, which run; their numbers are `ids`, or 0, 1, ...

    Process i is found at `host` where i is 0, has the words `inside[i]` before its
    command, and writes to the file `output[i]`, or to a pipe.
    """

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = [*FIELDS, f"--coordinator={host}:{port}", f"--num_processes={count}"]
    return [
        launched.start(
            workdirs[i],
            *shared,
            *more[i],
            f"--process_id={ids[i] if ids else i}",
            before=(inside or {}).get(i, ()),
            env=launched.environment() | {"XLA_FLAGS": launched.flags_of_one_device()},
            stdout=output[i] if output else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=limited if largest_file and i == 0 else None,
        )
        for i in range(count)
    ]
