"""Write the figures of benchmarks/results into benchmarks/README.md, the main ones into README.md.

python -m benchmarks.readme
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.expert_cache import NEW_TOKENS, PROMPTS
from benchmarks.report import load

README = Path(__file__).parents[1] / "README.md"
ALL = Path(__file__).with_name("README.md")
MARKS = "<!-- figures: python -m benchmarks.readme -->\n", "<!-- end of figures -->\n"
FAST, SIZE, QMOE = "ours fast (12 bit)", "ours size (16 bit)", "QMoE"
WAYS = "one rank, two threads", "two ranks, one thread"
SOURCES = {
    ("iid 0.6", 3072): "60 % zeros, 3072 wide",
    ("iid 0.885", 768): "88.5 % zeros, 768 wide",
    ("iid 0.885", 3072): "88.5 % zeros, 3072 wide",
    ("iid 0.95", 3072): "95 % zeros, 3072 wide",
    ("gaussian", 3072): "normal weights, 3072 wide",
    ("switch-mini wi", 256): "trained experts, 256 wide",
    ("switch-mini wo", 1024): "trained experts, 1024 wide",
}
BESIDE = {
    "rd 0.8": ("IQ1_M", "IQ2_XXS", "qmoe"),
    "rd 1": ("IQ2_XXS", "IQ2_S", "qmoe"),
    "rd 2": ("IQ3_XXS",),
}
RATIOS = (
    "decode / zstd to int8",
    "decode / QMoE",
    "matvec / torch bf16",
    "matvec, 2 threads / 1",
    "16 tokens / torch bf16",
)


def table(header: str, rows: list[list[str]]) -> str:
    """A Markdown table."""
    columns = header.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sizes(records: list[dict[str, Any]]) -> str:
    """Bits per weight of the codec and its alternatives."""
    rows = []
    for record in records:
        label = SOURCES.get((record["source"], record["columns"]))
        if label is None:
            continue
        schemes = record["schemes"]
        zstd = min(schemes[f"zstd -19 of {packing}"]["payload"] for packing in ("2-bit", "base-3"))
        figures = [record["entropy"], schemes[FAST]["payload"], schemes[SIZE]["payload"], zstd]
        figures += [schemes[QMOE]["payload"]]
        figures += [schemes[scheme]["total"] for scheme in (FAST, SIZE, QMOE)]
        rows.append((list(SOURCES.values()).index(label), [label, *(f"{f:.3f}" for f in figures)]))
    header = (
        "levels | entropy | fast | size | zstd | QMoE | fast, total | size, total | QMoE, total"
    )
    return table(header, [row for _, row in sorted(rows)])


def speeds(records: list[dict[str, Any]], ratios: dict[str, Any]) -> str:
    """10^9 weights per second of the codec, and ratios."""
    rate = {(r["source"], r["work"]): r["weights_per_second"] / 1e9 for r in records}
    rows = []
    for source in dict.fromkeys(record["source"] for record in records):
        encode, decode, product = (
            rate[source, f"{FAST}: {work}, 1 thread"] for work in ("encode", "decode", "matvec")
        )
        beside = [f"{ratios[f'{source}, {FAST}'][name]:.2f} ×" for name in RATIOS]
        zeros = f"{100 * float(source.split()[1]):g} %"
        own = [f"{encode:.2f}", f"{decode:.1f}"]
        rows.append([zeros, *own, *beside[:2], f"{product:.1f}", *beside[2:]])
    return table(
        "zeros | encode | decode | vs. zstd | vs. QMoE | product | vs. bf16 | 2 threads | "
        "16 tokens vs. bf16",
        rows,
    )


def beside_gguf(models: dict[str, Any]) -> str:
    """Losses of small models in files and in llama.cpp's types, in order of size."""
    rows = []
    for model, found in models.items():
        measured = [item for item in found["records"].items() if "bits" in item[1]]
        for label, record in sorted(measured, key=lambda item: float(item[1]["bits"])):
            ours, error = "recipe" in record["options"], record.get("output_error")
            rows.append(
                [
                    f"{model}, {f'**{label}**' if ours else label}",
                    f"{record['bits']:.2f}",
                    f"{100 * error['geometric_mean']:#.3g} %" if error else "",
                    *(
                        f"{1e3 * each['kl']:#.3g} ± {1e3 * each['kl_error']:.2g}"
                        for each in (record, record["code"], record["licenses"])
                    ),
                    f"{1e3 * record['loss_gap']:+.2f} ± {1e3 * record['loss_gap_error']:.2f}",
                    f"{record['top1']:.1%} ± {record['top1_error']:.1%}",
                ]
            )
    return table(
        "model, **ours** or type | bits | output error | KL, 10⁻³ nats | KL, code | "
        "KL, licenses | loss gap, 10⁻³ nats | same top 1",
        rows,
    )


