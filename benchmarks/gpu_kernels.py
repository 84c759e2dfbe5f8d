"""What the kernels take of a multiprocessor, as NVRTC's log says. No GPU needed.

    python -m benchmarks.gpu_kernels

Writes benchmarks/results/gpu_kernels.json and prints it as a table in Markdown: registers a thread
for every architecture, where the two compilers differ as a range; threads and shared memory of a
block; local memory (stack) and spills, the most over all architectures. If a kernel spills, the
exit status is 1. The requirements are those of the tests.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from benchmarks import report
from benchmarks.readme import table
from qmoe_format.gpu.launch import Launch
from tests.gpu import nvrtc, variants


def measure(name: str, launch: Launch) -> dict[str, Any]:
    """One kernel with both compilers, which work at the same time."""

    def compile_all(compiler: nvrtc.Compiler) -> list[dict[str, int]]:
        return [
            asdict(compiler.compile(launch.source, architecture)[launch.kernel])
            for architecture in nvrtc.ARCHITECTURES
        ]

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(compile_all, nvrtc.compilers()))

    def most(what: str) -> int:
        return max(resources[what] for all_of_one in found for resources in all_of_one)

    return {
        "variant": name,
        "kernel": launch.kernel,
        "threads": launch.block[0],
        "shared": most("shared") + launch.shared_bytes,
        "stack": most("stack"),
        "spill_stores": most("spill_stores"),
        "spill_loads": most("spill_loads"),
        "registers": {
            architecture: [all_of_one[place]["registers"] for all_of_one in found]
            for place, architecture in enumerate(nvrtc.ARCHITECTURES)
        },
    }


def markdown(kernels: list[dict[str, Any]]) -> str:
    rows = []
    for kernel in kernels:
        registers = [sorted(set(pair)) for pair in kernel["registers"].values()]
        spills = f"{kernel['spill_stores']}, {kernel['spill_loads']}"
        numbers = [kernel["threads"], kernel["shared"], kernel["stack"], spills]
        columns = ["–".join(map(str, pair)) for pair in registers]
        rows.append([kernel["variant"], *columns, *map(str, numbers)])
    architectures = " | ".join(name.removeprefix("sm_") for name in nvrtc.ARCHITECTURES)
    return table(f"registers: sm_ | {architectures} | threads | shared | stack | spills", rows)


def main() -> None:
    launches = {name: make() for name, make in {**variants.MAIN, **variants.OTHER}.items()}
    kernels = [measure(name, launch) for name, launch in launches.items()]
    print(markdown(kernels))
    compilers = [compiler.version for compiler in nvrtc.compilers()]
    report.save("gpu_kernels", {"compilers": compilers, "kernels": kernels})
    spilling = [kernel["variant"] for kernel in kernels if kernel["spill_stores"]]
    if spilling:
        sys.exit(f"spills: {', '.join(spilling)}")


if __name__ == "__main__":
    main()
