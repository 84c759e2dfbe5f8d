#!/usr/bin/env bash
# What to run first on a machine with a GPU, in about seven minutes: tests and compute-sanitizer side by
# side, for they are not timed, then the benchmark's most telling shapes, alone. Needs CUDA's tools,
# torch, CuPy and the requirements of the tests; uses `python` as it is found.
#
#     tools/gpu_first.sh FOLDER
#
# FOLDER gets the logs, and gpu.json, gpu.png and gpu_layer.json shape by shape; the end of each part is
# printed. benchmarks/results/quantize_gpu.json gets the quantizer's figures.
source "$(dirname "$0")/gpu_parts.sh"

part machine 30 bash -c 'nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
python -c "import numpy, numba, torch, cupy
print(*(module.__version__ for module in (numpy, numba, torch, cupy)))"'

part tests 150 python -m pytest -q -m gpu -n 8 --dist worksteal tests/gpu/test_device.py &
part quantizer 150 python -m pytest -q -m gpu -n 2 tests/quantize/test_gpu_steps.py \
    tests/quantize/test_cuda.py &
part runtime 150 python -m pytest -q -m gpu -n 2 tests/runtime/test_device.py &
few="test_shapes and (257x1 or 2047x769 or 11x16383) or experts_outside or transcoding and 5x257"
few+=" or gated and bf16-2-3"
for tool in memcheck racecheck initcheck synccheck; do
    part $tool 150 sanitized $tool tests/gpu/test_device.py -k "$few" &
done
for shapes in 4096x14336 14336x4096 4096x1536,2048x768; do # fills CuPy's cache of kernels
    part "check-$shapes" 150 python -m benchmarks.gpu --correctness-only --shapes $shapes &
done
wait

part benchmark 150 python -m benchmarks.gpu --shapes 4096x14336,4096x1536,2048x768,14336x4096 \
    --results "$out"
part layer 90 python -m benchmarks.gpu_layer --results "$out"
part quantize 240 python -m benchmarks.quantize_gpu
