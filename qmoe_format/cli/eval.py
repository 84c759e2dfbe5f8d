"""``qmoe eval``: how well a compressed model predicts a text."""

from __future__ import annotations

import argparse
import dataclasses
import json

from qmoe_format.calibration.sequences import default_sequence_length, read_batches
from qmoe_format.calibration.text import check_file
from qmoe_format.cli import models
from qmoe_format.cli.progress_line import Progress
from qmoe_format.cli.text import table
from qmoe_format.runtime.evaluation import Evaluation, Mean, evaluate, perplexity

TOKENS_AT_ONCE = 2048


def run(options: argparse.Namespace) -> None:
    """Print the figures that ``options`` ask for."""
    column, target_column = options.text_column or "text", options.target_column
    check_file(options.text, column, target_column)  # before a large model is loaded
    if options.against:
        models.check_original(options.against, options.file)
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
        batch_size=max(1, TOKENS_AT_ONCE // length),
    )
    original = models.load_original(options.against, model) if options.against else None
    with Progress("eval", "tokens") as progress:
        found = evaluate(model, batches, against=original, progress=progress)
    print(json.dumps(_report(found)) if options.json else "\n".join(_tables(found)))


def _report(found: Evaluation) -> dict[str, object]:
    """For programs: the figures, and the perplexities of the cross-entropies."""
    report = {name: value for name, value in dataclasses.asdict(found).items() if value is not None}
    report["perplexity"] = perplexity(found.cross_entropy.value)
    return report


def _tables(found: Evaluation) -> list[str]:
    def row(label: str, mean: Mean, relative: bool) -> tuple[str, ...]:
        value = f"{mean.value:+.5f}" if relative else f"{mean.value:.5f}"
        shown = "" if relative else f"{perplexity(mean.value):.3f}"
        return label, value, f"± {mean.error:.5f}", shown

    rows = [row("compressed", found.cross_entropy, relative=False)]
    if found.original and found.gap:
        rows.append(row("original", found.original, relative=False))
        rows.append(row("difference", found.gap, relative=True))
    header = (f"{found.tokens:,} tokens", "nats a token", "", "perplexity")
    lines = table(header, rows, left=1)
    if found.kl:
        lines += [
            "",
            f"KL(original ‖ compressed): {found.kl.value:.3e} ± {found.kl.error:.0e} nats",
        ]
    if found.output_errors:
        errors = [(name, f"{error:.4f}") for name, error in found.output_errors.items()]
        lines += ["", *table(("experts", "output error"), errors, left=1)]
    return lines
