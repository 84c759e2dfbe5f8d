"""Train the micro Switch Transformer of `qmoe demo` and write qmoe_format/demo/.

The text is the King James Version as printed by `bible` from Debian's package bible-kjv:

    bible -l4000 gen1:1-rev22:21 > bible.txt
    python tools/train_demo_model.py bible.txt qmoe_format/demo

The model continues text: the encoder reads a prompt, and the decoder repeats and continues it. If
it were trained on continuations alone, so small a model would learn to ignore its prompt; having to
repeat it, the decoder attends to the encoder. It learns this on short passages before it gets long
ones. One thread, fixed seeds and a fixed number of steps make training reproducible.
"""

import argparse
import hashlib
import json
import math
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import qmoe_format
from qmoe_format.cli.demo import BITS
from qmoe_format.container.inspection import describe
from qmoe_format.conversion import Calibration
from qmoe_format.runtime import load_model

PAD, EOS, UNK = 0, 1, 2
VOCABULARY = 1024
EXPERTS = 8
PASSAGE = 64  # tokens of prompt and continuation
PROMPT = (4, 32)  # of them the prompt
TEST_PROMPT = 16
HELD_OUT = 20  # every 20th chapter is never trained on
BATCH = 32
PEAK_RATE = 4e-3
CALIBRATION_PASSAGES, CALIBRATION_WORDS = 400, 45  # as long as PASSAGE, or a little longer
CALIBRATION_PROMPT = (3, 20)  # words
SHORT_STEPS, SHORT_BATCH, SHORT_PROMPT, SHORT_CONTINUATION = 1000, 64, (4, 12), 4
TRAINED = "Trained from scratch"  # begins a paragraph of the folder's README
PROMPTS = (
    "The LORD is my shepherd;",
    "And Moses said unto the children of Israel,",
    "And it came to pass in those days, that",
    "Blessed are they that",
)


def chapters(text: str) -> list[str]:
    """Join the verses of each chapter, without headings and verse numbers."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if verse := re.match(r"\s+\d+ (.+)", line):
            found[-1].append(verse[1].strip())
        elif line.strip():
            found.append([])
    return [" ".join(verses) for verses in found if verses]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def configuration() -> SwitchTransformersConfig:
    return SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=96,
        d_kv=24,
        d_ff=320,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=EXPERTS,
        expert_capacity=1024,
        router_jitter_noise=0.0,
        router_aux_loss_coef=0.02,
        dropout_rate=0.0,
        dense_act_fn="relu",
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )


def passages(ids: Tensor, starts: Tensor, prompt: int, length: int) -> tuple[Tensor, Tensor]:
    """Prompts with an end token, and the passages that begin with them."""
    rows = ids[starts[:, None] + torch.arange(length)]
    ends = torch.full((len(rows), 1), EOS)
    return torch.cat([rows[:, :prompt], ends], 1), rows


def calibration_text(texts: list[str]) -> str:
    """JSON lines of a prompt and its passage, from chapters that the model was trained on."""
    generator = random.Random(0)
    lines: list[str] = []
    while len(lines) < CALIBRATION_PASSAGES:
        words = generator.choice(texts).split()
        start = generator.randrange(len(words))
        passage = words[start : start + CALIBRATION_WORDS]
        prompt = passage[: generator.randint(*CALIBRATION_PROMPT)]
        if len(passage) == CALIBRATION_WORDS:
            lines.append(json.dumps({"text": " ".join(prompt), "target": " ".join(passage)}))
    return "\n".join(lines) + "\n"


def train(model: nn.Module, ids: Tensor, steps: int) -> None:
    torch.manual_seed(0)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    model.train()
    began = time.perf_counter()
    for step in range(steps):
        rate = min(1, (step + 1) / 100) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate
        short = step < SHORT_STEPS
        least, most = SHORT_PROMPT if short else PROMPT
        prompt = int(torch.randint(least, most + 1, ()))
        length = prompt + SHORT_CONTINUATION if short else PASSAGE
        starts = torch.randint(len(ids) - length, (SHORT_BATCH if short else BATCH,))
        source, target = passages(ids, starts, prompt, length)
        loss = model(input_ids=source, labels=target, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - began
            print(f"step {step + 1} loss {loss.item():.3f} {seconds:.0f} s", flush=True)


@torch.inference_mode()
def held_out_loss(model: Any, ids: Tensor) -> tuple[float, dict[str, list[int]]]:
    """Nats per token after the prompt, and the number of tokens of each expert."""
    starts = torch.arange(0, len(ids) - PASSAGE, PASSAGE)
    counts = {"encoder": torch.zeros(EXPERTS), "decoder": torch.zeros(EXPERTS)}
    total = 0.0
    for first in range(0, len(starts), BATCH):
        source, target = passages(ids, starts[first : first + BATCH], TEST_PROMPT, PASSAGE)
        output = model(input_ids=source, labels=target, output_router_logits=True)
        # Not output.loss, which includes the router losses.
        total += functional.cross_entropy(
            output.logits[:, TEST_PROMPT:].flatten(0, 1),
            target[:, TEST_PROMPT:].flatten(),
            reduction="sum",
        ).item()
        routers = {"encoder": output.encoder_router_logits, "decoder": output.decoder_router_logits}
        for part, (logits,) in routers.items():
            counts[part] += logits.argmax(-1).flatten().bincount(minlength=EXPERTS)
    tokens = len(starts) * (PASSAGE - TEST_PROMPT)
    return total / tokens, {part: row.int().tolist() for part, row in counts.items()}


def compressed(folder: Path, **options: Any) -> tuple[float, Any]:
    """Bits per expert weight, and the converted model."""
    with tempfile.TemporaryDirectory() as temporary:
        path = qmoe_format.convert(folder, Path(temporary) / "demo.qmoe", threads=1, **options)
        with qmoe_format.open(path) as file:
            bits = describe(file)["totals"]["experts"]["total_bits_per_weight"]
        return bits or 0.0, load_model(path, dtype=torch.float32)


def report(folder: Path, ids: Tensor, training: str) -> str:
    """The folder's README: provenance, scores and samples of the saved model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = SwitchTransformersForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    calibration = Calibration(folder / "calibration.jsonl", target_column="target")
    small_bits, small = compressed(folder, calibration=calibration, bits_per_weight=BITS)
    rounded_bits, rounded = compressed(folder)
    loss, counts = held_out_loss(model.eval(), ids)
    scores = [
        ("as trained (bf16)", 16.0, loss),
        ("`rd` with `calibration.jsonl`", small_bits, held_out_loss(small, ids)[0]),
        ("`rtn`: rounded to low, 0, high", rounded_bits, held_out_loss(rounded, ids)[0]),
    ]
    experts = [p for n, p in model.named_parameters() if ".experts." in n]
    sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.suffix != ".md"}

    def continued(model: Any, prompt: str) -> str:
        output = model.generate(**tokenizer(prompt, return_tensors="pt"))
        return str(tokenizer.decode(output[0], skip_special_tokens=True))

    head = f"""\
# Demo model

A micro Switch Transformer that repeats a prompt and continues it in the style of the
King James Bible. Its only purpose is to show `qmoe` at work on a trained model.

{training}

{sum(p.numel() for p in model.parameters()):,} parameters, {sum(p.numel() for p in experts):,} \
of them in 16 experts (one sparse layer of 8 in the
encoder, one in the decoder; top-1); {sum(sizes.values()):,} bytes in all:
{", ".join(f"`{name}` {size:,}" for name, size in sizes.items())}.

Loss on the held-out chapters, in passages of {PASSAGE} tokens of which the first
{TEST_PROMPT} are the prompt: nats per token after the prompt.

| experts | bits per weight | loss |
|---|---|---|
"""
    middle = f"""
`calibration.jsonl` has {CALIBRATION_PASSAGES} prompts and passages that the model was
trained on. Tokens by expert, held-out text:

"""
    lines = [f"| {name} | {bits:.3f} | {score:.3f} |" for name, bits, score in scores]
    lines += middle.splitlines()
    lines += [f"- {part}: {', '.join(map(str, row))}" for part, row in counts.items()]
    lines += ["", "Output of `generate`, with the settings of generation_config.json:", ""]
    for prompt in PROMPTS:
        lines.append(f"- **{prompt}**")
        for name, each in (("trained", model), ("rd", small), ("rtn", rounded)):
            lines.append(f"  - {name}: {continued(each, prompt)}")
    return head + "\n".join(lines) + "\n"


