"""How a front shows itself: in one line, as rows, as a data frame, and in a notebook."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from autoprune.errors import InputError
from autoprune.files.policy_file import csv_text, front_text
from autoprune.front import Front
from autoprune.front_table import front_table
from tests.fronts import resnet50_front, synthetic_front, with_points


class Cells(HTMLParser):
    """The rows of the first table of a page, and that every tag which opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.tables = 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.tables += tag == "table"
        if tag == "tr" and self.tables == 1:
            self.rows.append([])
        elif tag in ("td", "th") and self.tables == 1:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th") and self.tables == 1:
            self.rows[-1][-1] += data


def test_a_front_and_its_points_are_one_short_line_each() -> None:
    front = synthetic_front()
    assert repr(front) == "<Front: 6 points of mypkg.models:Chain, MACs 0.1074 to 1 of dense, kl 0.3921 to 8e-09>"
    assert repr(front[0]) == "<Point p00: MACs 0.1074, params 0.1105 of dense; kl 0.3921, accuracy 0.91>"
    assert repr(front[1]).endswith("; kl 0.2421, accuracy 0.925; tuned kl 0.121, accuracy 0.969>")
    assert repr(front.base) == ("<Base: mypkg.models:Chain, 4 groups, MACs 3,449,452, params 13,676; accuracy 0.98>")
    large = resnet50_front(40)
    assert max(len(repr(shown)) for shown in (large, large.base, *large)) < 200


def test_what_is_unknown_is_left_out_of_the_line() -> None:
    front = synthetic_front()
    many = replace(front[0], metrics={"validation": {f"m{i}": 0.5 for i in range(9)}})
    assert repr(many).endswith("; kl 0.3921, m0 0.5, m1 0.5, m2 0.5, and 6 more>")
    blind = replace(front[0], losses={}, metrics={})
    assert repr(blind) == "<Point p00: MACs 0.1074, params 0.1105 of dense>"
    assert (
        repr(with_points(front, (blind,))) == "<Front: 1 point of mypkg.models:Chain, MACs 0.1074 to 0.1074 of dense>"
    )
    odd = replace(with_points(front, (replace(blind, costs={"heat": 3.0}),)), provenance={"objectives": ["heat"]})
    assert repr(odd) == "<Front: 1 point of mypkg.models:Chain>"
    assert repr(with_points(front, ())) == "<Front: 0 points of mypkg.models:Chain>"


def test_the_cost_that_the_points_ascend_in_comes_first() -> None:
    front = synthetic_front()
    front = replace(front, provenance={"objectives": ["params"]})
    table = front_table(front)
    assert table.headings[:3] == ("params", "MACs", "loss")
    assert table.rows[0] == ("dense", (1.0, 1.0, None, 0.98, None, None))
    assert [row[0] for name, row in table.rows[1:]] == [point.ratio("params") for point in front]
    assert {len(row) for _, row in table.rows} == {len(table.headings)}


def test_a_data_frame_has_the_rows_and_columns_of_the_csv_file() -> None:
    front = synthetic_front()
    frame = front.to_dataframe()
    rows = list(csv.DictReader(io.StringIO(csv_text(front))))
    assert [frame.index.name, *frame.columns] == [*rows[0]]
    assert list(frame.index) == [row["id"] for row in rows]
    assert list(frame["loss.validation"]) == [point.loss() for point in front]
    assert frame.loc["p02", "width.layer1"] == front[2].policy.as_dict()["layer1"]
    assert frame["finetuned.accuracy"].notna().sum() == 2
    assert len(with_points(front, ()).to_dataframe()) == 0


def test_without_pandas_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"to_dataframe needs pandas, .*: pip install pandas, or read front\.csv"):
        synthetic_front().to_dataframe()


def test_a_notebook_shows_tables() -> None:
    front = synthetic_front()
    rows = Cells(front._repr_html_()).rows
    assert rows[0] == ["point", "MACs", "params", "loss", "accuracy", "loss tuned", "accuracy tuned"]
    assert rows[1] == ["dense", "1", "1", "-", "0.98", "-", "-"]
    assert [row[0] for row in rows[2:]] == [point.id for point in front]
    page = Cells(front[1]._repr_html_())
    assert page.tables == 2
    assert page.rows == [
        ["", "dense", "p01", "ratio"],
        ["MACs", "3,449,452", "735,270", "0.2132"],
        ["params", "13,676", "2,957", "0.2162"],
        ["kl", "", "0.2421", ""],
        ["accuracy", "0.98", "0.925", ""],
        ["kl tuned", "", "0.121", ""],
        ["accuracy tuned", "0.98", "0.969", ""],
    ]
    assert "<td>layer0</td><td>32</td><td>14</td>" in front[1]._repr_html_()


def test_names_of_a_user_are_text_in_a_notebook() -> None:
    front = synthetic_front()
    base = replace(front.base, model="<script>alert(1)</script>")
    shown = Front((replace(front[0], base=base),), base, {}, {})
    for text in (shown._repr_html_(), shown[0]._repr_html_()):
        assert "<script>" not in text
        assert "&lt;script&gt;" in text


def sparse_front() -> Front:
    """Points of the dense shapes, with numbers that are not zero as their first cost."""
    front = synthetic_front()
    base = replace(front.base, costs={**front.base.costs, "nonzeros": 1000, "effective_macs": 2000.0})
    dense = {**base.costs, "macs_ratio": 1.0}
    points = tuple(
        replace(p, base=base, costs={**dense, "nonzeros": 500 + i, "effective_macs": 1200.5})
        for i, p in enumerate(front)
    )
    return replace(front, base=base, points=points, provenance={**front.provenance, "objectives": ["nonzeros"]})


def test_macs_and_parameters_that_are_dense_in_every_point_have_no_column_but_as_an_objective() -> None:
    front = sparse_front()
    assert front_table(front).headings[:3] == ("nonzero weights", "effective MACs", "loss")
    asked = replace(front, provenance={"objectives": ["macs", "nonzeros"]})
    assert front_table(asked).headings[:4] == ("MACs", "nonzero weights", "effective MACs", "loss")
    smaller = replace(front[0], costs={**front[0].costs, "macs": 1, "params": 1})
    assert {"MACs", "params"} <= set(front_table(with_points(front, (smaller, *front[1:]))).headings)
    assert "nonzero weights 1,000, effective MACs 2,000" in repr(front.base)


def test_counts_are_whole_in_the_file() -> None:
    text = front_text(sparse_front())
    assert '"nonzeros": 1000,' in text
    assert '"effective_macs": 2000' in text
    assert "2000.0" not in text
