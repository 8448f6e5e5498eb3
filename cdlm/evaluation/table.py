"""The table of an evaluation: its rows, notes and settings as JSON, Markdown and plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdlm.core.files import check_path, write_json, write_text
from cdlm.core.inert import in_markdown, one_line, table_line
from cdlm.evaluation.metrics.registry import AR_NLL, METRICS, Metric
from cdlm.evaluation.texts import Value

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """A finished table: the judges, the settings, one dictionary a row, and warnings in plain words.

    The numbers of the first judge are columns of a row; those of the others are under `judged`, by the judge's name.
    """

    judges: tuple[Mapping[str, Value], ...]
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what cannot be computed is None, never NaN. `steps` is that of the first row."""
        return {
            "steps": self.rows[0].get("steps"),
            "judges": [dict(judge) for judge in self.judges],
            "settings": self.settings,
            "rows": [dict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def markdown(self) -> str:
        """Two Markdown tables, the notes, and the line that names judge and settings."""
        tables = [markdown_table(lines) for lines in _two_tables(self.rows)]
        notes = [f"> **Note:** {in_markdown(note)}" for note in self.notes]
        return "\n\n".join([*tables, *notes, in_markdown(self._footer())]) + "\n"

    def terminal(self) -> str:
        """The same as aligned plain text."""
        tables = [aligned_table(lines) for lines in _two_tables(self.rows)]
        notes = [one_line(f"note: {note}") for note in self.notes]
        return "\n\n".join([*tables, *notes, one_line(self._footer())])

    def __str__(self) -> str:
        return self.terminal()

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return self.markdown()

    def save(self, folder: str | Path) -> None:
        """Write `evaluation.json` and `evaluation.md` into `folder`, each whole or not at all."""
        check_path(folder)
        write_json(Path(folder) / "evaluation.json", self.to_dict())
        write_text(Path(folder) / "evaluation.md", self.markdown())

    def _footer(self) -> str:
        names = "; ".join(map(_named, self.judges))
        parts = [
            f"Judge: {names}. AR-NLL in nats per judge token, 95 % interval over texts, of real text over blocks of"
            " neighbours; H, entropy of the generator's tokens in nats."
        ]
        if (how := self.settings.get("distances")) is not None:
            parts.append(
                f"MAUVE and the Fréchet distance on {how['features']}, {how['texts']} texts a side, ± sd over"
                f" {how['splits']} random splits of the {how['reference']}, whose own row is one side against the"
                " other: the best there is. The Fréchet distance is in units of the real text's variance and depends"
                " on the number of texts."
            )
        return " ".join([*parts, "Compare only with the same judge, settings and number of texts."])


def _named(judge: Mapping[str, Value]) -> str:
    size = f"{int(judge['parameters'] or 0) / 1e6:.1f} M parameters"
    known = [f"{key} {value}" for key in ("revision", "quantisation", "sha256") if (value := judge.get(key))]
    return f"{judge['name']} ({', '.join([size, str(judge['dtype']), *known])})"


# --- how numbers look -------------------------------------------------------------------------------------------------

KEYS = {"name", "n", "judged", *(metric.key for metric in METRICS)}
PERCENT = {"halted", "grammar", "right"}
"""Extra columns that are shares."""


def _two_tables(rows: Sequence[Row]) -> list[list[list[str]]]:
    """Quality first, diversity and extra columns second; each a heading line and one line a row."""
    shown = [metric for metric in METRICS if metric.heading]
    extra = dict.fromkeys(key for row in rows for key in row if key not in KEYS)
    more = [Metric(key, key.replace("_", " "), lambda of: None, percent=key in PERCENT) for key in extra]
    first, second = ([metric for metric in shown if metric.quality is quality] for quality in (True, False))
    quality = _lines(rows, ["name", "n"], first)
    for name in rows[0].get("judged", {}):
        column = [f"AR-NLL ({name})", *(AR_NLL.show(row["judged"][name]) for row in rows)]
        quality = [[*line[:3], cell, *line[3:]] for line, cell in zip(quality, column, strict=True)]
    return [quality, _lines(rows, ["name"], [*second, *more])]


def _lines(rows: Sequence[Row], fixed: Sequence[str], metrics: Sequence[Metric]) -> list[list[str]]:
    heads = [{"name": "texts"}.get(key, key) for key in fixed] + [metric.heading for metric in metrics]
    return [heads, *([str(row[key]) for key in fixed] + [metric.show(row) for metric in metrics] for row in rows)]


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the heading first, as Markdown: the first column on the left, the others on the right."""
    head, *body = lines
    ruler = [":--"] + ["--:"] * (len(head) - 1)
    return "\n".join(map(table_line, [head, ruler, *body]))


def aligned_table(lines: list[list[str]]) -> str:
    """The same as plain text, the columns as wide as their widest cells."""
    lines = [[one_line(cell) for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    head, *body = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    ]
    return "\n".join([head, "─" * (sum(widths) + 2 * len(widths) - 2), *body])
