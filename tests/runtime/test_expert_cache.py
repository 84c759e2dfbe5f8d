"""Experts in a limited amount of memory: what is read, what is kept, and that outputs are the same.

``file`` has three kinds of stacks; all experts of one kind have about the same size.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qmoe_format
from qmoe_format import QMoEError, QMoEFile, load_model
from qmoe_format.codec import dequantize
from qmoe_format.machine import available_memory
from qmoe_format.runtime import expert_memory
from qmoe_format.runtime.expert_cache import CachedLayer, ExpertCache
from qmoe_format.runtime.expert_memory import expert_cache
from tests.refusals import refusal
from tests.runtime.conftest import Converted
from tests.runtime.files import EXPERTS, Dense
from tests.runtime.models import generated, logits

STACKS = (("gate", "up", "down"), ("gate_up", "down"))
Call = tuple[int, list[int]]
"""A layer's number, and the experts that it needs."""
CALLS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=4, unique=True),
    ),
    max_size=30,
)


def cached(file: QMoEFile, budget: int) -> tuple[ExpertCache, list[CachedLayer]]:
    cache = ExpertCache(file, budget)
    return cache, [cache.layer(names) for names in STACKS]


def expert_bytes(file: QMoEFile, layer: int, expert: int) -> int:
    return sum(file.stored_bytes(name, expert) for name in STACKS[layer])


def everything(file: QMoEFile) -> int:
    return sum(expert_bytes(file, layer, e) for layer in range(2) for e in range(EXPERTS))


def room_for(file: QMoEFile, count: int) -> int:
    """Bytes for so many experts of layer 0, whichever they are, and for no more."""
    sizes = sorted(expert_bytes(file, 0, expert) for expert in range(EXPERTS))
    room = sum(sizes[-count:])
    assert room < sum(sizes[: count + 1])
    return room


def reads_of(cache: ExpertCache, layer: CachedLayer, experts: Sequence[int]) -> int:
    """How many of these experts have to be read."""
    before = cache.counters.misses
    with layer.using(experts):
        pass
    return cache.counters.misses - before


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
@given(share=st.floats(0, 1.2), calls=CALLS)
def test_any_calls_with_any_budget(
    file: QMoEFile, dense: Dense, share: float, calls: list[Call]
) -> None:
    budget = int(share * everything(file))
    cache, layers = cached(file, budget)
    needed = 0
    for number, experts in calls:
        sizes = sum(expert_bytes(file, number, expert) for expert in experts)
        before = cache.counters.misses
        with layers[number].using(experts):
            assert cache.bytes <= max(budget, sizes)
            misses = cache.counters.misses
            for name in STACKS[number]:
                for expert in experts:
                    found = dequantize(layers[number].matrix(name, expert))
                    assert np.array_equal(found, dense[name][expert].numpy())
            assert cache.counters.misses == misses
        needed += len(experts)
        assert misses - before <= len(experts)
        assert cache.bytes <= budget
    counters = cache.counters
    assert counters.hits + counters.misses == needed
    if budget >= everything(file):
        assert counters.evictions == 0
        assert counters.misses == len({(n, expert) for n, experts in calls for expert in experts})


def test_what_is_read_is_little_more_than_what_is_missing(file: QMoEFile) -> None:
    cache, layers = cached(file, everything(file))
    with layers[0].using([0, 3]):
        pass
    least = expert_bytes(file, 0, 0) + expert_bytes(file, 0, 3)
    blocks = 2 * 3 * 2 * 4096  # at both ends of each matrix
    assert least <= cache.counters.bytes_read <= least + blocks + dictionaries(file)
    assert cache.bytes == least


def dictionaries(file: QMoEFile) -> int:
    return file.dictionary_bytes


def test_the_expert_that_is_used_least_goes(file: QMoEFile) -> None:
    cache, (layer, _) = cached(file, room_for(file, 2))
    for _ in range(3):
        assert reads_of(cache, layer, [0]) == (cache.counters.hits == 0)
    assert reads_of(cache, layer, [1]) == 1  # the last, but used once
    assert reads_of(cache, layer, [2]) == 1
    assert cache.counters.evictions == 1
    assert reads_of(cache, layer, [0]) == 0
    assert reads_of(cache, layer, [1]) == 1


def test_old_uses_fade(file: QMoEFile) -> None:
    cache, (layer, _) = cached(file, room_for(file, 2))
    for _ in range(30):
        reads_of(cache, layer, [0])
    for _ in range(15):
        reads_of(cache, layer, [1])
    for _ in range(15):
        reads_of(cache, layer, [2])
    assert reads_of(cache, layer, [0]) == 1


