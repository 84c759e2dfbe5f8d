"""Whole layers of experts on a GPU, gate to weighted sum, beside torch's bf16; and uploading them.

    python -m benchmarks.gpu_layer [--quick] [--results FOLDER]

Needs what ``benchmarks.gpu`` needs, and times as it does: in a CUDA graph and launched one by one,
with matrices that come from memory. torch is given the weights of the chosen experts side by side,
which in a model it would have to gather. Writes gpu_layer.json.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import report
from benchmarks.gpu_checks import Wrong
from benchmarks.gpu_figures import compare
from benchmarks.gpu_timing import Cuda, Work
from benchmarks.gpu_works import FUSED, Problem, sets_of_experts
from qmoe_format import codec
from qmoe_format.errors import QMoEError

LAYERS = ((2048, 768), (4096, 1536), (7168, 2048), (4096, 14336))  # hidden, inner
ZEROS = (0.60, 0.885)
TOKENS = (1, 2)
UPLOADS = 5


class Layer:
    """Gate, up and down: random matrices, of which experts are copies with other scales."""

    def __init__(self, device: Cuda, hidden: int, inner: int, zeros: float) -> None:
        profile = codec.PROFILES["fast"]
        self.device, self.hidden, self.inner, self.zeros = device, hidden, inner, zeros
        self.gate = Problem(device, (inner, hidden), zeros, profile)
        self.down = Problem(device, (hidden, inner), zeros, profile)
        self.up = device.gpu.upload(self.of_up(), runs=True)
        self.sets = min(self.gate.experts, self.down.experts) // FUSED

    def of_up(self) -> list[codec.EncodedMatrix]:
        """Those of ``gate``, each with the scales of the next one."""
        return [self.gate.expert(number + 1) for number in range(self.gate.experts)]

    @property
    def weights(self) -> int:
        """Of an expert."""
        return 3 * self.hidden * self.inner

    def run(self, x: Any, experts: Any, weights: Any, out: Any = None) -> Any:
        """Our call."""
        inputs, output = (self.gate.stack, self.up), self.down.stack
        return self.device.gpu.gated_experts(inputs, output, x, experts, weights, out=out)

    def check(self) -> None:
        """Raise ``Wrong`` unless one token's result is near that of dense weights, in float32."""
        x = self.device.bf16(1, self.hidden)
        experts = torch.arange(FUSED, device=x.device)[None]
        weights = torch.full((1, FUSED), 1 / FUSED, device=x.device)
        y = self.run(x, experts, weights)
        gate, down = self.gate.values(torch.float32), self.down.values(torch.float32)
        product, expected = gate @ x[0].float(), torch.zeros(self.hidden, device=x.device)
        for number in range(FUSED):
            factors = [float(Problem.factor(torch.tensor(number + i))) for i in range(2)]
            hidden = F.silu(product * factors[0]) * product * factors[1]
            expected += down @ hidden * factors[0] / FUSED
        error = float((y[0].float() - expected).norm() / expected.norm())
        if not error < 0.01:
            shape = f"hidden {self.hidden}, inner {self.inner}, zeros {self.zeros}"
            raise Wrong(f"{shape}: a layer is off by {error:.3g}")

    def works(self) -> Iterator[Work]:
        """The layer by one call, for some numbers of tokens that all want other experts."""
        stored = 2 * self.gate.bytes + self.down.bytes
        for tokens in TOKENS:
            x, y = self.device.bf16(tokens, self.hidden), self.device.empty(tokens, self.hidden)
            weights = torch.rand((tokens, FUSED), device=x.device)
            numbers = torch.arange(self.sets * FUSED, device=x.device).view(self.sets, FUSED)
            turns = [numbers.roll(-i, 0)[:tokens].contiguous() for i in range(self.sets)]

            def run(i: int, x: Any = x, w: Any = weights, turns: Any = turns, y: Any = y) -> Any:
                return self.run(x, turns[i], w, y)

            yield self._work(tokens, "ours", "gated_experts", self.zeros, stored, self.sets, run)

    def dense(self) -> Iterator[Work]:
        """torch: batched products, with the activation and the sum between and after them."""
        sets = sets_of_experts(self.device, 2 * self.weights) + max(TOKENS) - 1
        gate_up = self.device.bf16(sets * FUSED, 2 * self.inner, self.hidden)
        down = self.device.bf16(sets * FUSED, self.hidden, self.inner)
        for tokens in TOKENS:
            x = self.device.bf16(tokens, self.hidden)
            weights = torch.rand((tokens, 1, FUSED), device=x.device).bfloat16()

            def run(i: int, x: Any = x, weights: Any = weights, tokens: int = tokens) -> Any:
                part = slice(i * FUSED, (i + tokens) * FUSED)
                each = x.repeat_interleave(FUSED, 0)[:, :, None]
                gate, up = torch.bmm(gate_up[part], each).chunk(2, 1)
                y = torch.bmm(down[part], F.silu(gate) * up)
                return torch.bmm(weights, y.view(tokens, FUSED, -1))

            copies = sets - max(TOKENS) + 1
            yield self._work(tokens, "bf16", "bmm", None, 2 * self.weights, copies, run)

    def _work(
        self, tokens: int, family: str, way: str, zeros: float | None, stored: int, *more: Any
    ) -> Work:
        """``stored``: bytes of an expert; ``more``: copies, and what runs."""
        call, pairs = f"layer {tokens}", tokens * FUSED
        return Work(call, family, way, zeros, pairs * stored, pairs * self.weights, *more)

    def upload_rate(self) -> dict[str, float]:
        """Weights/s of uploading up with its runs, which is done when the call returns."""
        matrices, rates = self.of_up(), []
        for _ in range(UPLOADS):
            start = time.perf_counter()
            self.device.gpu.upload(matrices, runs=True)
            rates.append(len(matrices) * self.hidden * self.inner / (time.perf_counter() - start))
        return report.spread(rates)


