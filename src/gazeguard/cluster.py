"""Ray, where a user asks for it: which cluster, how many workers, and what each of them gets.

Workers import gazeguard from their own environment, so every machine of a cluster has it installed;
models, data and output folders are named by paths or URLs that every machine can read.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from gazeguard.errors import MissingExtra, UsageError

_KNOCK_SECONDS = 10.0
# What `ray.init` takes; anything else is an argument that `--ray` swallowed.
_ADDRESS = re.compile(r"auto|local|(ray://)?[\w.\-\[\]:]+:\d+")


@dataclass(frozen=True, slots=True)
class Ray:
    """What the user said about a cluster.

    Attributes:
        address: `HOST:PORT`, `ray://HOST:PORT`, `auto` for the cluster of this machine or `local`
            for a new one; empty for the one that RAY_ADDRESS or `ray start` made, else a new one.
        workers: processes side by side; as many as the cluster holds when None.
        cpus: processor cores of each, and so many threads.
        gpus: of each, parts of one too; None for one where the cluster has any, else 0.
    """

    address: str = ""
    workers: int | None = None
    cpus: int = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.address and not _ADDRESS.fullmatch(self.address):
            raise UsageError(
                f"'{self.address}' is no Ray address: give HOST:PORT, auto or local, or write"
                " --ray as the last word of the command."
            )
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"{self.workers} workers are too few: give 1 or more.")
        if self.cpus < 1 or (self.gpus is not None and self.gpus < 0):
            raise UsageError("A worker needs at least one CPU, and no fewer than 0 GPUs.")


@dataclass(frozen=True, slots=True)
class Workers:
    """What a connected cluster gives.

    Attributes:
        count: processes side by side.
        cpus: cores, and threads, of each.
        gpus: of each.
    """

    count: int
    cpus: int
    gpus: float

    @property
    def resources(self) -> dict[str, float]:
        """The `num_cpus` and `num_gpus` of a task or an actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


@contextmanager
def connected(asked: Ray) -> Iterator[Workers]:
    """Connect to a cluster, or start one on this machine for as long as the block lasts.

    A connection that this process already has is used, whatever the address, and left open.

    Raises:
        MissingExtra: ray is not installed.
        UsageError: the cluster cannot be reached, or is too small for one worker.
    """
    if find_spec("ray") is None:
        raise MissingExtra("ray", "ray", "--ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked to tell anyone
    import ray

    mine = not ray.is_initialized()
    if mine:
        try:
            _knock(asked.address)
            ray.init(
                address=asked.address or None,
                include_dashboard=False if asked.address in ("", "local") else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"the Ray cluster {asked.address or 'of RAY_ADDRESS'} cannot be reached"
                f" ({str(error).splitlines()[0].rstrip('.')}): check the address, or leave it out"
                " to use this machine alone."
            ) from error
    try:
        yield _workers(asked, ray.cluster_resources())
    finally:
        if mine:
            ray.shutdown()


def check_version(worker: str, driver: str, who: str = "a worker") -> None:
    """Refuse a worker with another version of gazeguard than the driver's.

    Raises:
        UsageError: it has one.
    """
    if worker != driver:
        raise UsageError(
            f"{who} has gazeguard {worker} and not {driver}: install the same version on every"
            " machine of the cluster."
        )


def _knock(address: str) -> None:
    """See whether anybody listens there: Ray itself asks for ten minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()


def _workers(asked: Ray, there: dict[str, Any]) -> Workers:
    """How many workers of which size fit."""
    cpus, gpus = int(there.get("CPU", 0)), float(there.get("GPU", 0))
    each = asked.gpus if asked.gpus is not None else float(gpus >= 1)
    room = cpus // asked.cpus if not each else min(cpus // asked.cpus, int(gpus // each))
    if room < (asked.workers or 1):
        raise UsageError(
            f"The Ray cluster has {cpus} CPUs and {gpus:g} GPUs, room for {room} workers of"
            f" {asked.cpus} CPUs and {each:g} GPUs: ask for fewer or smaller ones."
        )
    return Workers(asked.workers or room, asked.cpus, each)