def speeds_of_models(results: list[dict[str, Any]]) -> str:
    """Speed and memory of compressed models beside transformers."""
    rows = []
    for result in results:
        for runtime, figures in result["ways"].items():
            median = {what: value["median"] for what, value in figures.items()}
            ratio = result.get("speed_to_bf16", {}).get(runtime)
            rows.append(
                [
                    f"{result['case']}, {runtime.replace('qmoe', 'compressed,')}",
                    f"{result['expert_weights'] / 1e9:.2f} G",
                    f"{median['load_seconds']:.1f} s",
                    f"{median['prefill_seconds'] * 1e3:.0f} ms",
                    f"{median['tokens_per_second']:.1f}",
                    "" if ratio is None else f"{ratio:.2f} ×",
                    f"{median['peak_resident_bytes'] / 1e9:.2f} GB",
                ]
            )
    return table(
        "model, runtime | expert weights | load | prompt | tokens/s | vs. bf16 | peak memory", rows
    )


def cached_experts(results: list[dict[str, Any]]) -> str:
    """Speed and bytes read with budgets for experts."""
    rows = []
    for result in results:
        for each in result["budgets"]:
            counted = each["bytes_per_token"]
            speed, mapped = each["tokens_per_second"], result["mapped_tokens_per_second"]
            rows.append(
                [
                    f"{result['case']}, {each['share']:.0%}",
                    f"{speed:.0f}",
                    f"{speed / mapped:.2f} ×",
                    f"{each['milliseconds_waited_per_token']:.1f}",
                    f"{counted['used'] / 1000:.0f}",
                    f"{counted['read'] / 1000:.1f}",
                    f"{counted['read'] / counted['missing']:.3f} ×",
                    f"{counted['read'] / counted['least']:.2f} ×",
                    f"{counted['lru'] / counted['least']:.2f} ×",
                ]
            )
    header = "model, budget | tokens/s | vs. mapped | ms waiting | kB a token uses | reads"
    return table(f"{header} | vs. experts missing | vs. Belady | LRU vs. Belady", rows)


def choices(variants: dict[str, Any]) -> str:
    """What other choices in ``rd`` would cost."""
    error = "error / default's"
    rows = [[label, f"{found[error]:.2f} ×"] for label, found in variants.items()]
    return table("recipe `rd` | error at equal bits", rows[1:])


def more_levels(models: dict[str, dict[str, float]]) -> str:
    """Errors with as many levels as pay, over those with three."""
    rows = []
    for model, found in models.items():
        ceiling = found["bits of three levels, at most"]
        ratios = [f"{value:.2f} ×" for what, value in found.items() if what.startswith("error")]
        rows.append([model, f"{ceiling:.2f}", *ratios])
    return table(
        "model | bits of three levels, at most | at 1.0 bits | at 1.2 | at 1.4 | "
        "at 2.0, over the least error of three levels",
        rows,
    )


def convert_choices(models: dict[str, dict[str, Any]]) -> str:
    """What other choices in a whole conversion would cost."""
    labels = list(dict.fromkeys(label for found in models.values() for label in found))
    rows = []
    for label in labels[1:]:
        ratios = [
            f"{found[label]['kl'] / found[labels[0]]['kl']:.2f} ×" if label in found else ""
            for found in models.values()
        ]
        rows.append([label, *ratios])
    return table(" | ".join(["conversion by `rd`", *(f"KL, {model}" for model in models)]), rows)


