"""What comes from files is harmless where it is shown: no control of terminals, no Markdown beyond its cell."""

from __future__ import annotations

import io
import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cdlm.core.inert import Inert, fenced, in_markdown, table_line, visible
from cdlm.evaluation.plots.figure import new_figure, write_figure
from cdlm.evaluation.table import aligned_table, markdown_table

HOSTILE = [
    "a\n# heading", "a\r\n## heading", "<script>alert(1)</script>", "<img src=x onerror=y>", "<!-- hidden",
    "\x1b[2J\x1b]0;t\x07", "a | b | c", "[x](http://a)", "![x](http://a)", "```\n# out\n```", "~~~\n# out",
    "\u202eabc", "a\u2028b", "</table>", "\x9b31m", "a\x00b", "a\n\n\n---\n\nb", "> quote\n> # x", "<?php", "\\<b>",
    "\\\\<b>", "<a\nhref=x>", "<\nb>", "$\\frac$",
]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30))


@given(TEXTS)
def test_nothing_visible_controls_a_terminal(text: str) -> None:
    shown = visible(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e]", shown)
    assert visible(shown) == shown
    if text.isprintable():
        assert shown == text


@given(TEXTS, TEXTS)
def test_a_cell_stays_in_its_cell(one: str, two: str) -> None:
    table = markdown_table([["name", "other"], [one, two]])
    assert len(table.split("\n")) == 3
    kinds = {token.type for token in MarkdownIt("commonmark").enable("table").parse(table)}
    assert {"table_open", "td_open"} <= kinds
    assert not kinds & {"heading_open", "html_block", "fence", "hr"}
    inline = [t for token in MarkdownIt("commonmark").enable("table").parse(table) for t in token.children or []]
    assert not {"html_inline", "link_open", "image"} & {t.type for t in inline if t.markup != "autolink"}
    rows = [token for token in MarkdownIt("commonmark").enable("table").parse(table) if token.type == "td_open"]
    assert len(rows) == 2


@given(TEXTS)
def test_a_block_of_code_ends_where_it_should(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(f"{fenced(text, 'yaml')}\n\n# after\n")
    assert [token.type for token in tokens] == ["fence", "heading_open", "inline", "heading_close"]


@given(TEXTS)
def test_a_table_of_a_terminal_has_a_line_for_each_row(text: str) -> None:
    assert len(aligned_table([["name", "n"], [text, "1"]]).split("\n")) == 3
    assert "\n" not in in_markdown(text)
    assert "\n" not in table_line([text])


def test_a_stream_for_people_is_inert() -> None:
    plain = io.StringIO()
    print("\x1b[31mred\ttab\nline", file=Inert(plain))
    assert plain.getvalue() == "\\x1b[31mred\ttab\nline\n"


def test_a_name_is_no_formula_in_a_picture(tmp_path: Path) -> None:
    figure = new_figure(9.0, 12.0, 30)
    axis = figure.subplots()
    for name in [*HOSTILE, "\u4f60", "\U0001f600", "$_$", "$", "$$"]:
        axis.plot([1, 2], [1, 2], label=name)
        axis.set_title(name)
    axis.legend()
    write_figure(figure, tmp_path / "x.svg")
