"""Conversions by several ranks: processes of launchers, or forks that pretend to be some."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from qmoe_format.calibration import ranks as ranks_module
from qmoe_format.calibration.ranks import ALONE, Ranks, in_order, joined_ranks
from qmoe_format.conversion import encoding
from qmoe_format.conversion.report import report_path
from qmoe_format.errors import QMoEError
from tests.refusals import refusal

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
import torch.distributed as dist

from qmoe_format.calibration.shared_file import shared_write
from qmoe_format.conversion import calibrated
from tests.tiny_models import save_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks here")

Convert = Callable[..., Path]
OPTIONS: dict[str, Any] = {"samples": 24, "bits_per_weight": 1.8}
PATIENCE_S = 100  # for ranks that should end long before


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def torchrun(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def slurm(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "7",
        "MASTER_PORT": str(port),
    }


def run_ranks(
    folder: Path,
    count: int,
    call: Callable[[int], object],
    launcher: Callable[..., dict[str, str]] = torchrun,
) -> list[str]:
    """Call a function in forks, each a rank; what each of them says: ``CODE: MESSAGE``, nothing if
    all went well, ``killed``."""
    port, children = free_port(), []
    said = [folder.parent / f"{folder.name}-rank-{rank}" for rank in range(count)]
    for rank in range(count):
        child = os.fork()
        if not child:
            text = "died"
            try:
                torch.set_num_threads(1)  # OpenMP's threads are not in a fork
                os.environ |= launcher(rank, count, port)
                call(rank)
                text = ""
            except BaseException as error:
                text = f"{getattr(error, 'code', type(error).__name__)}: {error}"
            finally:
                said[rank].write_text(text)
                os._exit(0)
        children.append(child)
    end = time.monotonic() + PATIENCE_S
    found = [""] * count
    waiting = dict(enumerate(children))
    while waiting:
        for rank, child in list(waiting.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                del waiting[rank]
                killed = os.waitstatus_to_exitcode(status)
                found[rank] = "killed" if killed else said[rank].read_text()
        if time.monotonic() > end:
            for child in waiting.values():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise AssertionError(f"ranks {sorted(waiting)} do not end; the others: {found}")
        time.sleep(0.02)
    return found


def in_this_fork(name: str, value: object) -> None:
    """Replace something in the conversion's modules."""
    pytest.MonkeyPatch().setattr(f"qmoe_format.conversion.{name}", value)


