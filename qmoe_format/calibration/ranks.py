"""The processes that convert a model together, each of them a rank.

A launcher starts them and tells them of each other in environment variables: ``torchrun``, or
Slurm's ``srun``. They share a folder, where everything large goes; over the network they exchange
small objects only.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from qmoe_format.errors import QMoEError
from qmoe_format.machine import usable_cores

T = TypeVar("T")

JOIN = timedelta(minutes=10)  # in which all ranks have to start
WAIT = timedelta(hours=24)  # for a rank that is alive; the end of a process is noticed at once
APPEAR_S = 10.0  # until a file that another machine has written is seen here


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process of those that work together; by default the only one.

    Attributes:
        rank: the number of this process; 0 writes the result and talks to the user.
        count: how many there are.
        local: the number of this process on its machine.
        launched: a launcher started them, and may start them again.
        restarted: it has done so.
        group: torch's, None for its default one.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    launched: bool = False
    restarted: bool = False
    group: Any = field(default=None, compare=False)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order; each waits for the others.

        Raises:
            QMoEError: ``peer`` if a rank has ended.
        """
        values = [value] * self.count
        if self.count > 1:
            import torch.distributed as dist

            with self._together():
                dist.all_gather_object(values, value, self.group)
        return values

    def settle(self, call: Callable[[], T]) -> list[T]:
        """What ``call`` returns on each rank; if it fails on any, all of them raise that error."""
        if self.count == 1:
            return [call()]
        own = _Outcome.of(call, str(self))
        return [each.result(own) for each in self.gather(own)]

    def share(self, call: Callable[[], T]) -> T:
        """What ``call`` returns on rank 0, the only one that calls it; all raise its error.

        The others wait for rank 0, which does not wait for them.
        """
        if self.count == 1:
            return call()
        import torch.distributed as dist

        own = _Outcome.of(call, str(self)) if self.leads else None
        outcome = [own]
        with self._together():
            dist.broadcast_object_list(outcome, 0, self.group)
        assert outcome[0]
        return outcome[0].result(own)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Say so if a rank has ended."""
        try:
            yield
        except RuntimeError as error:
            raise _lost(str(self), error) from error

    def cores(self) -> int:
        """This rank's share of the cores that it may use, at least one."""
        # A launcher may have given each rank cores of its own.
        own = (socket.gethostname(), usable_cores())
        return max(1, len(own[1]) // self.gather(own).count(own))

    def device(self, asked: str) -> str:
        """This rank's: of several GPUs, the one with its number on the machine."""
        if asked != "cuda" or self.count == 1:
            return asked
        import torch

        return f"cuda:{self.local % max(1, torch.cuda.device_count())}"

    def slice(self, sizes: Sequence[int]) -> slice:
        """This rank's part of a row of items: as much of the sum of ``sizes`` as any other's."""
        total, before, ends = sum(sizes), 0, [0] * (self.count + 1)
        for number, size in enumerate(sizes):
            # An item is with the rank in whose part its middle lies.
            owner = (2 * before + size) * self.count // (2 * total) if total else 0
            ends[min(owner, self.count - 1) + 1] = number + 1
            before += size
        for rank in range(self.count):
            ends[rank + 1] = max(ends[rank : rank + 2])
        return slice(ends[self.rank], ends[self.rank + 1])

    def packed(self, costs: Sequence[float]) -> list[int]:
        """The numbers of this rank's items: the dearest first, each goes where least is to do."""
        loads = [0.0] * self.count
        own = []
        for number in sorted(range(len(costs)), key=lambda each: (-costs[each], each)):
            rank = loads.index(min(loads))
            loads[rank] += costs[number]
            if rank == self.rank:
                own.append(number)
        return sorted(own)


ALONE = Ranks()


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[T]):
    """What a call has returned on some rank, or its error."""

    where: str
    value: T | None = None
    error: QMoEError | None = None

    @classmethod
    def of(cls, call: Callable[[], T], where: str) -> _Outcome[T]:
        try:
            return cls(where, call())
        except QMoEError as error:
            return cls(where, error=error)

    def result(self, own: _Outcome[T] | None) -> T:
        """What it returned; raises its error, or first that of this rank, ``own``."""
        if own and own.error:
            raise own.error
        if self.error:
            problem = f"{self.where}: {self.error.problem}"
            raise QMoEError(self.error.code, problem, self.error.advice)
        return cast("T", self.value)


