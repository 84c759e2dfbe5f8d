"""Expert weights on an NVIDIA GPU, multiplied while compressed: int-dict or int-group.

    from qmoe_format import gpu

    stack = gpu.upload([file.encoded(name, e) for e in range(experts)])
    gpu.matvec(stack[7], x)                             # y = W x, one token
    gpu.matmul(stack[7], x)                             # a few tokens
    gpu.expert_matvec(stack, x, experts, weights)       # each token's k experts, in one call
    gpu.gated_experts((gate, up), down, x, experts, weights)  # whole experts, silu(gate) * up
    gpu.decode(stack[7], "bf16")                        # W itself

x and y are CuPy arrays or torch tensors. The first call imports CuPy, an optional dependency
(``pip install 'qmoe-format[cuda13]'`` or ``[cuda12]``); ``available()`` says whether it can run.

How it works: ``packing`` lays out a stack, ``transcode`` makes ``runs`` of it for fast products,
``launch_plan`` and ``expert_plan`` choose the kernels for a call, ``kernels/*.cu`` are their
source, ``launch`` runs them. Modules whose names begin with ``int_dict`` or ``int_group`` belong to
one encoding. Only ``arrays``, ``cuda``, ``device_stack``, ``launch`` and ``transcode`` use CuPy.
"""

from qmoe_format.gpu.cuda import available, require
from qmoe_format.gpu.device_stack import DeviceMatrix, DeviceStack, add_runs, upload
from qmoe_format.gpu.ops import decode, expert_matvec, gated_experts, matmul, matvec

__all__ = [
    "DeviceMatrix",
    "DeviceStack",
    "add_runs",
    "available",
    "decode",
    "expert_matvec",
    "gated_experts",
    "matmul",
    "matvec",
    "require",
    "upload",
]
