"""Converting a checkpoint of base-128's size as QMoE's authors publish it: time, memory, size.

    python -m benchmarks.import_qmoe [--folder FOLDER] [--threads N]

Writes benchmarks/results/import_qmoe.json: of ``qmoe convert`` and ``qmoe verify`` the seconds, the
processor's seconds, and peak resident memory (ru_maxrss, which includes mapped pages); and the
experts' bits per weight before and after. Experts have 88.5 % zeros at random; all of them share
four pairs of level matrices, as encoding takes longer than converting, but each has scales of its
own. Some experts of every layer are compared with what was written.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import qmoe_scheme, report
from benchmarks.convert_memory import run
from benchmarks.synthetic import switch_base, tensors
from qmoe_format import container
from qmoe_format.codec import decode
from qmoe_format.machine import cores

CONFIG = switch_base(128) | {"torch_dtype": "bfloat16"}
SHAPES = {"wi": (CONFIG["d_ff"], CONFIG["d_model"]), "wo": (CONFIG["d_model"], CONFIG["d_ff"])}
ZEROS = 0.885
VARIANTS = 4
LAYERS = [
    f"{part}.block.{block}.layer.{place}.mlp.experts"
    for part, place in (("encoder", 1), ("decoder", 2))
    for block in range(1, CONFIG["num_layers"], 2)
]


def levels(matrix: str, variant: int) -> npt.NDArray[np.int8]:
    """Of an expert's matrix."""
    random = np.random.default_rng(variant)
    chances = [ZEROS, (1 - ZEROS) / 2, (1 - ZEROS) / 2]
    return random.choice(np.array([0, -1, 1], np.int8), SHAPES[matrix], p=chances)


def scales(layer: int, matrix: str, expert: int) -> npt.NDArray[np.uint16]:
    """Bits of a lower and an upper value for each row, in bfloat16."""
    random = np.random.default_rng([layer, matrix == "wo", expert])
    bits = random.integers(0x3C00, 0x3D00, (SHAPES[matrix][0], 2), np.uint16)
    bits[:, 0] |= 0x8000
    return bits


def write(folder: Path) -> dict[str, Any]:
    """Write the checkpoint; return what it has."""
    import torch

    def tensor(array: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(array.view(f"i{array.itemsize}")).view(dtype)

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    dense = {
        each.name: tensor(np.concatenate(list(each.parts())), torch.bfloat16).reshape(each.shape)
        for each in tensors(CONFIG)
        if ".experts." not in each.name
    }
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        dense[name] = dense["shared.weight"]
    dense["lm_head.weight"] = dense["shared.weight"].clone()
    torch.save(dense, folder / "noexp.pt")
    encoded = {
        (matrix, variant): qmoe_scheme.encode(levels(matrix, variant))
        for matrix in SHAPES
        for variant in range(VARIANTS)
    }
    sizes, stored = {}, 0
    for number, layer in enumerate(LAYERS):
        parts: dict[str, torch.Tensor] = {}
        for expert in range(CONFIG["num_experts"]):
            for matrix in SHAPES:
                name = f"{layer}.expert_{expert}.{matrix}"
                codewords, offsets = encoded[matrix, expert % VARIANTS]
                low_high = scales(number, matrix, expert).ravel()
                sizes[name] = codewords.size
                stored += codewords.nbytes + offsets.nbytes + low_high.nbytes
                parts |= {
                    f"{name}.w_comp": tensor(codewords, torch.int16).clone(),
                    f"{name}.row_off": tensor(offsets, torch.int32).clone(),
                    f"{name}.ter_minmax": tensor(low_high, torch.bfloat16),
                    f"{name}.weight": torch.zeros(0, dtype=torch.bfloat16),
                }
        torch.save(parts, folder / f"exp{number:02}.pt")
    torch.save(sizes, folder / "sizes.pt")
    rows, columns = SHAPES["wi"]
    return {
        "expert_weights": 2 * rows * columns * len(LAYERS) * CONFIG["num_experts"],
        "expert_bytes": stored,
        "other_weights": sum(each.numel() for each in dense.values()),
        "folder_bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }


def compare(path: Path) -> int:
    """Compare experts with what was written; return how many matrices."""
    compared = 0
    with container.open(path) as file:
        for number, layer in enumerate(LAYERS):
            for matrix in SHAPES:
                for expert in range(VARIANTS):
                    found = file.encoded(f"{layer}.{matrix}", expert)
                    assert np.array_equal(decode(found.levels), levels(matrix, expert))
                    assert np.array_equal(found.row_scale, scales(number, matrix, expert))
                    compared += 1
    return compared


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--folder", type=Path, help="has room for 4 GB")
    parser.add_argument("--threads", type=int, default=cores())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as base:
        folder, target = Path(base) / "published", Path(base) / "out.qmoe"
        # In another process: a child's ru_maxrss starts from this one's.
        figures = report.in_new_process(write, folder)
        threads = ["--threads", str(options.threads)]
        for command in (["convert", str(folder), str(target), *threads], ["verify", str(target)]):
            seconds, processor_seconds, peak = run(command)
            figures[command[0]] = {
                "seconds": round(seconds, 1),
                "processor_seconds": round(processor_seconds, 1),
                "peak_resident_bytes": peak,
            }
        figures["compared_matrices"] = compare(target)
        figures["qmoe_bytes"] = target.stat().st_size
        with container.open(target) as file:
            ours = sum(e.stored_bytes for e in file.tensors.values() if e.stack)
            ours += file.dictionary_bytes
    figures["bits_per_expert_weight"] = {
        "published": 8 * figures["expert_bytes"] / figures["expert_weights"],
        "converted": 8 * ours / figures["expert_weights"],
    }
    figures["threads"] = options.threads
    print(json.dumps(figures, indent=1))
    report.save("import_qmoe", figures)


if __name__ == "__main__":
    main()
