"""Layers of compressed experts on a GPU: kernels are called on the shim's CPU, or on a real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qmoe_format import QMoEFile, gpu
from qmoe_format.codec import EncodedMatrix
from qmoe_format.gpu.device_stack import DeviceStack
from qmoe_format.gpu.int_dict_packing import DictLayout
from qmoe_format.gpu.runs import expected_bytes
from qmoe_format.runtime.grouped_linear import Group, grouped_linear
from qmoe_format.runtime.lazy_stack import LazyStack
from qmoe_format.runtime.tuning import Tuning
from tests.gpu import shim
from tests.gpu.conftest import cupy  # noqa: F401 -- a fixture
from tests.gpu.fake_cupy import FakeCupy
from tests.runtime.files import EXPERTS, HIDDEN, Dense, random
from tests.runtime.test_experts import gpt_oss, mixtral, routing

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (gpu.available() and torch.cuda.is_available()), reason="torch or CuPy finds no GPU"
    ),
]


class Tensor(torch.Tensor):
    """On the CPU, and says that it is on a GPU."""

    is_cuda = property(lambda _: True)

    def get_device(self) -> int:
        """The GPU."""
        return 0


def to_gpu(tensor: torch.Tensor) -> Any:
    return tensor.detach().clone().as_subclass(Tensor).requires_grad_(tensor.requires_grad)


Calls = list[str]


@pytest.fixture
def calls(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> Calls:  # noqa: F811
    """Calls of ``qmoe_format.gpu``, which take ``Tensor``, are recorded."""
    made: Calls = []

    def array(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        assert isinstance(value, Tensor), "this is on the CPU"
        plain = value.detach().as_subclass(torch.Tensor)
        bits = plain.view(torch.int16).numpy().view(np.uint16) if is_bf16(plain) else plain.numpy()
        return cupy.asarray(bits)

    def is_bf16(tensor: torch.Tensor) -> bool:
        return tensor.dtype == torch.bfloat16

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(gpu, name)

        def call(stack: Any, *arguments: Any, out: Any = None) -> Any:
            made.append(name)
            if out is not None:  # decode
                dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[out.dtype]
                result = real(stack, dtype)
            else:
                result = real(stack, *map(array, arguments))
            bits = torch.from_numpy(np.ascontiguousarray(result.view(np.ndarray)))
            tensor = bits.view(torch.bfloat16) if bits.dtype == torch.uint16 else bits
            return tensor.as_subclass(Tensor) if out is None else out.copy_(tensor)

        return call

    for name in ("matmul", "expert_matvec", "gated_experts", "decode"):
        monkeypatch.setattr(gpu, name, wrap(name))
    return made


@shim.needs_compiler
@pytest.mark.parametrize("family", [mixtral, gpt_oss])
def test_few_tokens_take_few_calls(
    file: QMoEFile, dense: Dense, calls: Calls, family: Callable[..., Any]
) -> None:
    """One for the whole layer if its activation is silu(gate) * up, otherwise one per stack."""
    layer, reference = family(file, dense)
    expected = ["gated_experts"] if family is mixtral else ["expert_matvec"] * 2
    for tokens in (1, 5):
        x, (index, weights) = random(tokens, HIDDEN), routing(tokens)
        index[-1, -1] = EXPERTS - 1
        with torch.no_grad():
            want = reference(x, index, weights)
            y = layer(to_gpu(x), to_gpu(index), to_gpu(weights))
        torch.testing.assert_close(y.as_subclass(torch.Tensor), want, rtol=1e-4, atol=1e-5)
        assert calls == expected
        calls.clear()


@shim.needs_compiler
def test_experts_that_do_not_exist_are_left_out(file: QMoEFile, dense: Dense, calls: Calls) -> None:
    layer, reference = mixtral(file, dense)
    x, (index, weights) = random(4, HIDDEN), routing(4)
    index[1], index[2, 0] = EXPERTS, EXPERTS
    with torch.no_grad():
        want = reference(x, index, weights)
        y = layer(to_gpu(x), to_gpu(index), to_gpu(weights))
    torch.testing.assert_close(y.as_subclass(torch.Tensor), want)


@shim.needs_compiler
@pytest.mark.parametrize(("tokens", "kernel"), [(3, "matmul"), (70, "decode")])
def test_groups(file: QMoEFile, dense: Dense, calls: Calls, tokens: int, kernel: str) -> None:
    """Few tokens are multiplied from the codewords, many with W decoded."""
    x = random(tokens, HIDDEN)
    y = grouped_linear([LazyStack(file, "up")], to_gpu(x), [Group(1, 0, tokens)], Tuning())
    torch.testing.assert_close(y.as_subclass(torch.Tensor), x @ dense["up"][1].T)
    assert calls == [kernel]


@shim.needs_compiler
def test_a_stack_is_uploaded_once(
    file: QMoEFile, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[int] = []
    real = gpu.upload

    def upload(matrices: Any, device: int, runs: bool) -> DeviceStack:
        uploads.append(device)
        return real(matrices, device=device, runs=runs)

    monkeypatch.setattr(gpu, "upload", upload)
    stack = LazyStack(file, "gate")
    for _ in range(2):
        grouped_linear([stack], to_gpu(random(2, HIDDEN)), [Group(0, 0, 2)], Tuning())
    assert uploads == [0]
    assert len(stack.upload(0)) == EXPERTS
    later = LazyStack(file, "gate")
    assert later.upload(0, runs=False).packed.runs is None
    later.add_runs(0)
    ternary = isinstance(later.matrix(0), EncodedMatrix)
    assert bool(later.upload(0).packed.runs) == bool(stack.upload(0).packed.runs) == ternary


@shim.needs_compiler
def test_runs_leave_memory_for_the_other_stacks(file: QMoEFile, calls: Calls) -> None:
    uploaded = LazyStack(file, "gate").upload(0).packed
    if not isinstance(uploaded.layout, DictLayout):
        return  # no runs
    assert uploaded.runs
    entries = (entry for name, entry in file.tensors.items() if name != "gate")
    others = sum(entry.stored_bytes for entry in entries if entry.stack)
    taken = expected_bytes(uploaded.layout, uploaded.runs.layout)
    gained = uploaded.layout.bytes - sum(array.nbytes for array in uploaded.arrays.values())
    needed = max(taken, taken - gained + others)
    for spare, there in ((1, True), (0, False)):
        gpu.require().free = (1 << 30) // 10 + needed + spare
        assert bool(LazyStack(file, "gate").upload(0).packed.runs) == there


@pytest.mark.parametrize("family", [mixtral, gpt_oss])
@pytest.mark.parametrize("tokens", [1, 40, 400])
@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestOnAGpu:
    """Like transformers on the CPU, in float32."""

    pytestmark = on_a_gpu

    def test_a_layer(
        self,
        file: QMoEFile,
        dense: Dense,
        family: Callable[..., Any],
        tokens: int,
        recording: bool,
        dtype: torch.dtype,
    ) -> None:
        layer, reference = family(file, dense)
        x, (index, weights) = random(tokens, HIDDEN).to(dtype), routing(tokens)
        given = x.cuda().requires_grad_(recording)
        y = layer.cuda()(given, index.cuda(), weights.cuda())
        want = reference(x.float(), index, weights)
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.03}[dtype] * want.abs().max()
        assert (y.detach().cpu().float() - want).abs().max() <= tolerance
        if recording:
            (dx,) = torch.autograd.grad(y.float().sum(), given)
            assert torch.isfinite(dx).all()
