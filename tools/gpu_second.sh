#!/usr/bin/env bash
# What to run on a machine with a GPU after gpu_first.sh, in at most eight minutes: what that one leaves
# out. Correctness first and side by side, then alone: a whole model, one shape of the benchmark from
# codewords, and all others as far as there is time. The same requirements.
#
#     tools/gpu_second.sh FOLDER
#
# FOLDER, the same one, gets more shapes in gpu.json, codewords/gpu.json, generate.log and the other logs.
source "$(dirname "$0")/gpu_parts.sh"

part convert 100 python -m qmoe_format convert qmoe_format/demo "$out/demo.qmoe" --bits-per-weight 1 \
    --calibration qmoe_format/demo/calibration.jsonl --target-column target &
part runtime 100 python -m pytest -q -m gpu -n 4 tests/runtime/test_device.py &
runs="runs and (decoded_shapes or test_shapes) and (1000x33 or 17x255 or 333x7169)"
for tool in memcheck racecheck initcheck synccheck; do
    part runs-$tool 100 sanitized $tool tests/gpu/test_device.py -k "$runs" &
done
wait

part generate 60 python -m qmoe_format generate "$out/demo.qmoe" "The LORD is my shepherd;" \
    --device cuda --stats
part codewords 60 python -m benchmarks.gpu --codewords --shapes 4096x14336 --results "$out/codewords"
part benchmark 230 python -m benchmarks.gpu --resume --results "$out"
