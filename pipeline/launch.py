"""Which of how many processes this is, as whatever started them left it in the environment. Imports nothing, for --help's sake."""

from __future__ import annotations

import os

# What torchrun, Intel MPI, Open MPI and MVAPICH tell a process, in the order in which accelerate asks.
INDEX = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
NUMBER = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def process_index() -> int:
    return _number_from(INDEX, 0)


def num_processes() -> int:
    return _number_from(NUMBER, 1)


def leaves_others_to_mpirun() -> bool:
    """Whether `accelerate launch --cpu` was asked for several processes, started this one, and left their address to it."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    return on_cpu and "MASTER_ADDR" in os.environ and not any(name in os.environ for name in NUMBER)


def _number_from(names: tuple[str, ...], default: int) -> int:
    given = [os.environ[name] for name in names if os.environ.get(name)]
    return int(given[0]) if given and given[0].isdigit() else default
