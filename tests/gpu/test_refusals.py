"""What cannot be done is refused, with a code and advice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qmoe_format import gpu
from qmoe_format.codec import encode_matrix
from qmoe_format.errors import QMoEError
from qmoe_format.gpu import cuda
from tests.gpu.fake_cupy import FakeCupy

EXPERTS, ROWS, COLUMNS = 2, 3, 40
MATRIX = encode_matrix(np.eye(ROWS, COLUMNS, dtype=np.int8), np.ones((ROWS, 1), np.uint16))


@pytest.fixture
def stack(cupy: FakeCupy) -> gpu.DeviceStack:
    return gpu.upload([MATRIX] * EXPERTS)


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    """Code and message."""
    with pytest.raises(QMoEError) as error:
        call()
    return error.value.code, str(error.value)


# -- No device -------------------------------------------------------------------------------------


def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.module.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    code, message = refusal(lambda: gpu.upload(MATRIX))
    assert code == "dependency"
    assert "pip install 'qmoe-format[cuda13]'" in message
    assert not gpu.available()


@pytest.mark.parametrize(("gpus", "message"), [(0, "there is no GPU"), (-1, "nvidia-smi")])
def test_no_gpu(cupy: FakeCupy, gpus: int, message: str) -> None:
    cupy.gpus = gpus
    code, said = refusal(lambda: gpu.upload(MATRIX))
    assert code == "device"
    assert message in said
    assert "qmoe_format.codec" in said
    assert not gpu.available()
    with pytest.raises(QMoEError):
        gpu.require()


def test_a_gpu(cupy: FakeCupy) -> None:
    assert gpu.available()
    assert gpu.require() is cupy


def test_no_such_gpu(cupy: FakeCupy) -> None:
    assert refusal(lambda: gpu.upload(MATRIX, device=2)) == (
        "device",
        "there is no GPU 2; choose from 0 to 1",
    )


def test_too_old(cupy: FakeCupy) -> None:
    cupy.capability = "70"
    code, message = refusal(lambda: gpu.upload(MATRIX))
    assert code == "device"
    assert "compute capability 7.0" in message
    assert "7.5" in message
    assert not gpu.available()


def test_out_of_memory(cupy: FakeCupy, stack: gpu.DeviceStack) -> None:
    x = cupy.empty((COLUMNS,), np.float16)
    cupy.free = 5
    for call in (lambda: gpu.upload(MATRIX), lambda: gpu.matvec(stack[0], x)):
        code, message = refusal(call)
        assert code == "memory"
        assert "free_all_blocks" in message


@pytest.mark.parametrize(
    "said",
    ["CuPy failed to load libnvrtc.so.12", "Failed to find CUDA headers. Please install"],
)
def test_no_compiler(
    cupy: FakeCupy, stack: gpu.DeviceStack, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    class Module:
        def get_function(self, name: str) -> Any:
            raise RuntimeError(said)

    monkeypatch.setattr(cupy, "RawModule", lambda **_: Module())
    code, message = refusal(lambda: gpu.matvec(stack[0], cupy.empty((COLUMNS,), np.float16)))
    assert code == "dependency"
    assert said in message
    assert "pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12" in message


# -- Arrays ----------------------------------------------------------------------------------------


def array(cupy: FakeCupy, *shape: int, dtype: Any = np.float16, device: int = 0) -> Any:
    """An array on a GPU."""
    with cupy.cuda.Device(device):
        return cupy.zeros(shape, dtype)


# What is given as x, and what the message says about it.
BAD_X: dict[str, tuple[Callable[[FakeCupy], Any], str]] = {
    "list": (lambda _: [1.0] * COLUMNS, "a builtins.list, not a CuPy array or a torch tensor"),
    "numpy": (lambda _: np.zeros(COLUMNS, np.float16), "a numpy.ndarray, not a CuPy array"),
    "torch on the CPU": (lambda _: torch.zeros(COLUMNS), "x: is on cpu, the weights on GPU 0"),
    "other GPU": (lambda c: array(c, COLUMNS, device=1), "x: is on GPU 1, the weights on GPU 0"),
    "double": (
        lambda c: array(c, COLUMNS, dtype=np.float64),
        "the dtype is float64, not bf16 or fp16",
    ),
    "too short": (lambda c: array(c, COLUMNS - 1), "x: the shape is (39,), not (40)"),
    "two tokens": (lambda c: array(c, 2, COLUMNS), "x: the shape is (2, 40), not (40)"),
    "with gaps": (lambda c: array(c, 2 * COLUMNS)[::2], "not contiguous; give x.contiguous()"),
}


@pytest.mark.parametrize("name", BAD_X)
def test_x(cupy: FakeCupy, stack: gpu.DeviceStack, name: str) -> None:
    make, message = BAD_X[name]
    code, said = refusal(lambda: gpu.matvec(stack[0], make(cupy)))
    assert code == "argument"
    assert message in said


BAD_CALLS: dict[str, tuple[Callable[[FakeCupy, gpu.DeviceStack], Any], str]] = {
    "a stack for a matrix": (
        lambda c, s: gpu.matvec(s, array(c, COLUMNS)),
        "a stack of 2 matrices; choose one of them, stack[e]",
    ),
    "out of the wrong shape": (
        lambda c, s: gpu.matmul(s[0], array(c, 2, COLUMNS), out=array(c, ROWS, 2)),
        "out: the shape is (3, 2), not (2, 3)",
    ),
    "out on another GPU": (
        lambda c, s: gpu.matmul(s[0], array(c, 2, COLUMNS), out=array(c, 2, ROWS, device=1)),
        "out: is on GPU 1",
    ),
    "out of another library": (
        lambda c, s: gpu.matvec(s[0], array(c, COLUMNS), out=np.zeros(ROWS, np.float16)),
        "out: is a numpy.ndarray",
    ),
    "integers for out": (
        lambda c, s: gpu.matvec(s[0], array(c, COLUMNS), out=array(c, ROWS, dtype=np.int32)),
        "out: the dtype is int32",
    ),
    "experts of 64 bits": (
        lambda c, s: gpu.expert_matvec(s, array(c, 2, COLUMNS), array(c, 2, 2, dtype=np.int64)),
        "experts: the dtype is int64, not int32",
    ),
    "one expert per token": (
        lambda c, s: gpu.expert_matvec(s, array(c, 2, COLUMNS), array(c, 2, dtype=np.int32)),
        "experts: the shape is (2,), not (any, any)",
    ),
    "another number of tokens": (
        lambda c, s: gpu.expert_matvec(s, array(c, 3, COLUMNS), array(c, 2, 2, dtype=np.int32)),
        "x: the shape is (3, 40), not (2, 40)",
    ),
    "another k": (
        lambda c, s: gpu.expert_matvec(s, array(c, 2, 3, COLUMNS), array(c, 2, 2, dtype=np.int32)),
        "x: the shape is (2, 3, 40), not (2, 2, 40)",
    ),
    "weights of another shape": (
        lambda c, s: gpu.expert_matvec(
            s, array(c, 2, COLUMNS), array(c, 2, 2, dtype=np.int32), array(c, 2, 1)
        ),
        "weights: the shape is (2, 1), not (2, 2)",
    ),
    "decode to integers": (lambda _, s: gpu.decode(s, "int8"), "cannot be decoded to int8"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_calls(cupy: FakeCupy, stack: gpu.DeviceStack, name: str) -> None:
    call, message = BAD_CALLS[name]
    cupy.launched.clear()
    code, said = refusal(lambda: call(cupy, stack))
    assert code == "argument"
    assert message in said
    assert not cupy.launched


def test_expert_outside_the_stack(stack: gpu.DeviceStack) -> None:
    with pytest.raises(IndexError, match="expert 2 of a stack of 2"):
        stack[2]
