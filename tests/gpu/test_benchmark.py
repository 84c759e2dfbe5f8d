"""The GPU benchmark without a GPU: all of it runs but the clock and the device's launches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu as benchmark
from benchmarks import gpu_anchor, gpu_checks, gpu_figures, gpu_timing, gpu_ways
from benchmarks.gpu_timing import Work
from qmoe_format import codec
from qmoe_format.gpu.launch import Launch
from tests.gpu import shim

SHAPE = (17, 96)
SETTINGS, DEVICE = {"width": 12}, {"name": "none"}
BANDWIDTH = {"read": 1e12, "write": 1e12}
PROFILE = codec.PROFILES["fast"]


class CpuGpu:
    """``qmoe_format.gpu`` by way of ``qmoe_format.codec``; a stack is a list."""

    @staticmethod
    def upload(matrices: list[codec.EncodedMatrix]) -> list[codec.EncodedMatrix]:
        return matrices

    @staticmethod
    def matmul(matrix: codec.EncodedMatrix, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(torch.from_numpy(codec.matmul(matrix, x.float().numpy())))

    @staticmethod
    def matvec(matrix: codec.EncodedMatrix, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(torch.from_numpy(codec.matvec(matrix, x.float().numpy())))

    @staticmethod
    def expert_matvec(
        stack: list[codec.EncodedMatrix],
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor | None = None,
        *,
        out: torch.Tensor,
    ) -> torch.Tensor:
        vectors = x.float().numpy()
        numbers = enumerate(experts.tolist())
        y = np.stack([[codec.matvec(stack[e], vectors[t]) for e in row] for t, row in numbers])
        if weights is not None:
            y = np.einsum("tkr,tk->tr", y, weights.numpy())
        return out.copy_(torch.from_numpy(y))

    @staticmethod
    def decode(matrix: codec.EncodedMatrix, dtype: str, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(torch.from_numpy(codec.dequantize(matrix)))


def with_numpy(launch: Launch) -> Launch:
    """With numpy's view of its tensors."""

    def array(argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor):
            return argument
        words = argument.view({2: torch.int16, 4: torch.int32}[argument.itemsize]).numpy()
        return words.view({2: np.uint16, 4: np.uint32}[argument.itemsize])

    return replace(launch, arguments=tuple(map(array, launch.arguments)))


@pytest.fixture
def without_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gpu_anchor, gpu_checks, gpu_ways):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for module in (gpu_checks, gpu_ways):
        monkeypatch.setattr(module, "gpu", CpuGpu)
    monkeypatch.setattr(gpu_ways, "copies", lambda size: 17)
    monkeypatch.setattr(gpu_anchor, "WARPS", (4,))
    monkeypatch.setattr(gpu_anchor, "execute", lambda launch: shim.execute(with_numpy(launch)))


@pytest.fixture
def problem(without_device: None) -> gpu_ways.Problem:
    return gpu_ways.Problem(*SHAPE, 0.885, PROFILE)


def works(problem: gpu_ways.Problem) -> list[Work]:
    x = gpu_ways.bf16(64, SHAPE[1])
    ours, anchors = gpu_ways.ours(problem, x), gpu_ways.anchors(problem, x)
    return [*ours, *anchors, *gpu_ways.dense(problem.values(torch.bfloat16), x)]


def timed(work: Work) -> dict[str, Any]:
    seconds = {"ours": 1e-6, "bf16": 2e-6, "anchor": 3e-6}[work.family]
    if work.way == "mv":
        seconds = 1.5e-6
    time = {"median": seconds, "least": seconds, "most": seconds}
    return work.record(graph=time, plain=time)


@shim.needs_compiler
def test_every_way_runs_and_those_of_a_call_agree(problem: gpu_ways.Problem) -> None:
    answers: dict[str, Any] = {}
    for work in works(problem):
        work.run(work.copies - 1)
        answer = work.run(0)
        if isinstance(answer, torch.Tensor):  # several launches return nothing
            # Some ways give y transposed; ours multiplies experts by scales of their own.
            values = np.sort(answer.float().numpy(), axis=None)
            call = work.call if work.call.startswith("one") else f"{work.call}, {work.family}"
            np.testing.assert_allclose(
                values, answers.setdefault(call, values), rtol=0.02, atol=0.02, err_msg=work.way
            )
    assert {f"one {tokens}" for tokens in gpu_ways.TOKENS} < set(answers)


@shim.needs_compiler
def test_what_is_right_passes(problem: gpu_ways.Problem) -> None:
    gpu_checks.check(problem)