def trained(
    arguments: argparse.Namespace, tokenizer: Any, ids: Tensor, documents: int, digest: str
) -> str:
    """Train and save a model; return a paragraph about that for the folder's README."""
    print(f"{len(ids)} tokens", flush=True)
    model = SwitchTransformersForConditionalGeneration(configuration())
    train(model, ids, arguments.steps)

    model.generation_config.update(num_beams=4, no_repeat_ngram_size=4, max_new_tokens=PASSAGE)
    model.to(torch.bfloat16).save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    long_steps = arguments.steps - SHORT_STEPS
    return f"""\
{TRAINED} by tools/train_demo_model.py: {SHORT_STEPS:,} steps of short passages, then
{long_steps:,} of {BATCH} passages of {PASSAGE} tokens; torch {torch.__version__}, transformers
{transformers.__version__}. The text is the King James Version, in the public domain (Debian package
bible-kjv-text 4.38): {documents:,} chapters, of which every {HELD_OUT}th is held out. sha256 of
the text file: `{digest}`.
Model and tokenizer are under the license of this package, Apache-2.0."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument(
        "--keep", action="store_true", help="keep the trained model, and rewrite the rest"
    )
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    raw = arguments.text.read_bytes()
    found = chapters(raw.decode())
    kept = [text for i, text in enumerate(found) if i % HELD_OUT]
    readme = arguments.folder / "README.md"
    digest = hashlib.sha256(raw).hexdigest()
    if arguments.keep and digest not in readme.read_text():
        parser.error(f"{arguments.folder} was not trained on {arguments.text}")
    tokenizer: Any
    if arguments.keep:
        tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    else:
        tokenizer = train_tokenizer(kept)

    def encode(texts: list[str]) -> Tensor:
        batches = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return torch.from_numpy(np.concatenate(batches))

    if arguments.keep:
        paragraphs = readme.read_text().split("\n\n")
        training = next(each for each in paragraphs if each.startswith(TRAINED))
    else:
        training = trained(arguments, tokenizer, encode(kept), len(found), digest)
    (arguments.folder / "calibration.jsonl").write_text(calibration_text(kept))
    held_out = encode([text for i, text in enumerate(found) if i % HELD_OUT == 0])
    text = report(arguments.folder, held_out, training)
    readme.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
