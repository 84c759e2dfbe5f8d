"""Train the micro Switch Transformer of `qmoe demo` and write qmoe_format/demo/.

The text is the King James Version as Debian's program `bible` prints it (package bible-kjv):

    bible -l4000 gen1:1-rev22:21 > bible.txt
    python tools/train_demo_model.py bible.txt qmoe_format/demo

The model continues text: the encoder reads a prompt, the decoder repeats it and writes on. The
repeating makes the decoder look at the encoder at all; asked for the continuation alone, so small a
model learns to ignore its prompt. It learns to repeat on short passages, then come the long ones.
One thread, fixed seeds and a fixed number of steps.
"""

import argparse
import hashlib
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

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

PAD, EOS, UNK = 0, 1, 2
VOCABULARY = 1024
EXPERTS = 8
PASSAGE = 64  # tokens of prompt and continuation
PROMPT = (4, 32)  # of which so many are the prompt
TEST_PROMPT = 16
HELD_OUT = 20  # one chapter in so many is never trained on
BATCH = 32
PEAK_RATE = 4e-3
SHORT_STEPS, SHORT_BATCH, SHORT_PROMPT, SHORT_CONTINUATION = 1000, 64, (4, 12), 4
PROMPTS = (
    "The LORD is my shepherd;",
    "And Moses said unto the children of Israel,",
    "And it came to pass in those days, that",
    "Blessed are they that",
)


def chapters(text: str) -> list[str]:
    """Verses joined to chapters; headings and verse numbers are dropped."""
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
    """Prompts, closed by the end token, and the passages that they begin."""
    rows = ids[starts[:, None] + torch.arange(length)]
    ends = torch.full((len(rows), 1), EOS)
    return torch.cat([rows[:, :prompt], ends], 1), rows


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
def held_out_loss(
    model: SwitchTransformersForConditionalGeneration, ids: Tensor
) -> tuple[float, dict[str, list[int]]]:
    """Nats a token after the prompt, and how many tokens each expert got."""
    starts = torch.arange(0, len(ids) - PASSAGE, PASSAGE)
    counts = {"encoder": torch.zeros(EXPERTS), "decoder": torch.zeros(EXPERTS)}
    total = 0.0
    for first in range(0, len(starts), BATCH):
        source, target = passages(ids, starts[first : first + BATCH], TEST_PROMPT, PASSAGE)
        output = model(input_ids=source, labels=target, output_router_logits=True)
        # Not output.loss: that has the router losses in it.
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


def ternary(weight: Tensor) -> Tensor:
    """Every weight to the nearest of its row's minimum, zero and maximum."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    return high * (weight > high / 2) + low * (weight < low / 2)


def with_experts(
    folder: Path, change: Callable[[Tensor], Tensor]
) -> SwitchTransformersForConditionalGeneration:
    model = SwitchTransformersForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.copy_(change(parameter))
    return model.eval()


def report(folder: Path, ids: Tensor, training: str) -> str:
    """The folder's README: provenance, scores and samples, all of the model as it was saved."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = with_experts(folder, lambda w: w)
    rounded = with_experts(folder, ternary)
    loss, counts = held_out_loss(model, ids)
    scores = {
        "as trained (bf16)": loss,
        "experts rounded to low, 0, high a row": held_out_loss(rounded, ids)[0],
        "experts all zero": held_out_loss(with_experts(folder, torch.zeros_like), ids)[0],
    }
    experts = [p for n, p in model.named_parameters() if ".experts." in n]
    sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.suffix != ".md"}
    zeros = sum((ternary(p) == 0).sum().item() for p in experts) / sum(p.numel() for p in experts)

    def continued(model: SwitchTransformersForConditionalGeneration, prompt: str) -> str:
        output = model.generate(**tokenizer(prompt, return_tensors="pt"))
        return str(tokenizer.decode(output[0], skip_special_tokens=True))

    lines = [
        "# Demo model",
        "",
        "A micro Switch Transformer that repeats a prompt and writes on in the manner of the King",
        "James Bible. It shows `qmoe` at work on a really trained model; it is of no other use.",
        "",
        training,
        "",
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{sum(p.numel() for p in experts):,} of them in 16 experts (one sparse layer of 8 in the",
        f"encoder, one in the decoder; top-1); {sum(sizes.values()):,} bytes in all:",
        ", ".join(f"`{name}` {size:,}" for name, size in sizes.items()) + ".",
        "",
        f"Loss on the held-out chapters, in passages of {PASSAGE} tokens of which the first",
        f"{TEST_PROMPT} are the prompt: nats a token after the prompt.",
        "",
        "| experts | loss |",
        "|---|---|",
        *(f"| {name} | {score:.3f} |" for name, score in scores.items()),
        "",
        f"Rounded, {zeros:.1%} of the expert weights are zero. Tokens by expert, held-out text:",
        "",
        *(f"- {part}: {', '.join(map(str, row))}" for part, row in counts.items()),
        "",
        "What `generate` makes of a prompt, with the settings of generation_config.json:",
        "",
    ]
    for prompt in PROMPTS:
        lines += [
            f"- **{prompt}**",
            f"  - trained: {continued(model, prompt)}",
            f"  - rounded: {continued(rounded, prompt)}",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    raw = arguments.text.read_bytes()
    found = chapters(raw.decode())
    kept = [text for i, text in enumerate(found) if i % HELD_OUT]
    tokenizer = train_tokenizer(kept)

    def encode(texts: list[str]) -> Tensor:
        batches = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return torch.from_numpy(np.concatenate(batches))

    ids = encode(kept)
    print(f"{len(kept)} chapters, {len(ids)} tokens", flush=True)
    model = SwitchTransformersForConditionalGeneration(configuration())
    train(model, ids, arguments.steps)

    model.generation_config.update(num_beams=4, no_repeat_ngram_size=4, max_new_tokens=PASSAGE)
    model.to(torch.bfloat16).save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    long_steps = arguments.steps - SHORT_STEPS
    training = f"""\
Trained from scratch by tools/train_demo_model.py: {SHORT_STEPS:,} steps of short passages, then
{long_steps:,} of {BATCH} passages of {PASSAGE} tokens; torch {torch.__version__}, transformers
{transformers.__version__}. The text is the King James Version, in the public domain (Debian package
bible-kjv-text 4.38): {len(found):,} chapters, of which every {HELD_OUT}th is held out. sha256 of
the text file: `{hashlib.sha256(raw).hexdigest()}`.
Model and tokenizer are under the licence of this package, Apache-2.0."""
    held_out = encode([text for i, text in enumerate(found) if i % HELD_OUT == 0])
    text = report(arguments.folder, held_out, training)
    (arguments.folder / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