def measure(device: Cuda, hidden: int, inner: int, rounds: int, bandwidth: Any) -> dict[str, Any]:
    """Check and time a layer at all fractions of zeros."""
    layers = [Layer(device, hidden, inner, zeros) for zeros in ZEROS]
    for layer in layers:
        layer.check()
    works = [work for layer in layers for work in layer.works()] + list(layers[0].dense())
    measured = []
    for call in dict.fromkeys(work.call for work in works):
        measured += device.times([work for work in works if work.call == call], rounds)
    uploads = {layer.zeros: layer.upload_rate() for layer in layers}
    compared = compare(measured, bandwidth)
    return {"hidden": hidden, "inner": inner, "uploads": uploads, "compared": compared}


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="two layers, few rounds, no file")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder")
    options = parser.parse_args()
    try:
        device = Cuda()
    except QMoEError as error:
        sys.exit(f"error[{error.code}]: {error}")
    rounds = 6 if options.quick else 15
    bandwidth, measured = device.bandwidth(rounds), []
    for hidden, inner in LAYERS[:2] if options.quick else LAYERS:
        try:
            measured.append(measure(device, hidden, inner, rounds, bandwidth))
        except Wrong as found:
            sys.exit(f"wrong: {found}")
        print(f"hidden {hidden}, inner {inner}: us, times as fast as bf16 in a graph and not")
        for one in measured[-1]["compared"]:
            names = (f"bf16_{launch}" for launch in ("graph", "plain"))
            ratios = " ".join(f"{one.get(name, math.nan):6.2f}" for name in names)
            print(f"  {one['call']} {one['zeros']:6.3f} {one['microseconds']:7.1f} {ratios}")
        for zeros, rate in measured[-1]["uploads"].items():
            print(f"  upload  {zeros:6.3f} {rate['median'] / 1e9:.1f} G weights/s", flush=True)
        device.release()
        if not options.quick:
            about = device.description()
            report.save("gpu_layer", {"device": about, "layers": measured}, options.results)


if __name__ == "__main__":
    main()
