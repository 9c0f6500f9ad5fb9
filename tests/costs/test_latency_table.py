"""What a latency table says of itself."""

from __future__ import annotations

import json
from dataclasses import replace

from autoprune.costs._latency_table import LatencyTable
from tests.synthetic import chain
from tests.tables import latency_table


def test_a_table_that_ranks_worse_than_macs_says_what_to_do() -> None:
    table = latency_table(chain(5))
    good, bad = (replace(table, rank_correlation=r, macs_correlation=0.6) for r in (0.9, 0.0))
    assert "raise latency.models" in bad.verdict()
    assert "raise latency.models" not in good.verdict()


def test_a_table_of_an_earlier_version_was_of_one_thread_and_one_of_two_says_so() -> None:
    table = latency_table(chain(5))
    old = {key: value for key, value in json.loads(table.to_json()).items() if key != "threads"}
    assert LatencyTable.from_json(json.dumps(old)) == table
    two = replace(table, threads=2)
    assert LatencyTable.from_json(two.to_json()) == two
    assert "1 at a time, 2 threads" in two.verdict()
    assert "thread" not in table.verdict()
