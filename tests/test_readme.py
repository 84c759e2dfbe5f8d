"""README.md and benchmarks/README.md quote what is in benchmarks/results, and nothing else."""

from __future__ import annotations

from benchmarks.readme import ALL, README, all_figures, with_figures


def test_the_figures_are_those_of_the_results() -> None:
    assert README.read_text() == with_figures(README.read_text())
    assert ALL.read_text() == all_figures()
