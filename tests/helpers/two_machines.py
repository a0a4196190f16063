"""Four processes as torchrun starts them on two machines of two, for test_fsdp."""

import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import two_ranks
from helpers.command_process import CONTEXT

from metavpt.distributed import collectives
from metavpt.training.engine import make_fabric

MACHINES = ((0, 1), (2, 3))
# which run's checkpoint of which step a run goes on from
GOES_ON = {
    "hsdp": None,
    "fsdp-from_hsdp": ("hsdp", 2),
    "hsdp-from_fsdp": ("fsdp-from_hsdp", 3),
    "hsdp-from_one": ("one", 2),
}


def start(folder, seconds=300):
    """Run `main` in four processes, to their end."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = [
        CONTEXT.Process(target=_process, args=(str(folder), machine, local, store.port))
        for machine, ranks in enumerate(MACHINES)
        for local in range(len(ranks))
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(seconds)
    errors = [path.read_text() for path in folder.glob("error-*")]
    hanging = [process for process in started if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging, ["a process hangs", *errors]
    assert not any(process.exitcode for process in started), "\n".join(errors)


def _process(folder, machine, local, port):
    rank = MACHINES[machine][local]
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "GROUP_RANK": str(machine),
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "two_machines",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    torch.set_num_threads(1)
    try:
        main(Path(folder))
    except Exception:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        sys.exit(1)


def main(folder):
    """Run the small problem, and go on from the checkpoints of other kinds of run."""
    fabrics = {parallel: make_fabric("cpu", parallel=parallel) for parallel in ("hsdp", "fsdp")}
    for name, origin in GOES_ON.items():
        if origin:
            two_ranks.checkpoints_of(folder / origin[0], [origin[1]], folder / name)
        found = two_ranks.run(folder / name, "small", "one_step", fabrics[name.split("-")[0]])
        if collectives.rank() == 0:
            torch.save(found, folder / f"{name}.pt")
    dist.destroy_process_group()