def levels_coded(records: list[dict[str, Any]]) -> str:
    """Size and speed of levels beyond -1 to 1."""
    rows = []
    for record in records:
        excess = (record[width]["above_entropy_percent"] for width in ("12 bit", "16 bit"))
        rate = record["weights_per_second"]
        product, dense = rate["12 bit: matvec"], rate["torch bfloat16: matvec"]
        rows.append(
            [
                record["source"].replace("normal", "normal,").replace("laplace", "Laplacian,"),
                *(f"{each:.1f} %" for each in excess),
                f"{rate['12 bit: decode'] / 1e9:.2f}",
                f"{product / 1e9:.2f}",
                f"{product / dense:.2f} ×",
            ]
        )
    return table("weights, entropy | fast | size | decode | product | vs. bf16", rows)


def conversions(found: list[dict[str, Any]]) -> str:
    """Peak memory of conversions."""
    rows = []
    for case in found:
        largest, peak = case["largest_tensor_bytes"], case["convert"]["peak_resident_bytes"]
        sizes = (case["checkpoint_bytes"], largest, peak)
        rows.append([case["checkpoint"], *(f"{size / 1e9:.2f}" for size in sizes)])
    return table("checkpoint | GB | largest tensor, GB | peak memory, GB", rows)


def native_formats(formats: dict[str, Any]) -> str:
    """Speed of decoding them."""
    rows = [
        [name, f"{found['weights_per_second'] / 1e9:.2f}", f"{found['vs_bf16']:.2f} ×"]
        for name, found in formats.items()
    ]
    return table("format | 10⁹ weights/s | vs. bf16", rows)


def scale(run: dict[str, Any]) -> str:
    """Speed and memory of the recipes on experts of large models."""
    rows = [
        [
            f"{result['layer']}, {result['recipe']}",
            f"{result['gparam_per_hour']:.2f}",
            f"{result['hours_for_1.6T']:,.0f} h",
            f"{result['peak_resident_bytes'] / 1e9:.1f} GB",
        ]
        for result in run["results"]
    ]
    return table("layer, recipe | Gparam/h | time for 1.6 T | peak memory", rows)


def older(results: dict[str, Any]) -> str:
    """Seconds of conversions and of single experts, beside an older state of the code."""
    rows = []
    for name, each in results.items():
        before, now = each["older"], each["this"]
        rows.append(
            [
                name,
                f"{before['seconds']:.0f} s, {before['cpu_seconds']:.0f} s",
                f"{now['seconds']:.0f} s, {now['cpu_seconds']:.0f} s",
                f"{each['seconds, older / this']:.1f} ×",
                f"{each['cpu_seconds, older / this']:.1f} ×",
                f"{now['gparam_per_hour']:.1f}" if "gparam_per_hour" in now else "",
            ]
        )
    header = "what | before: time, of all cores | now | times as fast | of all cores | Gparam/h"
    return table(header, rows)


def products_of_kinds(results: list[dict[str, Any]], tokens: int) -> str:
    """Rates of products from codewords, with packed matrices, of torch and of llama.cpp's types."""
    kinds = [*results[0]["rates"]]
    rows = [
        [
            f"{each['shape'][0]} × {each['shape'][1]}",
            f"{each['zeros']:.1%}, {each['levels']}",
            str(each["threads"]),
            *(f"{each['rates'][kind][str(tokens)]:.1f}" for kind in kinds),
        ]
        for each in results
    ]
    return table(" | ".join(["shape", "zeros, levels", "threads", *kinds]), rows)


def crossings(found: dict[str, Any]) -> str:
    """Shares of zeros at which one kernel becomes faster than another, by processor features."""
    names = [*next(iter(found.values()))["crossings"]]
    rows = [
        [features.split(", ")[-1], *(f"{each['crossings'][name]:.0%}" for name in names)]
        for features, each in found.items()
    ]
    header = [f"x in {name}".replace(", ", ", tokens: ") for name in names]
    return table(" | ".join(["processor with", *header]), rows)


def stages(profiles: dict[str, Any]) -> str:
    """The largest shares of the time of conversions."""
    rows = []
    for name, profile in profiles.items():
        shares = [f"{stage} {share:.0%}" for stage, share in profile["shares"].items()]
        rows.append([name, f"{profile['cpu_seconds']:.0f} s", ", ".join(shares[:10])])
    return table("what | of all cores | shares", rows)