def test_what_is_in_use_stays(file: QMoEFile) -> None:
    cache, (layer, _) = cached(file, room_for(file, 1))
    with layer.using([0]):
        with layer.using([1]):
            assert cache.bytes > cache.budget
        misses = cache.counters.misses
        layer.matrix("gate", 0)
        assert cache.counters.misses == misses
    assert cache.bytes <= cache.budget


def test_a_matrix_lives_on_when_its_expert_is_gone(file: QMoEFile, dense: Dense) -> None:
    cache, (layer, _) = cached(file, 1)
    with layer.using([4]):
        matrix = layer.matrix("down", 4)
    assert cache.bytes == 0
    assert np.array_equal(dequantize(matrix), dense["down"][4].numpy())


def test_prefetching(file: QMoEFile) -> None:
    cache, (layer, _) = cached(file, room_for(file, 3))
    with layer.using([0]):
        layer.prefetch([0, 1, 2, 3])  # there is no room for the last
    assert cache.counters.prefetched == 2
    assert reads_of(cache, layer, [1, 2]) == 0
    assert reads_of(cache, layer, [3]) == 1
    assert cache.counters.wasted_prefetches == 0
    cache, (layer, _) = cached(file, room_for(file, 3))
    layer.prefetch([0, 1])
    assert reads_of(cache, layer, [2, 3, 4]) == 3
    assert cache.counters.wasted_prefetches == 2
    assert cache.counters.evictions == 2


def test_what_is_prefetched_waits_for_its_use(file: QMoEFile) -> None:
    """However often others have been used."""
    cache, (layer, _) = cached(file, room_for(file, 3))
    for _ in range(5):
        reads_of(cache, layer, [0, 4])
    with layer.using([3]):
        layer.prefetch([1, 2])
    assert reads_of(cache, layer, [1, 2]) == 0


@pytest.fixture
def copied(written: tuple[Path, Dense], tmp_path: Path) -> Path:
    """A file that may be damaged."""
    return Path(shutil.copy(written[0], tmp_path / "copy.qmoe"))


