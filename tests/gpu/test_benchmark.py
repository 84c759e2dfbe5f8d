"""The GPU benchmark without a GPU: everything runs but the clock and the device's launches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu as benchmark
from benchmarks import gpu_figures, gpu_layer, gpu_works
from benchmarks.gpu_checks import Wrong, check
from benchmarks.gpu_timing import Cuda, Work
from benchmarks.gpu_works import Problem
from qmoe_format import codec
from qmoe_format.gpu.launch import Launch
from tests.gpu import shim

SHAPE = (17, 96)
SETTINGS = {"width": 12}
PROFILE = codec.PROFILES["fast"]


class CpuGpu:
    """``qmoe_format.gpu`` in terms of ``qmoe_format.codec``; a stack is a list."""

    @staticmethod
    def upload(matrices: list[codec.EncodedMatrix], runs: bool) -> list[codec.EncodedMatrix]:
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
    def gated_experts(
        inputs: tuple[list[codec.EncodedMatrix], ...],
        output: list[codec.EncodedMatrix],
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        *,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        y = torch.zeros(len(x), output[0].rows)
        for token, chosen in enumerate(experts.tolist()):
            for number, weight in zip(chosen, weights[token].tolist(), strict=True):
                given = x[token].float().numpy()
                gate, up = (torch.from_numpy(codec.matvec(each[number], given)) for each in inputs)
                hidden = (torch.nn.functional.silu(gate) * up).numpy()
                y[token] += weight * torch.from_numpy(codec.matvec(output[number], hidden))
        return y if out is None else out.copy_(y)

    @staticmethod
    def decode(matrix: codec.EncodedMatrix, dtype: str, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(torch.from_numpy(codec.dequantize(matrix)))


class Cpu(Cuda):
    """A CPU as the device: kernels run on the shim, and the clock is made up."""

    name = "cpu"

    def __init__(self, gpu: Any = CpuGpu) -> None:
        self.gpu = gpu
        self.timed: list[int] = []  # weights of the first work of each call

    def copies(self, size: int) -> int:
        return 17

    def execute(self, launch: Launch) -> None:
        def array(argument: Any) -> Any:
            if not isinstance(argument, torch.Tensor):
                return argument
            words = argument.view({2: torch.int16, 4: torch.int32}[argument.itemsize]).numpy()
            return words.view({2: np.uint16, 4: np.uint32}[argument.itemsize])

        shim.execute(replace(launch, arguments=tuple(map(array, launch.arguments))))

    def times(self, works: Sequence[Work], rounds: int) -> list[dict[str, Any]]:
        self.timed.append(works[0].weights)
        return [timed(work) for work in works]

    def run_bytes(self, stack: Any) -> int:
        return 0

    def bandwidth(self, rounds: int) -> dict[str, float]:
        return {"read": 1e12, "write": 1e12}

    def description(self) -> dict[str, Any]:
        return {"name": "none"}

    def release(self) -> None: ...


def faulty(function: str) -> Any:
    """``CpuGpu`` with the last number of what ``function`` computes off by one."""
    right = getattr(CpuGpu, function)

    def wrong(*arguments: Any, out: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = right(*arguments, out=out)
        y.view(-1)[-1] += 1
        return y

    return type("Faulty", (CpuGpu,), {function: staticmethod(wrong)})


def timed(work: Work) -> dict[str, Any]:
    seconds = {"ours": 1e-6, "bf16": 2e-6, "anchor": 3e-6}[work.family]
    if work.way == "mv":
        seconds = 1.5e-6
    time = {"median": seconds, "least": seconds, "most": seconds}
    return work.record(graph=time, plain=time)


def make(gpu: Any = CpuGpu) -> Problem:
    return Problem(Cpu(gpu), SHAPE, 0.885, PROFILE)


def works(problem: Problem) -> list[Work]:
    device = problem.device
    x = device.bf16(64, SHAPE[1])
    dense = gpu_works.dense(device, problem.values(torch.bfloat16), x)
    return [*gpu_works.ours(problem, x), *gpu_works.anchors(problem, x), *dense]


@shim.needs_compiler
def test_every_way_runs_and_those_of_a_call_agree() -> None:
    results: dict[str, Any] = {}
    for work in works(make()):
        work.run(work.copies - 1)
        result = work.run(0)
        if isinstance(result, torch.Tensor):  # several launches return nothing
            # Some ways give y transposed; ours multiplies experts with different scales.
            values = np.sort(result.float().numpy(), axis=None)
            call = work.call if work.call.startswith("one") else f"{work.call}, {work.family}"
            np.testing.assert_allclose(
                values, results.setdefault(call, values), rtol=0.02, atol=0.02, err_msg=work.way
            )
    assert {f"one {tokens}" for tokens in gpu_works.TOKENS} < set(results)


@shim.needs_compiler
def test_right_results_pass() -> None:
    check(make())


@pytest.mark.parametrize(
    ("function", "named"),
    [
        ("matvec", "matvec"),
        ("matmul", "matmul of 1 tokens"),
        ("expert_matvec", "expert_matvec of 1 tokens"),
        ("decode", "decoding to bf16"),
    ],
)
def test_a_wrong_result_is_named(function: str, named: str) -> None:
    with pytest.raises(Wrong, match=named):
        check(make(faulty(function)))


def test_nothing_happens_without_a_device(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(SystemExit, match=r"error\["):
        benchmark.main(["--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@shim.needs_compiler
def test_figures(tmp_path: Path) -> None:
    problem = make()
    bandwidth, about = problem.device.bandwidth(1), problem.device.description()
    measured = [timed(work) for work in works(problem)]
    compared = gpu_figures.compare(measured, bandwidth)
    one = next(record for record in compared if record["call"] == "one 1")
    assert one["bf16_graph"] == pytest.approx(1.5)
    assert one["bf16_way"] == "mv"
    assert one["anchor_plain"] == pytest.approx(3)
    assert one["weights_per_second"] == pytest.approx(1e6 * SHAPE[0] * SHAPE[1])
    read = problem.bytes + 2 * sum(SHAPE)
    assert one["of_bandwidth"] == pytest.approx(read * 1e6 / 1e12)
    shape = {"rows": 4096, "columns": 14336, "compared": compared, "works": measured}
    assert "one 1" in gpu_figures.lines(shape)

    gpu_figures.save(tmp_path, SETTINGS, about, bandwidth, [shape])
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["summary"]["one 1, 4096x14336 and transpose, zeros .885: to bf16"] == [
        pytest.approx(1.5)
    ]
    assert gpu_figures.kept(tmp_path, SETTINGS, about) == saved["shapes"]
    with pytest.raises(SystemExit, match="other settings"):
        gpu_figures.kept(tmp_path, {"width": 8}, about)

    pytest.importorskip("matplotlib", reason="extra bench")
    gpu_figures.plot([shape], tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


@shim.needs_compiler
def test_a_run_leaves_out_what_is_wrong_and_resumes(tmp_path: Path) -> None:
    device = Cpu()

    def run(*arguments: str, device: Cpu = device) -> list[str]:
        options = benchmark.parse(["--results", str(tmp_path), *arguments])
        return benchmark.run(options, device)[1]

    assert run("--shapes", "5x64,64x5", "--quick") == []
    assert run("--shapes", "5x64", "--correctness-only") == []
    assert not list(tmp_path.iterdir())
    run("--shapes", "5x64")
    device.timed.clear()
    run("--shapes", "5x64,4x32", "--resume")
    assert {weights % (4 * 32) for weights in device.timed} == {0}
    shapes = json.loads((tmp_path / "gpu.json").read_text())["shapes"]
    assert [(shape["rows"], shape["columns"]) for shape in shapes] == [(5, 64), (4, 32)]

    (wrong,) = run("--shapes", "3x16", device=Cpu(faulty("decode")))
    assert wrong == "3 x 16, zeros 0.6: decoding to bf16 is wrong"


@shim.needs_compiler
def test_layers() -> None:
    device = Cpu()
    found = gpu_layer.measure(device, 64, 32, 3, device.bandwidth(3))
    assert len(device.timed) == len(gpu_layer.TOKENS)
    assert {one["call"] for one in found["compared"]} == {"layer 1", "layer 2"}
    assert {one["bf16_graph"] for one in found["compared"]} == {2.0}
    assert all(rate["median"] > 0 for rate in found["uploads"].values())

    def wrong(*given: Any, out: torch.Tensor | None) -> torch.Tensor:
        return 1.1 * CpuGpu.gated_experts(*given, out=out)

    device.gpu = SimpleNamespace(upload=CpuGpu.upload, gated_experts=wrong)
    with pytest.raises(Wrong, match=r"inner 32, zeros 0.6: a layer is off by 0\.1"):
        gpu_layer.measure(device, 64, 32, 3, device.bandwidth(3))


def test_shapes() -> None:
    assert len(set(gpu_figures.SHAPES)) == 16
    assert all((columns, rows) in gpu_figures.SHAPES for rows, columns in gpu_figures.SHAPES)
    assert benchmark.shape_list("4096x14336,1x2") == [(4096, 14336), (1, 2)]