def several_ranks(found: list[dict[str, Any]]) -> str:
    """Two ranks beside one with two threads."""
    rows = []
    for case in found:
        one, two = (case[f"{ways}: seconds"]["median"] for ways in WAYS)
        rows.append(
            [
                case["case"],
                f"{one:.1f} s",
                f"{two:.1f} s",
                f"{case['two ranks / one']['median']:.2f} ×",
            ]
        )
    return table("model, recipe | one rank, two threads | two ranks, one thread | ratio", rows)


def simulated_ranks(found: list[dict[str, Any]]) -> str:
    """Conversions of 1.6 T parameters by many ranks."""
    rows = []
    for case in found:
        device = "" if case["device"] == "cpu" else f", {case['device']}"
        alone = case["ranks"][0]["hours"]
        for each in case["ranks"]:
            rows.append(
                [
                    f"{case['recipe']}{device}, {each['ranks']}",
                    f"{each['hours']:,.1f} h",
                    f"{alone / each['hours'] / each['ranks']:.0%}",
                    f"{each['transfer_hours'] + each['assembling_hours']:.1f} h",
                    f"{each['bytes_moved_per_rank'] / 1e12:.2f} TB",
                    f"{each['memory_per_rank'] / 1e9:.1f} GB",
                    f"{each['disk_per_rank'] / 1e9:,.0f} GB",
                ]
            )
    return table(
        "recipe, ranks | time | of linear | reading and writing | moved, a rank | memory, a rank | "
        "disk, a rank",
        rows,
    )


def main_figures() -> str:
    """The text between the marks of README.md."""
    codec, quality, runtime = map(load, ("codec", "quality", "runtime"))
    (schemes,) = (
        record["schemes"]
        for record in codec["sizes"]
        if (record["source"], record["columns"]) == ("iid 0.885", 3072)
    )
    rate = {
        record["work"]: record["weights_per_second"] / 1e9
        for record in codec["speeds"]
        if record["source"] == "iid 0.885"
    }
    ratios = codec["ratios"][f"iid 0.885, {FAST}"]
    packed = [
        each
        for zeros in (0.885, 0.6)
        for each in load("packed")["results"]
        if (each["shape"], each["zeros"]) == ([8192, 14336], zeros)
        and (each["levels"], each["threads"]) == (3, 1)
    ]

    def product(kind: str, case: int) -> float:
        rate: float = packed[case]["rates"][kind]["1"]
        return rate

    def over(ours: str, theirs: str, case: int) -> float:
        return product(ours, case) / product(theirs, case)

    rows = [
        [
            "total bits per weight, 88.5 % zeros, 3072 wide",
            f"{schemes[FAST]['total']:.3f}",
            f"{schemes[QMOE]['total']:.3f}: QMoE's dictionary",
        ],
        [
            "decoding to int8, one core, 10⁹ weights/s",
            f"{rate[f'{FAST}: decode, 1 thread']:.1f}",
            f"ours is {ratios['decode / zstd to int8']:.1f} × zstd, "
            f"{ratios['decode / QMoE']:.1f} × QMoE's codewords",
        ],
        [
            "y = W x from codewords, W 8192 × 14336, one core, 10⁹ weights/s",
            f"{product('stored', 0):.1f}",
            f"ours is {over('stored', 'torch', 0):.2f} × torch with dense bf16; at 60 % zeros "
            f"{over('stored', 'torch', 1):.2f} ×",
        ],
        [
            "the same, x rounded to int8",
            f"{product('rounded', 0):.1f}",
            f"{over('rounded', 'IQ1_S', 0):.2f} × llama.cpp's IQ1_S, "
            f"{over('rounded', 'IQ2_XXS', 0):.2f} × IQ2_XXS; at 60 % zeros "
            f"{over('rounded', 'IQ1_S', 1):.2f} × and {over('rounded', 'IQ2_XXS', 1):.2f} ×",
        ],
        [
            "the same of experts in use: packed, x in int8",
            f"{product('packed', 0):.1f}",
            f"{over('packed', 'torch', 0):.1f} × torch, {over('packed', 'TQ2_0', 0):.1f} × "
            f"llama.cpp's TQ2_0, {over('packed', 'Q2_K', 0):.1f} × Q2_K",
        ],
    ]
    for model, found in quality["models"].items():
        records = found["records"]
        for label in (each for each in BESIDE if each in records):
            beside = "; ".join(
                f"{1e3 * records[other]['kl']:#.3g}: {other} at {records[other]['bits']:.2f}"
                for other in BESIDE[label]
                if other in records
            )
            what = f"{model} at {records[label]['bits']:.2f} bits: KL(bf16 ‖ file), 10⁻³ nats"
            rows.append([what, f"{1e3 * records[label]['kl']:#.3g}", beside])
    gpu = load("gpu")
    for rows_of, columns, call, what in (
        (4096, 14336, "one 1", "y = W x"),
        (4096, 1536, "fused 1", "eight experts, one token"),
    ):
        (compared,) = (
            each["compared"]
            for each in gpu["shapes"]
            if (each["rows"], each["columns"]) == (rows_of, columns)
        )
        found = {record["zeros"]: record for record in compared if record["call"] == call}
        rows.append(
            [
                f"{gpu['device']['name']}: {what}, {rows_of} × {columns}, 88.5 % zeros, µs",
                f"{found[0.885]['microseconds']:.1f}",
                f"ours is {found[0.885]['bf16_graph']:.1f} × torch in bf16, "
                f"{found[0.885]['anchor_graph']:.0f} × QMoE's kernel; at 60 % zeros "
                f"{found[0.6]['bf16_graph']:.1f} × and {found[0.6]['anchor_graph']:.0f} ×",
            ]
        )
    (ways,) = (each["ways"] for each in runtime["results"] if each["case"] == "mixtral-like")
    shown = [ways[way] for way in ("qmoe fp32", "transformers bf16", "transformers fp32")]
    for what, key, digits, unit in [
        ("a Mixtral with 0.7 G expert weights on 2 cores: tokens/s", "tokens_per_second", 1, 1),
        ("its peak memory, GB", "peak_resident_bytes", 2, 1e9),
    ]:
        own, bf16, fp32 = (f"{way[key]['median'] / unit:.{digits}f}" for way in shown)
        rows.append([what, own, f"{bf16}: transformers in bf16; {fp32}: in fp32"])
    return f"""\
From the scripts in `benchmarks/`, on a shared machine with {codec["machine"]["cores"]} cores.
[benchmarks/README.md](benchmarks/README.md) has all figures, including those where we are behind.

{table("what | `.qmoe` | compared with", rows)}

![KL against bits per weight of our recipes and of GGUF's types](benchmarks/results/quality.png)
"""


