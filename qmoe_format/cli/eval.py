"""``qmoe eval``: measure how well a compressed model predicts a text."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from qmoe_format.cli import downloads, models
from qmoe_format.cli.arguments import (
    TEXT_HELP,
    Commands,
    add_file_argument,
    add_model_options,
    add_text_options,
    add_trust_option,
)
from qmoe_format.cli.formatting import table
from qmoe_format.cli.progress_line import ProgressLine

if TYPE_CHECKING:
    from qmoe_format.runtime.evaluation import Evaluation, Mean

TOKENS_PER_BATCH = 2048


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure how well a compressed model predicts a text",
        description="Print the cross-entropy and perplexity of a compressed model on a text: of "
        "each next token, or of an encoder-decoder model's targets (by default those of T5 span "
        "corruption).",
        epilog="example: qmoe eval switch.qmoe --text eval.jsonl --against switch-base-8/",
    )
    add_file_argument(parser)
    parser.add_argument("--text", metavar="TEXT", required=True, help=TEXT_HELP)
    parser.add_argument(
        "--against",
        metavar="SRC",
        help="the original checkpoint, a folder, its URL or ORG/MODEL[@REVISION]: also show its "
        "loss, KL(original ‖ compressed), and the error of each layer's experts",
    )
    add_text_options(parser)
    add_model_options(parser)
    add_trust_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    models.require_transformers()
    from qmoe_format.calibration.sequences import default_sequence_length, read_batches
    from qmoe_format.calibration.text import read_documents
    from qmoe_format.runtime.evaluation import evaluate
    from qmoe_format.runtime.loading import load_original

    column, target_column = options.text_column or "text", options.target_column
    read_documents(options.text, column, target_column)  # refuses before a large model is loaded
    options.file = downloads.qmoe_file(options.file)
    if options.against:
        options.against = downloads.original(options.against)
        models.check_original(options.against, options.file, options.trust_remote_code)
    tokenizer, model = models.load(options)
    config = model.config.to_dict()
    length = options.sequence_length or default_sequence_length(config)
    batches = read_batches(
        tokenizer,
        config,
        options.text,
        column=column,
        target_column=target_column,
        sequence_length=length,
        samples=options.samples,
        seed=options.seed or 0,
        batch_size=max(1, TOKENS_PER_BATCH // length),
        parse_special_tokens=bool(options.parse_special_tokens),
    )
    original = None
    if options.against:
        original = load_original(options.against, model.dtype, options.trust_remote_code)
        original = models.text_part(original).to(model.device)
    with ProgressLine("eval", "tokens") as progress:
        result = evaluate(model, batches, against=original, progress=progress)
    print(json.dumps(_report(result)) if options.json else "\n".join(_tables(result)))


def _report(result: Evaluation) -> dict[str, object]:
    from qmoe_format.runtime.evaluation import perplexity

    given = {name: each for name, each in dataclasses.asdict(result).items() if each is not None}
    return given | {"perplexity": perplexity(result.cross_entropy.value)}


def _tables(result: Evaluation) -> list[str]:
    from qmoe_format.runtime.evaluation import perplexity

    def row(label: str, mean: Mean) -> tuple[str, ...]:
        return label, f"{mean.value:.5f}", f"± {mean.error:.5f}", f"{perplexity(mean.value):.3f}"

    rows = [row("compressed", result.cross_entropy)]
    if result.original and result.gap:
        gap = (f"{result.gap.value:+.5f}", f"± {result.gap.error:.5f}")
        rows += [row("original", result.original), ("difference", *gap, "")]
    header = (f"{result.tokens:,} tokens", "nats/token", "", "perplexity")
    lines = table(header, rows, left=1)
    if result.kl:
        kl = f"{result.kl.value:.3e} ± {result.kl.error:.0e}"
        lines += ["", f"KL(original ‖ compressed): {kl} nats/token"]
    if result.output_errors:
        errors = [(name, f"{error:.4f}") for name, error in result.output_errors.items()]
        lines += ["", *table(("experts", "output error"), errors, left=1)]
    return lines
