"""Registers, shared memory and spills of the kernels, from NVRTC's log. No GPU needed.

    python -m benchmarks.gpu_kernels

Writes benchmarks/results/gpu_kernels.json and prints it as a table in Markdown: registers per
thread for every architecture (a range where the two compilers differ); threads and shared memory
per block; local memory (stack) and spills, the most over all architectures. The exit status is 1 if
a kernel spills. Needs the extra ``test``.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import report
from benchmarks.readme import table
from qmoe_format.gpu.launch import Kernel
from tests.gpu import nvrtc, variants


def measure(name: str, kernel: Kernel) -> dict[str, Any]:
    """Compile one kernel with both compilers, which work at the same time."""

    def compile_all(compiler: nvrtc.Compiler) -> dict[str, nvrtc.Resources]:
        return {
            architecture: compiler.compile(kernel.source, architecture)[kernel.name]
            for architecture in nvrtc.architectures(kernel)
        }

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(compile_all, nvrtc.compilers()))
    every = [resources for by_architecture in found for resources in by_architecture.values()]
    return {
        "variant": name,
        "kernel": kernel.name,
        "threads": kernel.threads,
        "shared": max(resources.shared for resources in every) + kernel.shared_bytes,
        "stack": max(resources.stack for resources in every),
        "spill_stores": max(resources.spill_stores for resources in every),
        "spill_loads": max(resources.spill_loads for resources in every),
        "registers": {
            architecture: [by_architecture[architecture].registers for by_architecture in found]
            for architecture in nvrtc.architectures(kernel)
        },
    }


def markdown(kernels: list[dict[str, Any]]) -> str:
    rows = []
    for kernel in kernels:
        pairs = [kernel["registers"].get(name, []) for name in nvrtc.ARCHITECTURES]
        spills = f"{kernel['spill_stores']}, {kernel['spill_loads']}"
        numbers = [kernel["threads"], kernel["shared"], kernel["stack"], spills]
        columns = ["–".join(map(str, sorted(set(pair)))) for pair in pairs]
        rows.append([kernel["variant"], *columns, *map(str, numbers)])
    architectures = " | ".join(name.removeprefix("sm_") for name in nvrtc.ARCHITECTURES)
    return table(f"registers: sm_ | {architectures} | threads | shared | stack | spills", rows)


def main() -> None:
    every = {**variants.MAIN, **variants.OTHER}
    kernels = [measure(name, make().kernel) for name, make in every.items()]
    print(markdown(kernels))
    compilers = [compiler.version for compiler in nvrtc.compilers()]
    report.save("gpu_kernels", {"compilers": compilers, "kernels": kernels})
    spilling = [kernel["variant"] for kernel in kernels if kernel["spill_stores"]]
    if spilling:
        sys.exit(f"spills: {', '.join(spilling)}")


if __name__ == "__main__":
    main()