@shim.needs_compiler
@pytest.mark.parametrize(
    ("function", "named"),
    [
        ("matvec", "matvec"),
        ("matmul", "matmul of 1 tokens"),
        ("expert_matvec", "expert_matvec of 1 tokens"),
        ("decode", "decoding to bf16"),
    ],
)
def test_what_is_wrong_is_named(
    problem: gpu_ways.Problem, monkeypatch: pytest.MonkeyPatch, function: str, named: str
) -> None:
    right = getattr(CpuGpu, function)

    def wrong(*arguments: Any, out: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = right(*arguments, out=out)
        y.view(-1)[-1] += 1
        return y

    monkeypatch.setattr(CpuGpu, function, staticmethod(wrong))
    with pytest.raises(gpu_checks.Wrong, match=named):
        gpu_checks.check(problem)


def test_nothing_happens_without_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    monkeypatch.setattr("sys.argv", ["gpu", "--results", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        benchmark.main()
    assert str(left.value.code).startswith("error[")
    assert not list(tmp_path.iterdir())


@shim.needs_compiler
def test_figures_of_a_run_that_is_stopped_and_goes_on(
    problem: gpu_ways.Problem, tmp_path: Path
) -> None:
    measured = [timed(work) for work in works(problem)]
    compared = gpu_figures.compare(measured, BANDWIDTH)
    one = next(record for record in compared if record["call"] == "one 1")
    assert one["bf16_graph"] == pytest.approx(1.5)
    assert one["bf16_way"] == "mv"
    assert one["anchor_plain"] == pytest.approx(3)
    assert one["weights_per_second"] == pytest.approx(1e6 * SHAPE[0] * SHAPE[1])
    read = problem.bytes + 2 * sum(SHAPE)
    assert one["of_bandwidth"] == pytest.approx(read * 1e6 / 1e12)
    shape = {"rows": 4096, "columns": 14336, "compared": compared, "works": measured}
    assert "one 1" in gpu_figures.lines(shape)

    gpu_figures.save(tmp_path, SETTINGS, DEVICE, BANDWIDTH, [shape])
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["summary"]["one 1, 4096x14336 and transpose, zeros .885: to bf16"] == [
        pytest.approx(1.5)
    ]
    assert gpu_figures.kept(tmp_path, SETTINGS, DEVICE) == saved["shapes"]
    with pytest.raises(SystemExit, match="other settings"):
        gpu_figures.kept(tmp_path, {"width": 8}, DEVICE)


@shim.needs_compiler
def test_plot(problem: gpu_ways.Problem, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="extra bench")
    compared = gpu_figures.compare([timed(work) for work in works(problem)], BANDWIDTH)
    gpu_figures.plot([{"rows": 1, "columns": 2, "compared": compared}], tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


@shim.needs_compiler
def test_a_run_leaves_out_what_is_wrong_and_goes_on_where_it_stopped(
    without_device: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[int] = []

    def times(works: list[Work], *_: Any) -> list[dict[str, Any]]:
        measured.append(works[0].weights)
        return [timed(work) for work in works]

    monkeypatch.setattr(gpu_timing, "times", times)
    monkeypatch.setattr(gpu_timing, "bandwidth", lambda rounds: BANDWIDTH)
    monkeypatch.setattr(gpu_timing, "device", lambda: DEVICE)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(gpu_figures, "plot", lambda shapes, path: path.touch())
    monkeypatch.setattr(benchmark, "require_device", lambda: None)
    monkeypatch.setattr(benchmark, "release", lambda: None)

    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["gpu", "--results", str(tmp_path), *arguments])
        benchmark.main()

    run("--shapes", "5x64,64x5", "--quick")
    run("--shapes", "5x64", "--correctness-only")
    assert not list(tmp_path.iterdir())
    run("--shapes", "5x64")
    measured.clear()
    run("--shapes", "5x64,4x32", "--resume")
    assert set(measured) <= {4 * 32 * n for n in range(1000)}
    shapes = json.loads((tmp_path / "gpu.json").read_text())["shapes"]
    assert [(shape["rows"], shape["columns"]) for shape in shapes] == [(5, 64), (4, 32)]
    assert (tmp_path / "gpu.png").exists()

    right = CpuGpu.decode
    monkeypatch.setattr(CpuGpu, "decode", lambda m, dtype, out: right(m, dtype, out).neg_())
    with pytest.raises(SystemExit, match=r"3 x 16, .* decoding to bf16 is wrong"):
        run("--shapes", "3x16")


def test_shapes() -> None:
    assert len(set(gpu_figures.SHAPES)) == 16
    assert all((columns, rows) in gpu_figures.SHAPES for rows, columns in gpu_figures.SHAPES)
    assert benchmark.shape_list("4096x14336,1x2") == [(4096, 14336), (1, 2)]