def in_order(numbers: Iterable[Sequence[int]], items: Iterable[Sequence[T]]) -> list[T]:
    """The items of all ranks, by the numbers that each rank's items have."""
    found = zip(chain.from_iterable(numbers), chain.from_iterable(items), strict=True)
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]


@contextmanager
def joined_ranks(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """The ranks of this process's launcher, connected; ``ALONE`` without a launcher.

    Raises:
        QMoEError: ``peer`` if the others do not come; ``argument`` for variables without sense.
    """
    found, address = _read(environment)
    if found.count == 1:
        yield found
        return
    import torch.distributed as dist

    if not dist.is_available():
        raise QMoEError("dependency", "this build of torch has no torch.distributed", "get another")
    from torch.distributed.rendezvous import rendezvous

    own = not dist.is_initialized()
    try:
        if own:
            store = next(rendezvous(address, found.rank, found.count, timeout=JOIN))[0]
            store = dist.PrefixStore(_meet(store, found), store)  # type: ignore[attr-defined]
            dist.init_process_group(
                "gloo", store=store, rank=found.rank, world_size=found.count, timeout=WAIT
            )
        group = None if own else dist.new_group(backend="gloo", timeout=WAIT)
    except (RuntimeError, ValueError) as error:
        raise _lost(str(found), error) from error
    try:
        yield replace(found, group=group)
    finally:
        # Whoever waits for this rank learns that it has gone.
        dist.destroy_process_group(group)


def _meet(store: Any, ranks: Ranks) -> str:
    """Wait until all ranks are there; returns a name that they have for this start.

    A launcher may have kept its store from an earlier start, with addresses of processes that have
    ended. So every rank but the first makes up a token, for which the first one has an answer only
    if it is there, too.
    """
    if ranks.rank:
        token = secrets.token_hex(8)
        store.set(f"qmoe/{ranks.rank}", token)
        name: str = store.get(f"qmoe/{token}").decode()
        store.set(f"qmoe/{name}/{ranks.rank}", "")
        return name
    name, missing = secrets.token_hex(8), set(range(1, ranks.count))
    end = time.monotonic() + JOIN.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise RuntimeError(f"ranks {sorted(missing)} have not come")
        for rank in list(missing):
            if store.check([f"qmoe/{rank}"]):
                store.set(f"qmoe/{store.get(f'qmoe/{rank}').decode()}", name)
            if store.check([f"qmoe/{name}/{rank}"]):
                missing.remove(rank)
        time.sleep(0.02)
    return name


def rank_of(environment: Mapping[str, str] = os.environ) -> int:
    """The rank of this process."""
    return _read(environment)[0].rank


def wait_for(path: Path, ready: Callable[[], bool]) -> bool:
    """Wait until a file is as another machine left it; network file systems take their time."""
    end = time.monotonic() + APPEAR_S
    while not ready():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
        if path.parent.is_dir():
            os.listdir(path.parent)  # NFS asks the server when a folder is opened  # noqa: PTH208
    return True


def _read(environment: Mapping[str, str]) -> tuple[Ranks, str]:
    """The ranks by a launcher's variables, and where they meet."""
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    address = "env://"
    restarts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
            return ALONE, ""
        keys = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        address = _slurm_address(environment)
    try:
        rank, count = (int(environment[key]) for key in keys[:2])
        local = int(environment.get(keys[2], 0))
        restarted = any(int(environment.get(key, 0)) for key in restarts)
        ranks = Ranks(rank, count, local, True, restarted)
        if not 0 <= rank < count:
            raise ValueError(f"rank {rank} of {count}")
    except (KeyError, ValueError) as error:
        raise QMoEError(
            "argument",
            f"the launcher's variables {', '.join(keys)} make no sense ({error})",
            "start the processes with torchrun",
        ) from error
    return ranks, address


def _slurm_address(environment: Mapping[str, str]) -> str:
    """Where a step's tasks meet: its first machine, and a port by the number of its job."""
    names = environment.get("SLURM_STEP_NODELIST", "localhost")
    first = re.match(r"([^\[,]*)(?:\[(\w+))?", names)
    host = environment.get("MASTER_ADDR") or "".join(filter(None, first.groups() if first else ()))
    port = 20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 20_000
    return f"tcp://{host}:{environment.get('MASTER_PORT', port)}"


def _lost(where: str, error: Exception) -> QMoEError:
    reason = str(error).partition("\n")[0]
    return QMoEError(
        "peer",
        f"{where}: another process of this conversion has ended or cannot be reached ({reason})",
        "see what that one says, then continue with --resume",
    )
