"""The table of an evaluation: its rows, notes and settings as JSON, Markdown and plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdlm.core.files import write_text
from cdlm.evaluation.texts import Value

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """A finished table: the judge, the settings, one dictionary a row, and warnings in plain words."""

    judge: Mapping[str, Value]
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what cannot be computed is None, never NaN. `steps` is that of the first row."""
        return {
            "steps": self.rows[0].get("steps"),
            "judge": dict(self.judge),
            "settings": self.settings,
            "rows": [dict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def markdown(self) -> str:
        """Two Markdown tables, the notes, and the line that names judge and settings."""
        tables = [_markdown_table(lines) for lines in _two_tables(self.rows)]
        notes = [f"> **Note:** {note}" for note in self.notes]
        return "\n\n".join([*tables, *notes, self._footer()]) + "\n"

    def terminal(self) -> str:
        """The same as aligned plain text."""
        tables = [_aligned_table(lines) for lines in _two_tables(self.rows)]
        notes = [f"note: {note}" for note in self.notes]
        return "\n\n".join([*tables, *notes, self._footer()])

    def save(self, folder: str | Path) -> None:
        """Write `evaluation.json` and `evaluation.md` into `folder`, each whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(Path(folder) / "evaluation.json", text + "\n")
        write_text(Path(folder) / "evaluation.md", self.markdown())

    def _footer(self) -> str:
        judge, size = self.judge, f"{int(self.judge['parameters'] or 0) / 1e6:.1f} M parameters"
        revision = f", revision {judge['revision']}" if judge["revision"] else ""
        return (
            f"Judge: {judge['name']} ({size}, {judge['dtype']}{revision}). AR-NLL in nats per judge token, "
            "95 % interval over texts; H, entropy of the generator's tokens in nats; MAUVE on features of this judge, "
            "± sd over k-means seeds; the MAUVE of real text is the ceiling. "
            "Compare only with the same judge, settings and number of texts."
        )


# --- how numbers look -------------------------------------------------------------------------------------------------

FIRST = {
    "name": "texts", "n": "n", "ar_nll": "AR-NLL", "bits_per_char": "bits/char", "sample_entropy": "H sample",
    "unigram_entropy": "H corpus", "mauve": "MAUVE", "mean_nfe": "calls",
}  # fmt: skip
SECOND = {
    "name": "texts", "dist_1": "dist-1", "dist_2": "dist-2", "dist_3": "dist-3", "self_bleu": "self-BLEU",
    "zipf": "Zipf", "mean_tokens": "tokens", "duplicate_rate": "duplicate", "empty_rate": "empty",
}  # fmt: skip
HIDDEN = {"ar_nll_ci", "mauve_sd", "judge_tokens", "unscored"}
PERCENT = {"duplicate_rate", "empty_rate", "halted", "grammar"}
DECIMALS = {"mauve": 3, "dist_1": 3, "dist_2": 3, "dist_3": 3, "self_bleu": 1, "mean_nfe": 1, "mean_tokens": 1}


def _two_tables(rows: Sequence[Row]) -> list[list[list[str]]]:
    """Quality and entropy first, diversity and extra columns second; each a heading line and one line a row."""
    extra = [key for row in rows for key in row if key not in FIRST.keys() | SECOND.keys() | HIDDEN]
    second = {**SECOND, **{key: key.replace("_", " ") for key in extra}}
    return [[list(names.values()), *[[_cell(row, key) for key in names] for row in rows]] for names in (FIRST, second)]


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    text = f"{100 * value:.1f} %" if key in PERCENT else f"{value:.{DECIMALS.get(key, 2)}f}"
    interval, sd = row.get("ar_nll_ci"), row.get("mauve_sd")
    if key == "ar_nll" and interval and None not in interval:
        text += f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    if key == "mauve" and sd is not None:
        text += f" ± {sd:.3f}"
    return text


def _markdown_table(lines: list[list[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    ruler = [":--"] + ["--:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ruler, *body])


def _aligned_table(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    head, *body = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    ]
    return "\n".join([head, "─" * (sum(widths) + 2 * len(widths) - 2), *body])
