"""Expert weights on an NVIDIA GPU, multiplied straight from their codewords.

    from qmoe_format import gpu

    stack = gpu.upload([file.encoded(name, e) for e in range(experts)])
    gpu.matvec(stack[7], x)                             # y = W x, one token
    gpu.matmul(stack[7], x)                             # a few tokens
    gpu.expert_matvec(stack, x, experts, weights)       # each token's k experts, in one call
    gpu.decode(stack[7], "bf16")                        # W itself

x and y are CuPy arrays or torch tensors. CuPy is needed (``pip install 'qmoe-format[cuda13]'`` or
``[cuda12]``) and imported by the first call; ``available()`` says whether it can run.

Beneath: ``packing`` lays out a stack, ``plan`` says which kernels a call takes, ``kernels/*.cu``
are these kernels, ``cuda`` runs them. Nothing of that but ``cuda`` needs a GPU.
"""

from qmoe_format.gpu.cuda import available, require
from qmoe_format.gpu.device_stack import DeviceMatrix, DeviceStack, upload
from qmoe_format.gpu.ops import decode, expert_matvec, matmul, matvec

__all__ = [
    "DeviceMatrix",
    "DeviceStack",
    "available",
    "decode",
    "expert_matvec",
    "matmul",
    "matvec",
    "require",
    "upload",
]
