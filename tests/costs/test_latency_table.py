"""What a latency table says of itself."""

from __future__ import annotations

from dataclasses import replace

from tests.synthetic import chain
from tests.tables import latency_table


def test_a_table_that_ranks_worse_than_macs_says_what_to_do() -> None:
    table = latency_table(chain(5))
    good, bad = (replace(table, rank_correlation=r, macs_correlation=0.6) for r in (0.9, 0.0))
    assert "raise latency.models" in bad.verdict()
    assert "raise latency.models" not in good.verdict()
