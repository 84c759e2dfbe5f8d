"""Usage, help, version, and what works without the optional packages."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qmoe_format._version import __version__
from qmoe_format.cli import COMMANDS, main
from qmoe_format.cli.arguments import parse_size
from qmoe_format.cli.formatting import count, duration, size, table


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["convert"],
        ["convert", "a"],
        ["convert", "a", "b", "c"],
        ["convert", "a", "b", "--recipe", "nonsense"],
        ["convert", "a", "b", "--profile", "nonsense"],
        ["convert", "a", "b", "--threads", "0"],
        ["convert", "a", "b", "--threads", "two"],
        ["convert", "a", "b", "--shard-size", "0"],
        ["convert", "a", "b", "--shard-size", "-1GB"],
        ["convert", "a", "b", "--shard-size", "5 apples"],
        ["inspect"],
        ["inspect", "a", "--yaml"],
        ["unpack", "a"],
        ["verify"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert not output.out
    assert "usage: qmoe" in output.err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], *([command.__name__.rpartition(".")[2]] for command in COMMANDS)):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--help"])
        assert caught.value.code == 0
        assert "usage: qmoe" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "qmoe convert switch-base-8/ switch.qmoe" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"qmoe {__version__}\n"


def test_help_loads_neither_torch_nor_numba() -> None:
    code = (
        "import sys, contextlib\nfrom qmoe_format.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['convert', '--help'])\n"
        "print(sorted({'torch', 'numba', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("5GB", 5_000_000_000),
        ("5 gb", 5_000_000_000),
        ("1.5GiB", 3 << 29),
        ("300M", 300_000_000),
        ("2KiB", 2048),
        ("1TB", 10**12),
        ("70B", 70),
    ],
)
def test_sizes_are_parsed(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (1234, "1.23 k"),
        (12_345, "12.3 k"),
        (999_499, "999 k"),
        (999_600, "1.00 M"),
        (1.5e12, "1.50 T"),
        (1.6e15, "1600 T"),
    ],
)
def test_counts_are_formatted(number: float, expected: str) -> None:
    assert count(number) == expected


def test_sizes_and_durations_are_formatted() -> None:
    assert (size(17), size(1_234_567)) == ("17 B", "1.23 MB")
    assert (duration(3.4), duration(75), duration(3725)) == ("0:03", "1:15", "1:02:05")


def test_table() -> None:
    assert table(("a", "b"), [("xyz", "1"), ("", "20")], left=1) == [
        "a     b",
        "---  --",
        "xyz   1",
        "     20",
    ]
    assert table(("a",), [], left=1) == ["a", "-"]
