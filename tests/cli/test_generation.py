"""What ``qmoe generate`` shares with ``qmoe chat``: options, streaming, statistics, Ctrl-C."""

from __future__ import annotations

import io
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import transformers

from qmoe_format import convert
from qmoe_format.cli.streaming import Streamer
from tests.conftest import Outcome
from tests.tiny_models import save_model

Run = Callable[..., Outcome]
PROMPT = "w1 w2 w3"
STATISTICS = re.compile(
    r"prompt: 3 tokens, first token after \d+\.\d\d s; generated: (\d+) tokens(, \d+\.\d tokens/s)?"
)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Undo what a shell does to its background jobs, which may include these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    checkpoint = save_model(folder / "checkpoint", "mixtral")
    # A word that transformers' search for stop strings wants to be no unknown token.
    path = checkpoint / "tokenizer.json"
    path.write_text(path.read_text().replace('"w59"', '"abcdef"'))
    return convert(checkpoint, folder / "m.qmoe")


@pytest.fixture
def write(qmoe: Run, file: Path) -> Run:
    """Run ``qmoe generate FILE PROMPT --max-new-tokens 12 …``."""

    def run(*options: str, prompt: str = PROMPT) -> Outcome:
        return qmoe("generate", file, prompt, "--max-new-tokens", "12", *options)

    return run


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the last call of transformers' ``generate``."""
    seen: dict[str, Any] = {}
    generate = transformers.GenerationMixin.generate

    def spy(self: Any, *arguments: Any, **settings: Any) -> Any:
        seen.clear()
        seen.update(settings)
        return generate(self, *arguments, **settings)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", spy)
    return seen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {}),
        (("--temperature", "0.5"), {"do_sample": True, "temperature": 0.5}),
        (("--top-k", "3"), {"do_sample": True, "top_k": 3}),
        (("--top-p", "0.9"), {"do_sample": True, "top_p": 0.9}),
        (("--min-p", "0.1"), {"do_sample": True, "min_p": 0.1}),
        (("--repetition-penalty", "1.5"), {"repetition_penalty": 1.5}),
        (("--stop", "w5", "--stop", "w6 w7"), {"stop_strings": ["w5", "w6 w7"]}),
        (("--temperature", "0", "--top-p", "0.9"), {"do_sample": False}),
    ],
)
def test_options_reach_transformers(
    write: Run, given: dict[str, Any], options: tuple[str, ...], expected: dict[str, Any]
) -> None:
    outcome = write(*options)
    assert (outcome.code, outcome.err) == (0, "")
    always = {"num_beams", "max_new_tokens", "streamer", "tokenizer", "input_ids", "attention_mask"}
    assert {name: value for name, value in given.items() if name not in always} == expected


def test_one_likely_token_is_greedy_decoding(write: Run) -> None:
    greedy = write().out
    assert write("--top-k", "1").out == write("--top-p", "0").out == greedy
    assert write("--temperature", "5", "--top-k", "0").out != greedy


def test_a_stop_string_ends_the_text(write: Run) -> None:
    words = write().out.split()
    last = next(number for number in range(3, 12) if words[number] not in " ".join(words[:number]))
    assert write("--stop", words[last], "--stop", "never").out.split() == words[: last + 1]


def test_the_prompt_may_come_from_stdin(write: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write().out
    read: list[object] = []
    tokenize = transformers.PreTrainedTokenizerBase.__call__

    def spy(self: Any, text: object, **settings: Any) -> Any:
        read.append(text)
        return tokenize(self, text, **settings)

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "__call__", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1\nw2 w3\n\n"))
    assert write(prompt="-").out == expected
    assert read == ["w1\nw2 w3\n"]


def test_stdin_that_is_no_text(write: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w1 \xff"), "utf-8"))
    outcome = write(prompt="-")
    assert (outcome.code, outcome.err[:16]) == (1, "error[argument]:")
    assert "not UTF-8" in outcome.err


def test_text_is_shown_while_it_is_generated(write: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, str]] = []
    show = Streamer.on_finalized_text

    def spy(self: Streamer, text: str, stream_end: bool = False) -> None:
        shown.append((len(self.tokens), text))
        show(self, text, stream_end)

    monkeypatch.setattr(Streamer, "on_finalized_text", spy)
    outcome = write()
    assert "".join(text for _, text in shown) == outcome.out.removesuffix("\n")
    assert len({tokens for tokens, text in shown if text}) > 5


def test_statistics(write: Run) -> None:
    statistics, experts = write("--stats").err.splitlines()
    assert experts.startswith("experts: mapped")
    found = STATISTICS.fullmatch(statistics)
    assert found
    assert found[1] == "12"
    assert found[2]


def test_ctrl_c_keeps_the_text(write: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = write().out.split()
    put = Streamer.put

    def interrupt(self: Streamer, value: Any) -> None:
        put(self, value)
        if len(self.tokens) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Streamer, "put", interrupt)
    outcome = write("--stats")
    assert outcome.code == 130
    assert outcome.out.split() == words[:5]
    assert outcome.out.endswith("\n")
    statistics, _, message = outcome.err.splitlines()
    found = STATISTICS.fullmatch(statistics)
    assert found
    assert found[1] == "5"
    assert message.startswith("interrupted")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--stop", ""), "a stop string is empty"),
        (("--stop", "\udcff"), "a stop string is not UTF-8"),
        (("--temperature", "1e-9"), "0 for greedy decoding"),
    ],
)
def test_refusals(write: Run, options: tuple[str, ...], words: str) -> None:
    outcome = write(*options)
    assert outcome.code == 1
    assert outcome.err.startswith("error[argument]: ")
    assert words in outcome.err


@pytest.mark.parametrize(
    "options",
    [
        ("--temperature", "-1"),
        ("--temperature", "inf"),
        ("--temperature", "warm"),
        ("--top-p", "1.1"),
        ("--min-p", "nan"),
        ("--top-k", "-1"),
        ("--repetition-penalty", "0"),
    ],
)
def test_wrong_usage(write: Run, options: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        write(*options)
    assert caught.value.code == 2