def on_gpu(shapes: list[dict[str, Any]]) -> str:
    """Products on a GPU beside dense bf16 and QMoE's kernel."""

    def ratio(record: dict[str, Any], family: str) -> str:
        return f"{record[f'{family}_graph']:#.3g} ×"

    rows = []
    for shape in shapes:
        found = {(r["call"], r["zeros"]): r for r in shape["compared"]}
        for zeros, bits in shape["bits_per_weight"].items():
            one, eight, many = (
                found[call, float(zeros)] for call in ("one 1", "fused 1", "fused 16")
            )
            rows.append(
                [
                    f"{shape['rows']} × {shape['columns']}, {100 * float(zeros):g} %",
                    f"{bits:.2f}",
                    f"{one['microseconds']:.1f}",
                    *(ratio(one, family) for family in ("bf16", "anchor")),
                    f"{eight['microseconds']:.1f}",
                    *(ratio(eight, family) for family in ("bf16", "anchor")),
                    ratio(many, "bf16"),
                ]
            )
    return table(
        "matrix, zeros | bits | one, µs | vs. bf16 | vs. QMoE | eight, µs | vs. bf16 | vs. QMoE | "
        "16 tokens each, in turn, vs. bf16",
        rows,
    )


def all_figures() -> str:
    """The text of benchmarks/README.md."""
    codec, opening, memory, levels = map(load, ("codec", "opening", "convert_memory", "levels"))
    tried, large, runtime = map(load, ("quantize_choices", "quantize_scale", "runtime"))
    native, kernels = load("native_formats"), load("products")["results"]
    products = load("packed")["results"]
    rounding = "; ".join(
        f"{each['model']} {1e3 * each['exact: kl']:#.3g}e-3 with exact products, "
        f"{1e3 * each['rounded: kl']:#.3g}e-3 with x rounded ({each['added']:+.1%})"
        for each in load("rounded_x")["results"]
    )
    packing = sorted(each["packing_ns_per_weight"] for each in products)
    beside, grouped, imported, gpu = map(load, ("quality", "int_group", "import_qmoe", "gpu"))
    modeled = load("gpu_model")
    predicted = modeled["ratio"]
    sixteen, layers = (
        [each["times as fast"] for each in modeled[name]] for name in ("16 tokens", "layers")
    )
    converted, ranks = load("convert_choices"), load("ranks")
    speed, profiles, cache = map(load, ("convert_speed", "convert_profile", "expert_cache"))
    assumed = ranks["assumed"]
    whole = converted["settings"]
    decoded = sorted(
        record["of_bandwidth"]
        for shape in gpu["shapes"]
        for record in shape["compared"]
        if record["call"] == "decode 0"
    )
    choice = sorted(result["chosen / best"] for result in kernels)
    classes = tried["variants"]["as it is"]["bits in classes / bits"]
    packed = [
        1 / codec["ratios"][f"iid {share}, {FAST}"]["decode / zstd, still packed"]
        for share in ("0.6", "0.885", "0.95")
    ]
    slowest, fastest = f"{min(packed):.1f}", f"{max(packed):.1f}"
    opened = opening["milliseconds"]["open and take an expert"]["median"]
    threads = large["runs"]["cpu"]["threads"]
    speedups = sorted(
        each["times as fast as torch bf16"] for each in grouped["results"] if each["tokens"] == 1
    )
    return f"""\
# Figures

Measured by the scripts in this folder on a shared machine with {codec["machine"]["cores"]} cores.
Processor and versions are in `results/*.json`. Speeds vary by up to a third between runs.
`python -m benchmarks.readme` generates this text.

## Codec

Bits per weight (`python -m benchmarks.codec`). Columns without *total* are the payload: codewords
and signs. The total adds lengths, offsets, two bf16 scales per row, the dictionary and alignment.
`fast` and `size` are the profiles of `qmoe convert`, with codewords of 12 and 16 bits. zstd is
level 19 over 2-bit or base-3 packing, whichever is smaller; QMoE is its published dictionary with
greedy parsing.

{sizes(codec["sizes"])}

![Payload above entropy against the share of zeros](results/codec.png)

Speed of the profile `fast` on one thread, in 10⁹ weights/s and as ratios within the run. Decoding
to int8 is compared with zstd's decompression and unpacking to int8 (zstd that leaves the levels
packed is {slowest} to {fastest} times as fast as ours) and with a decoder of QMoE's codewords. The
product y = W x straight from the codewords, 8192 × 14336, is compared with `torch` and dense bf16.

{speeds(codec["speeds"], codec["ratios"])}

Levels beyond -1 to 1 (`python -m benchmarks.codec --levels`): normal and Laplacian weights on the
uniform grid that gives their levels this entropy in bits. `fast` and `size` are the payload above
it; speeds are those of `fast` on one thread, in 10⁹ weights/s.

{levels_coded(levels["levels"])}

Integers in groups, `int-group` (`python -m benchmarks.int_group`): on matrices beyond the cache,
products with one token are {min(speedups):.2f} to {max(speedups):.2f} times as fast as `torch` with
dense bf16, {speedups[len(speedups) // 2]:.2f} in the median over bits, grids and groups.

Opening a file and reading one of 2048 experts takes {opened:.1f} ms. It touches the preamble, the
index, that expert and its dictionary (`python -m benchmarks.opening`).

Peak memory of conversions, including mapped pages of files (`python -m benchmarks.convert_memory`);
those with a recipe's name are calibrated, the others by rounding:

{conversions(memory["results"])}

Importing a checkpoint as QMoE's authors publish them, with the shapes of switch-base-128 and random
weights (`python -m benchmarks.import_qmoe`): {imported["expert_weights"] / 1e9:.2f} G weights of \
experts from {imported["bits_per_expert_weight"]["published"]:.3f} to
{imported["bits_per_expert_weight"]["converted"]:.3f} bits, all levels and scales equal, with a peak
of {imported["convert"]["peak_resident_bytes"] / 1e9:.2f} GB.

Reading quantized checkpoints: a matrix of 2048 × 7168 from a warm page cache to float32, on one
core, compared with bf16 in the same run (`python -m benchmarks.native_formats`). Much of either is
the time of touching new memory.

{native_formats(native["formats"])}

## Quantizer

What conversion loses (`python -m benchmarks.quality`): our recipes (in bold), of which `rd` was
asked for several sizes, and GGUF's types. These are made by llama.cpp's own code from the same
weights, with an importance matrix of the same calibration text; those without an output error are
of an earlier run. *Few* is calibrated with 40 sequences; *masked* leaves special tokens out
(`--mask-special-tokens`), as QMoE does. Only experts are quantized; bits are per weight of theirs,
with all scales and dictionaries. KL(bf16 ‖ file) and the loss gap (cross-entropy minus that of the
bf16 checkpoint) are per token, computed in fp32; the output error is the geometric mean over the
experts' matrices of each one's error on held-out tokens. *Same top 1* is the share of tokens for
which the most likely next one is the same. The calibration text is English prose and documentation;
*code* is modules of Python's standard library, *licenses* are those of Python packages. Standard
errors are those of the mean over windows of text.

{beside_gguf(beside["models"])}

![KL against bits per weight of our recipes and of GGUF's types](results/quality.png)

What the choices in `rd` are worth for its objective (`python -m benchmarks.quantize_choices`:
experts of each stack of {tried["model"]}, one thread). Sorting an expert's columns by their share
of non-zeros into four classes, each with a dictionary of its own, is not done; it would multiply
the size of the levels by {classes:.3f}.

{choices(tried["variants"])}

Levels beyond -1 to 1, by the same script: the output error with as many levels as pay over that
with three.

{more_levels(tried["levels"])}

And for the whole model, at {whole["bits"]} bits per weight with {whole["samples"]} sequences of
calibration text (`python -m benchmarks.convert_choices`): KL relative to that of `rd` as it is. On
switch-mini that is 2 × 10⁻⁵ nats, and uncertain by a fifth.

{convert_choices(converted["models"])}

Quantizing experts as large as those of switch-c-2048 and of a modern gated model (7168 × 2048), on
{threads} core{"s" if threads > 1 else ""}, without running the model
(`python -m benchmarks.quantize_scale`). The paper's 1.6 T parameters took 16 hours on one A6000,
100 Gparam/h; `rd` at that size needs a GPU, on which it has not been run yet.

{scale(large["runs"]["cpu"])}

The same with `rd` beside the code as it was before it had kernels for 32 rows at a time
(`python -m benchmarks.convert_speed`, {speed["threads"]} threads), and whole conversions of the two
small models at 0.8 bits. Time of all cores tells more: other work shared the machine.

{older(speed["results"])}

Where the time goes now (`python -m benchmarks.convert_profile`); *plan* is the survey of the
original model.

{stages(profiles["profiles"])}

## Several ranks

A conversion by two processes with a thread each, started by torchrun, beside one process with two
threads (`python -m benchmarks.ranks`); medians of runs in turns, without starting Python.

{several_ranks(ranks["compared"])}

Simulated, not measured: a model of {assumed["parameters"] / 1e12:.2f} T expert parameters, with \
{assumed["blocks"]} blocks like those of
switch-c-2048 and {ranks["tokens_per_expert"]:,} tokens for the mean expert, on ranks that are as \
fast as the machine of the
table above. It also counts running the experts, which that table leaves out. To and from the shared
folder, all ranks together move {assumed["shared_folder_bytes_per_second"] / 1e9:.0f} GB/s, \
and one {assumed["rank_bytes_per_second"] / 1e9:.0f} GB/s; nothing overlaps. *Of linear* is the
speed, divided by that of one rank times their number; disk is a rank's share of what the folder
holds.

{simulated_ranks(ranks["simulated"])}

## Running models

On the CPU (`python -m benchmarks.runtime`): a prompt of 32 tokens, then 64 tokens generated with a
KV cache, beside the same model in `transformers`. Except in the two trained models, weights are
random. Memory includes mapped pages of the file. *Compressed* is this package's runtime; fp32 or
bf16 is the dtype of activations and of uncompressed weights.

{speeds_of_models(runtime["results"])}

Products (`python -m benchmarks.packed`), 10⁹ weights a second, of one token: *stored* from the
codewords with fp32 x, *rounded* from the codewords with x rounded to int8, *packed* in the layout
of experts in use (see `codec.packed`, 2 or 4 bits a weight; packing takes
{packing[0]:.1f} to {packing[-1]:.1f} ns a weight) with the same x, *torch* dense bf16, and
llama.cpp's types, with x that it rounds to int8. Rounding x to int8 changes y by
{1e3 * products[0]["error_of_int8_x"]:.0f} thousandths of its size, to bf16 by
{1e3 * products[0]["error_of_bf16_x"]:.1f}. KL(original ‖ file) of the trained models
(`python -m benchmarks.rounded_x`): {rounding}.

{products_of_kinds(products, 1)}

The same of 16 tokens, times tokens:

{products_of_kinds(products, 16)}

One token on the same processor, told to have no more than AVX2
(`python -m benchmarks.packed --avx2`), with ggml built for that:

{products_of_kinds(load("packed_avx2")["results"], 1)}

Codewords are expanded to all weights up to some share of zeros, beyond which non-zeros are listed
(`python -m benchmarks.crossings`):

{crossings(load("crossings")["features"])}

With exact products, the number of an expert's tokens decides which kernel multiplies them
(`python -m benchmarks.products`). Over {len(choice)} cases (shapes, zeros, tokens), the chosen
kernel takes {choice[len(choice) // 2]:.2f} times as long as the fastest one in the median, and
{choice[-1]:.2f} times at most.

Experts in less memory than they need (`python -m benchmarks.expert_cache`; budgets are shares of
the experts' bytes): {PROMPTS} prompts of 32 tokens, each continued by {NEW_TOKENS}, with one thread
of `torch`, from an empty cache and with reads that reach the disk; *mapped* has the file in the
page cache. For each token that is generated, prompts included, so many kB of experts are used and
so many read. The latter is compared with the experts that were missing, whose blocks are read
whole, and with Belady's rule, which knows what the same calls will use; so is evicting the least
recently used.

{cached_experts(cache["results"])}

## GPU

On one {gpu["device"]["name"]} (`python -m benchmarks.gpu`): y = W x with one matrix and one token;
then one token and eight experts, in one launch; then 16 tokens for each of eight experts, when they
still went one after another (on tensor cores, as now, they have not run on a GPU). Compared are the
fastest of several ways to multiply with torch in bf16, and QMoE's kernel, which we wrote from the
paper. Each was timed in a CUDA graph, with matrices from memory, not from the L2 cache.
*Bits* are those that a product reads, in the form that `gpu.upload` makes; nothing else of a matrix
is kept.

{on_gpu(gpu["shapes"])}

![Times as fast as bf16 and as QMoE's kernel](results/gpu.png)

From the machine code alone, `python -m benchmarks.gpu_model` predicts these times with one token
to {predicted["least"]:.2f} to {predicted["most"]:.2f} of what was measured,
{predicted["median"]:.2f} in the median, for runs as they were made then. It also predicts what has
changed since or has not run on a GPU: a whole layer of eight experts with one token
{min(layers):.1f} to {max(layers):.1f} times as fast as torch's products alone (on a GPU,
`python -m benchmarks.gpu_layer` measures that, and uploads); 16 tokens for each
of eight experts, now on tensor cores, {min(sixteen):.1f} to {max(sixteen):.1f} times as fast as
bf16, least with the smallest matrices; and what decoding from runs takes
([NOTES.md](../qmoe_format/gpu/NOTES.md)). Decoding
wrote bf16 at {decoded[0]:.0%} to {decoded[-1]:.0%} of the bandwidth of a fill, the least for small
matrices, when it still read codewords. `results/gpu_prototypes.json` has what the layout was
decided by. `results/gpu_kernels.json` has registers, shared memory and spills of all
kernels for compute capabilities 7.5 to 12.0 (`python -m benchmarks.gpu_kernels`).
"""


def with_figures(text: str) -> str:
    """The text of README.md with the part between the marks regenerated."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return before + MARKS[0] + "\n" + main_figures() + "\n" + MARKS[1] + after


if __name__ == "__main__":
    README.write_text(with_figures(README.read_text()))
    ALL.write_text(all_figures())
