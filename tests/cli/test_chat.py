"""``qmoe chat``."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
import transformers

from qmoe_format import convert
from qmoe_format.cli.streaming import Streamer
from qmoe_format.runtime import load_model, load_tokenizer
from qmoe_format.runtime.experts import CompressedExperts
from tests.conftest import Outcome
from tests.tiny_models import save_model

Run = Callable[..., Outcome]
TURNS = """\
{%- for message in messages -%}
{%- if message.role != 'system' and (message.role == 'user') != (loop.index0 % 2 == first) -%}
{{- raise_exception('the roles do not alternate') -}}
{%- endif -%}
{{- {'system': 'w50 ', 'user': 'w51 ', 'assistant': 'w52 '}[message.role] -}}
{{- message.content ~ ' w53 ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'w52 ' -}}{%- endif -%}
"""
FIRST = "{%- set first = 1 if messages[0].role == 'system' else 0 -%}"
TEMPLATE = FIRST + TURNS
# The beginning of the text tells how long the conversation is: what was read is of no use then.
COUNTING = FIRST + "{{- 'w' ~ messages | length ~ ' ' -}}" + TURNS


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Undo what a shell does to its background jobs, which may include these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def make(folder: Path, model_type: str = "mixtral", template: str | None = TEMPLATE) -> Path:
    checkpoint = save_model(folder / "checkpoint", model_type)
    if template:
        (checkpoint / "chat_template.jinja").write_text(template)
    return convert(checkpoint, folder / "m.qmoe")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models"))


@pytest.fixture
def chat(qmoe: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``qmoe chat FILE --max-new-tokens 5 …`` with messages from a pipe."""

    def run(file: Path, said: str, *options: str) -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        return qmoe("chat", file, "--max-new-tokens", "5", *options)

    return run


def answers(file: Path, said: list[str], system: str | None = None, second: int = 5) -> list[str]:
    """What the model says to each message after reading the whole conversation anew.

    Args:
        second: how many tokens the second answer has; the others have five.
    """
    tokenizer, model = load_tokenizer(file), load_model(file, dtype=torch.float32)
    messages = [{"role": "system", "content": system}] if system else []
    found: list[str] = []
    for message in said:
        messages.append({"role": "user", "content": message})
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=second if len(found) == 1 else 5,
        )[0]
        new = tokens if model.config.is_encoder_decoder else tokens[encoded["input_ids"].shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": found[-1]})
    return found


@pytest.mark.parametrize(
    ("model_type", "template", "continued"),
    [
        ("mixtral", TEMPLATE, True),
        ("gpt_oss", TEMPLATE, True),  # sliding windows
        ("jamba", TEMPLATE, False),  # does not go on correctly from its recurrent state
        ("minimax", TEMPLATE, False),
        ("mixtral", COUNTING, False),
        ("switch_transformers", TEMPLATE, False),
    ],
)
def test_each_answer_is_to_the_whole_conversation(
    chat: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    template: str,
    continued: bool,
) -> None:
    file = make(tmp_path, model_type, template)
    with_cache: list[bool] = []
    generate = transformers.GenerationMixin.generate

    def spy(self: Any, *arguments: Any, **settings: Any) -> Any:
        with_cache.append("past_key_values" in settings)
        return generate(self, *arguments, **settings)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", spy)
    said = ["w1 w2 w3", "w4 w5", "w6"]
    outcome = chat(file, "\n".join(said))
    assert (outcome.code, outcome.err) == (0, "")
    assert with_cache == [False, continued, continued]
    assert outcome.out.splitlines() == answers(file, said)


def test_a_system_message(chat: Run, file: Path) -> None:
    said = ["w1 w2 w3", "w4 w5"]
    outcome = chat(file, "\n".join(said), "--system", "w9 w8 w7")
    assert outcome.out.splitlines() == answers(file, said, "w9 w8 w7")
    assert outcome.out.splitlines() != answers(file, said)


def test_empty_lines_are_no_messages(chat: Run, file: Path) -> None:
    outcome = chat(file, "\nw1 w2\n \n\nw3\n")
    assert outcome.out.splitlines() == answers(file, ["w1 w2", "w3"])
    assert chat(file, "") == Outcome(0, "", "")


def test_statistics_follow_each_answer(chat: Run, file: Path) -> None:
    lines = chat(file, "w1 w2\nw3\n", "--stats").err.splitlines()
    first = [line.split(",")[0] for line in lines[::2]]
    assert first == ["prompt: 5 tokens", "prompt: 15 tokens"]
    assert all("generated: 5 tokens" in line for line in lines[::2])
    assert all(line.startswith("experts: mapped") for line in lines[1::2])


def test_ctrl_c_stops_the_answer(chat: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["w6", "w1 w2", "w3"]
    expected = answers(file, said, second=3)
    put = Streamer.put
    streamers: list[Streamer] = []

    def press(self: Streamer, value: Any) -> None:
        put(self, value)
        if self not in streamers:
            streamers.append(self)
        if len(streamers) == 2 and len(self.tokens) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Streamer, "put", press)
    outcome = chat(file, "\n".join(said))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == expected


def test_ctrl_c_before_an_answer_drops_the_message(
    chat: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then one layer has read the message, and others have not."""
    expected = answers(file, ["w6", "w3"])
    generate, forward = transformers.GenerationMixin.generate, CompressedExperts.forward
    prompts: list[Any] = []

    def count(self: Any, *arguments: Any, **settings: Any) -> Any:
        prompts.append(settings["input_ids"])
        return generate(self, *arguments, **settings)

    def press(self: Any, *arguments: Any, **settings: Any) -> Any:
        if len(prompts) == 2:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *arguments, **settings)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", count)
    monkeypatch.setattr(CompressedExperts, "forward", press)
    outcome = chat(file, "w6\nw1 w2\nw3\n")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == expected


SPAWN = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


class Terminal:
    """``qmoe chat`` on a terminal."""

    def __init__(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "qmoe_format", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SPAWN, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def read(self, until: str) -> str:
        """What is shown up to a text, or up to the end of the program."""
        assert self.process.stdout
        shown = b""
        while not shown.endswith(until.encode()) and (more := self.process.stdout.read(1)):
            shown += more
        return shown.decode().replace("\r\n", "\n")

    def type(self, text: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudoterminals")
@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_on_a_terminal(file: Path, key: str) -> None:
    terminal = Terminal(file, "--max-new-tokens", "5")
    assert terminal.read("> ").endswith("> ")
    terminal.type("w1 w2\n")
    shown = terminal.read("\n> ").splitlines()
    assert shown[0].endswith("w1 w2")  # the terminal's echo
    assert shown[1:2] == answers(file, ["w1 w2"])
    assert shown[2].startswith("prompt: 5 tokens, first token after ")
    terminal.type(key)
    assert "Traceback" not in terminal.read("no more")
    assert terminal.process.wait(60) == 0


@pytest.mark.parametrize("model_type", ["mixtral", "switch_transformers"])
def test_without_a_chat_template(chat: Run, tmp_path: Path, model_type: str) -> None:
    outcome = chat(make(tmp_path, model_type, None), "w1\n")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error[argument]: the tokenizer has no chat template")
    assert outcome.err.count("\n") == 1


def test_a_template_that_refuses(chat: Run, tmp_path: Path) -> None:
    file = make(tmp_path, template="{{ raise_exception('no system role') }}")
    outcome = chat(file, "w1\n", "--system", "w2")
    assert outcome.code == 1
    assert outcome.err.startswith("error[argument]: the tokenizer's chat template cannot write ")
    assert "no system role" in outcome.err
    assert "--system" in outcome.err


def test_a_conversation_that_is_too_long(chat: Run, file: Path) -> None:
    """The model has 64 positions: two answers, a shorter third one, and no fourth."""
    outcome = chat(file, "w1 " * 16 + "\n" + "w2 " * 22 + "\n" + "w3\n" * 3)
    assert outcome.code == 1
    assert [len(line.split()) for line in outcome.out.splitlines()] == [5, 5, 4]
    assert outcome.err.startswith("error[argument]: the conversation has ")
    assert "positions for 64" in outcome.err


@pytest.mark.parametrize(
    ("said", "options", "words"),
    [
        (b"w1 \xff\n", (), "the message is not UTF-8"),
        (b"w1\n", ("--system", "\udcff"), "the system message is not UTF-8"),
        (b"w1\n", ("--temperature", "1e-9"), "0 for greedy decoding"),
    ],
)
def test_refusals(
    qmoe: Run,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: bytes,
    options: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said), "utf-8"))
    outcome = qmoe("chat", file, *options)
    assert outcome.code == 1
    assert outcome.err.startswith("error[argument]: ")
    assert words in outcome.err
