"""README.md quotes what is in benchmarks/results, and nothing else."""

from __future__ import annotations

from benchmarks.readme import README, with_figures


def test_the_figures_are_those_of_the_results() -> None:
    assert README.read_text() == with_figures(README.read_text())