@pytest.fixture(scope="module")
def many_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens go to three of four experts each: the order of a sum matters."""
    folder = tmp_path_factory.mktemp("many")
    return save_model(folder, "mixtral", num_local_experts=4, num_experts_per_tok=3)


@pytest.fixture(scope="module")
def wanted() -> dict[Path, tuple[bytes, bytes]]:
    """File and report of one rank, by model."""
    return {}


@pytest.fixture
def by_one(
    wanted: dict[Path, tuple[bytes, bytes]], model: Path, converted: Convert
) -> tuple[bytes, bytes]:
    if model not in wanted:
        wanted[model] = contents(converted(model, "one.qmoe", **OPTIONS))
        report_path(file := model.with_name("one.qmoe")).unlink(missing_ok=True)
        file.unlink(missing_ok=True)
    return wanted[model]


def contents(file: Path) -> tuple[bytes, bytes]:
    return file.read_bytes(), report_path(file).read_bytes()


def left(folder: Path) -> set[str]:
    """What a conversion of m.qmoe has left."""
    return {path.name for path in folder.iterdir() if "one." not in path.name}


@pytest.mark.parametrize(("model", "count"), [("switch", 2), ("many", 5)], indirect=["model"])
def test_bytes_do_not_depend_on_the_number_of_ranks(
    model: Path, converted: Convert, by_one: tuple[bytes, bytes], tmp_path: Path, count: int
) -> None:
    """Five are more than there are batches or experts."""
    seen: list[list[int]] = []

    def progress(done: int, total: int, *_: str) -> None:
        seen.append([done, total])

    def call(rank: int) -> None:
        converted(model, progress=progress, **OPTIONS)
        assert bool(seen) == (rank == 0)
        assert all(done <= total for done, total in seen)

    launcher = torchrun if count == 2 else slurm
    assert run_ranks(tmp_path, count, call, launcher) == [""] * count
    assert contents(tmp_path / "m.qmoe") == by_one
    assert left(tmp_path) == {"m.qmoe", "m.quality.json"}


def dies(model: Path, converted: Convert, who: int, encoded: int, **options: Any) -> Any:
    """A rank that converts; ``who`` kills itself when it has encoded so many experts' matrices."""

    def call(rank: int) -> None:
        count = 0

        def counted(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count > encoded:
                os.kill(os.getpid(), signal.SIGKILL)
            return encoding.encode(*arguments)

        if rank == who:
            in_this_fork("quantize_block.encode", counted)
        converted(model, **(OPTIONS | options))

    return call


@pytest.mark.parametrize("model", ["mixtral"], indirect=True)
@pytest.mark.parametrize(("who", "then"), [(0, 1), (1, 3)])
def test_killed_in_the_middle_of_a_block(
    model: Path,
    converted: Convert,
    by_one: tuple[bytes, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    who: int,
    then: int,
) -> None:
    """The others end at once; any number of ranks goes on from the last block that is done."""
    work = tmp_path / ".m.qmoe.work"
    # This is in the second block: in the first one, no rank has more than two experts.
    said = run_ranks(tmp_path, 2, dies(model, converted, who, encoded=3 * 2 + 1))
    assert said.pop(who) == "killed"
    assert said[0].startswith("peer: rank ")
    assert said[0].count("continue with --resume") == 1
    done = {path.name: path.stat().st_mtime_ns for path in work.glob("*-000*.json")}
    assert "block-0000.json" in done
    stray = work / "stack-0000-0123abcd-0001.qmoe"  # of a block that was not finished
    stray.write_bytes(b"half")
    finish = calibrated._write

    def checked(*arguments: Any) -> None:
        assert not stray.exists()
        assert all((work / name).stat().st_mtime_ns == then for name, then in done.items())
        finish(*arguments)

    monkeypatch.setattr(calibrated, "_write", checked)
    if then == 1:
        converted(model, resume=True, **OPTIONS)
    else:
        assert run_ranks(tmp_path, then, lambda _: converted(model, **OPTIONS)) == [""] * then
    assert contents(tmp_path / "m.qmoe") == by_one
    assert left(tmp_path) == {"m.qmoe", "m.quality.json"}


@pytest.mark.parametrize("model", ["switch"], indirect=True)
@pytest.mark.parametrize("who", [0, 1])
def test_a_full_disk_on_one_rank(
    model: Path, converted: Convert, by_one: tuple[bytes, bytes], tmp_path: Path, who: int
) -> None:
    def call(rank: int) -> None:
        if rank == who:  # no file may be larger, the hidden states for example
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        converted(model, **OPTIONS)

    said = run_ranks(tmp_path, 2, call)
    assert said[who].startswith("io: cannot write ")
    assert "File too large" in said[who]
    assert re.match(rf"io: rank {who} on .*File too large|peer: ", said[1 - who])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("m.")]
    assert run_ranks(tmp_path, 2, lambda _: converted(model, **OPTIONS)) == ["", ""]
    assert contents(tmp_path / "m.qmoe") == by_one


def test_a_full_disk_when_the_file_is_written(
    mixtral_folder: Path, converted: Convert, tmp_path: Path
) -> None:
    def call(rank: int) -> None:
        def full(*_: Any) -> bytes:
            return b"x" * 10**6

        if rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
            in_this_fork("calibrated.dump_report", full)
        converted(mixtral_folder, recipe="qmoe", samples=8)

    said = run_ranks(tmp_path, 2, call)
    assert said[0].startswith("io: ")
    assert said[1].startswith("io: rank 0 on ")
    assert left(tmp_path) == {".m.qmoe.work"}


@pytest.mark.parametrize("what", ["text_sha256", "code of qmoe-format", "samples"])
def test_ranks_that_differ_are_refused(
    switch_folder: Path, converted: Convert, text: Path, tmp_path: Path, what: str
) -> None:
    other_text = tmp_path.with_name(f"{tmp_path.name}.jsonl")
    other_text.write_text(text.read_text() + '\n{"text": "w1 w2"}\n')

    def call(rank: int) -> None:
        options: dict[str, Any] = {"samples": 8, "recipe": "qmoe"}
        if rank and what == "code of qmoe-format":
            in_this_fork("calibrated.describe_code", lambda: "another")
        elif rank:
            options |= {"samples": 9} if what == "samples" else {"text": other_text}
        converted(switch_folder, **options)

    for said in run_ranks(tmp_path, 2, call):
        assert said.startswith("argument: rank 1 on "), said
        assert f"differs from rank 0 in {what} (" in said
    assert left(tmp_path) == set()


@pytest.mark.parametrize("mine", ["nothing", "a folder"])
def test_a_rank_that_does_not_see_the_folder(
    switch_folder: Path,
    converted: Convert,
    tmp_path: Path,
    mine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks_module, "APPEAR_S", 0.3)
    other = tmp_path / "one.of-its-own"
    other.mkdir()
    if mine == "a folder":
        (other / ".m.qmoe.work").mkdir()
        (other / ".m.qmoe.work" / "ranks").write_bytes(b"x" * 16)

    def call(rank: int) -> None:
        name = "one.of-its-own/m.qmoe" if rank else "m.qmoe"
        converted(switch_folder, name, samples=8, recipe="qmoe")

    zero, one = run_ranks(tmp_path, 2, call)
    assert one.startswith(f"io: {other}/.m.qmoe.work: is not the folder")
    assert zero.startswith(f"io: rank 1 on {socket.gethostname()}: {other}/.m.qmoe.work: is not")
    assert left(tmp_path) == set()


def test_an_interrupted_rank_ends_all(
    switch_folder: Path, converted: Convert, tmp_path: Path
) -> None:
    def call(rank: int) -> None:
        from qmoe_format.conversion.work import Work

        record = Work.record

        def interrupted(self: Work, kind: str, number: int, value: object) -> None:
            record(self, kind, number, value)
            if rank == 0 and number == 1:
                raise KeyboardInterrupt

        Work.record = interrupted  # type: ignore[method-assign]
        converted(switch_folder, recipe="qmoe", samples=8)

    zero, one = run_ranks(tmp_path, 2, call)
    assert zero.startswith("KeyboardInterrupt: interrupted; finished blocks are kept")
    assert one.startswith("peer: ")


def test_what_ranks_do_not_share(switch_folder: Path, converted: Convert, tmp_path: Path) -> None:
    def call(rank: int) -> None:
        converted(switch_folder, calibration=None)

    for said in run_ranks(tmp_path, 2, call):
        assert said.startswith("argument: only conversions with calibration text")
    assert left(tmp_path) == set()


def test_ranks_divide_the_cores_that_they_share(tmp_path: Path) -> None:
    every = sorted(os.sched_getaffinity(0))

    def call(rank: int) -> None:
        if rank == 2:  # as Slurm does it
            os.sched_setaffinity(0, every[:1])
        with joined_ranks() as ranks:
            assert ranks.cores() == (1 if rank == 2 else max(1, len(every) // 2))

    assert len(every) == 1 or run_ranks(tmp_path, 3, call) == [""] * 3


@pytest.mark.parametrize("fails", [False, True])
def test_a_file_of_which_each_rank_writes_a_part(tmp_path: Path, fails: bool) -> None:
    path = tmp_path / "rows"

    def call(_: int) -> None:
        with joined_ranks() as ranks, shared_write(path, 8, ranks) as write:
            write(4 * ranks.rank, memoryview(b"abcd" if ranks.leads else b"efgh"))
            assert not path.exists()
            if fails and not ranks.leads:
                raise QMoEError("io", "no space")
        assert path.read_bytes() == b"abcdefgh"

    said = run_ranks(tmp_path, 2, call)
    if fails:
        assert said[0].startswith("peer: rank 0 on ")
        assert said[1] == "io: no space"
    else:
        assert said == ["", ""]
    assert [each.name for each in tmp_path.iterdir()] == ([] if fails else ["rows"])


@contextmanager
def machine(number: int, port: int, *command: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The launcher of one of two machines, which has an address of its own."""
    options = f"""--nnodes=1:2 --nproc-per-node=1 --max-restarts=3 --local-addr=127.0.0.{number}
        --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{port} --rdzv-id=test
        --rdzv-conf=is_host={int(number == 1)},last_call_timeout=3,keep_alive_interval=1"""
    module = ["-m", "torch.distributed.run", *options.split(), "-m", "qmoe_format", "convert"]
    process = subprocess.Popen(
        [sys.executable, *module, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


def test_two_machines_of_which_one_is_lost(
    converted: Convert, text: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """First its process dies, and torchrun starts both processes again, which go on by themselves.
    Then all of it dies, and the other machine goes on alone."""
    model = save_model(tmp_path_factory.mktemp("deep"), "mixtral", num_hidden_layers=12)
    wanted = contents(converted(model, "one.qmoe", recipe="qmoe", samples=24))
    options: list[str | Path] = ["--recipe", "qmoe", "--samples", "24", "--sequence-length", "32"]
    options += ["--threads", "1", "--calibration", text]
    command = (model, tmp_path / "m.qmoe", *options)
    port, work = free_port(), tmp_path / ".m.qmoe.work"
    with machine(1, port, *command) as one, machine(2, port, *command) as two:

        def wait_for_block(number: int) -> int:
            """Until it is done; returns the process that machine 2 has at work."""
            end = time.monotonic() + PATIENCE_S
            while not (work / f"block-{number:04}.json").exists():
                assert time.monotonic() < end
                assert one.poll() is None, one.communicate()[0]
                time.sleep(0.002)
            children = Path(f"/proc/{two.pid}/task/{two.pid}/children").read_text()
            return int(children.split()[-1])

        os.kill(wait_for_block(0), signal.SIGKILL)
        worker = wait_for_block(3)
        two.kill()
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        said = one.communicate(timeout=PATIENCE_S)[0]
        assert one.returncode == 0, said
    assert contents(tmp_path / "m.qmoe") == wanted
    assert said.count("written in") == 1


def test_processes_that_are_started_again_do_not_meet_those_before() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=5))
    names = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            meet = partial(ranks_module._meet, store)
            found = list(pool.map(meet, (Ranks(rank, 3) for rank in range(3))))
        assert len({*found}) == 1
        names.append(found[0])
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("environment", "ranks", "address"),
    [
        ({}, ALONE, ""),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ALONE, ""),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, ALONE, ""),  # in a batch script itself
        (torchrun(1, 2, 5), Ranks(1, 2, 1, True), "env://"),
        (
            torchrun(0, 1, 5) | {"TORCHELASTIC_RESTART_COUNT": "2"},
            Ranks(0, 1, 0, True, True),
            "env://",
        ),
        (slurm(1, 4, 5), Ranks(1, 4, 1, True), "tcp://localhost:5"),
        (
            {
                "SLURM_PROCID": "9",
                "SLURM_STEP_NUM_TASKS": "16",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_NODELIST": "node[017-018,030],other2",
                "SLURM_JOB_ID": "123456",
                "SLURM_RESTART_COUNT": "1",
            },
            Ranks(9, 16, 1, True, True),
            "tcp://node017:23456",
        ),
    ],
)
def test_what_a_launcher_tells(environment: dict[str, str], ranks: Ranks, address: str) -> None:
    assert ranks_module._read(environment) == (ranks, address)


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "many"},
    ],
)
def test_variables_without_sense(wrong: dict[str, str]) -> None:
    assert next(iter(wrong)) in refusal(lambda: ranks_module._read(wrong), "argument")


@given(
    count=st.integers(1, 9),
    costs=st.lists(st.integers(0, 1000), max_size=60),
)
def test_every_item_has_one_rank(count: int, costs: list[int]) -> None:
    every = [Ranks(rank, count) for rank in range(count)]
    packed = [each.packed(costs) for each in every]
    assert in_order(packed, packed) == list(range(len(costs)))
    loads = [sum(costs[number] for number in own) for own in packed]
    # The last item that a rank got was put where least was to do.
    assert max(loads) <= min(loads) + max(costs, default=0)
    slices = [list(range(len(costs)))[each.slice(costs)] for each in every]
    assert [number for own in slices for number in own] == list(range(len(costs)))
    share = sum(costs) / count
    assert all(sum(costs[n] for n in own) <= share + max(costs, default=0) for own in slices)