def test_a_file_that_becomes_shorter(copied: Path) -> None:
    data = copied.read_bytes()
    with qmoe_format.open(copied) as file:
        cache, (layer, _) = cached(file, everything(file))
        with layer.using([0]):
            pass
        os.truncate(copied, len(data) // 2)
        for _ in range(2):
            assert str(copied) in refusal(lambda: reads_of(cache, layer, [0, 1, 2]), "truncated")
        assert reads_of(cache, layer, [0]) == 0  # it is still there
        copied.write_bytes(data)
        assert reads_of(cache, layer, [0, 1, 2]) in (1, 2)  # 2 may have been under way
        assert reads_of(cache, layer, [0, 1, 2]) == 0
        assert cache.bytes == sum(expert_bytes(file, 0, expert) for expert in range(3))


def test_a_damaged_expert(copied: Path) -> None:
    with qmoe_format.open(copied) as file:
        (shard,) = file.shards
        place, length = shard._bounds(file.tensors["up"].extent + 2)
    with copied.open("r+b") as change:
        change.seek(place + length // 2)
        byte = change.read(1)[0]
        change.seek(place + length // 2)
        change.write(bytes([byte ^ 1]))
    with qmoe_format.open(copied) as file:
        cache, (layer, _) = cached(file, everything(file))
        assert "'up', expert 2" in refusal(lambda: reads_of(cache, layer, [1, 2, 3]), "checksum")
        assert reads_of(cache, layer, [1, 3]) == 0
        refusal(lambda: layer.matrix("gate", 2), "checksum")


def test_experts_that_do_not_exist_and_closed_files(copied: Path) -> None:
    with qmoe_format.open(copied) as file:
        cache, (layer, _) = cached(file, everything(file))
        refusal(lambda: reads_of(cache, layer, [EXPERTS]), "not-found")
        reads_of(cache, layer, [0])
    assert reads_of(cache, layer, [0]) == 0
    refusal(lambda: reads_of(cache, layer, [1]), "argument")


def test_threads(file: QMoEFile, dense: Dense) -> None:
    cache, layers = cached(file, room_for(file, 3))

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            number = int(rng.integers(2))
            experts = rng.permutation(EXPERTS)[: rng.integers(1, 4)].tolist()
            with layers[number].using(experts):
                for expert in experts:
                    found = dequantize(layers[number].matrix("down", expert))
                    assert np.array_equal(found, dense["down"][expert].numpy())
            layers[1 - number].prefetch(experts)
            layers[number].matrix("down", int(rng.integers(EXPERTS)))

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, seed) for seed in range(6)]:
            done.result(timeout=120)
    with layers[0].using([0]):
        pass
    assert cache.bytes <= cache.budget


def test_threads_and_a_disk_that_fails_at_times(
    file: QMoEFile, dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some calls fail, by the disk's error and no other; all others are right."""
    cache, (layer, _) = cached(file, room_for(file, 3))
    read, rng = QMoEFile.read_encoded, np.random.default_rng(0)

    def failing(self: QMoEFile, name: str, expert: int | None = None) -> object:
        if rng.random() < 0.05:
            raise QMoEError("io", "the disk does not answer", "wait")
        return read(self, name, expert)

    monkeypatch.setattr(QMoEFile, "read_encoded", failing)

    def work(seed: int) -> int:
        own = np.random.default_rng(seed)
        failed = 0
        for _ in range(100):
            experts = own.permutation(EXPERTS)[:2].tolist()
            try:
                with layer.using(experts):
                    layer.prefetch(own.permutation(EXPERTS)[:2].tolist())
                    for expert in experts:
                        found = dequantize(layer.matrix("gate", expert))
                        assert np.array_equal(found, dense["gate"][expert].numpy())
            except QMoEError as error:
                assert error.code == "io"
                failed += 1
        return failed

    with ThreadPoolExecutor(6) as pool:
        failures = [pool.submit(work, seed) for seed in range(6)]
        assert 0 < sum(each.result(timeout=120) for each in failures) < 600
    monkeypatch.undo()
    assert reads_of(cache, layer, [0, 1, 2]) <= 3
    assert cache.bytes <= cache.budget


@pytest.mark.skipif(not hasattr(os, "fork"), reason="not a system of processes that fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process(file: QMoEFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads by threads of its own, and does not wait for reads of the other process."""
    cache, (layer, _) = cached(file, everything(file))
    with layer.using([0]):
        pass
    go_on = threading.Event()
    read = QMoEFile.read_encoded

    def slow(self: QMoEFile, name: str, expert: int | None = None) -> object:
        go_on.wait()
        return read(self, name, expert)

    with monkeypatch.context() as patch:
        patch.setattr(QMoEFile, "read_encoded", slow)
        layer.prefetch([1])
        child = os.fork()
        if not child:
            code = 1
            signal.alarm(60)  # ends it if it waits for ever
            try:
                go_on.set()
                code = 0 if reads_of(cache, layer, [0, 1, 2]) == 2 else 2
            finally:
                os._exit(code)
        go_on.set()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reads_of(cache, layer, [0, 1]) == 0


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_outputs_are_those_of_the_mapped_model(model: Converted, share: float) -> None:
    mapped = load_model(model.file)
    assert expert_cache(mapped) is None
    with qmoe_format.open(model.file) as file:
        experts = sum(each.stored_bytes for each in file.tensors.values() if each.stack)
    limited = load_model(model.file, expert_memory=max(1, int(share * experts)))
    assert torch.equal(logits(limited), logits(mapped))
    assert generated(limited) == generated(mapped)
    cache = expert_cache(limited)
    assert cache is not None
    assert cache.bytes <= cache.budget
    assert (cache.counters.evictions == 0) == (share == 1)


def test_gradients_are_those_of_the_mapped_model(model: Converted) -> None:
    found = []
    for budget in (None, 1):
        loaded = load_model(model.file, expert_memory=budget)
        loaded.requires_grad_(False)
        embedding = loaded.get_input_embeddings().weight.requires_grad_()
        found += torch.autograd.grad(logits(loaded).square().sum(), embedding)
    assert torch.equal(*found)


@torch.no_grad()
def test_memory_that_is_short_is_noticed(model: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    with qmoe_format.open(model.file) as file:
        experts = sum(each.stored_bytes for each in file.tensors.values() if each.stack)
    monkeypatch.setattr(expert_memory, "available_memory", lambda: 2 * experts)
    assert expert_cache(load_model(model.file)) is None
    monkeypatch.setattr(expert_memory, "available_memory", lambda: experts)
    cache = expert_cache(load_model(model.file))
    assert cache is not None
    assert cache.budget < experts
    monkeypatch.setattr(expert_memory, "available_memory", lambda: None)
    assert expert_cache(load_model(model.file)) is None


def test_the_memory_of_this_machine() -> None:
    assert (available_memory() or 1 << 20) >= 1 << 20


def test_budgets_that_make_no_sense(model: Converted) -> None:
    refusal(lambda: load_model(model.file, expert_memory=0), "argument")
    with pytest.raises(QMoEError):
        load_model(model.file, device="cuda", expert_memory=1000)


@torch.no_grad()
def test_a_model_elsewhere(model: Converted, elsewhere: str) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/elsewhere/m.qmoe", model.file.read_bytes())
    limited = load_model(f"{elsewhere}/m.qmoe", expert_memory=1)
    assert torch.equal(logits(limited), logits(load_model(model.file)))
