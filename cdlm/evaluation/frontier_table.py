"""The table, the JSON file and the picture of ways to sample beside each other."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdlm.core.files import write_json, write_text
from cdlm.evaluation.frontier import BAND, DISTANCE_BAND, Frontier, Point, Saving
from cdlm.evaluation.plots.figure import Style, look_of
from cdlm.evaluation.plots.panels import Line, Panel, draw
from cdlm.evaluation.plots.pareto import Curve, CurvePanel, plot_pareto
from cdlm.evaluation.table import markdown_table


def to_dict(frontier: Frontier) -> dict[str, Any]:
    """Plain data for JSON: a row for each point, and what each saves. `on_calls`: the picture over calls shows it."""
    drawn = {(point.drawn.way, point.drawn.sampling) for family in families(frontier) for point in family.points}
    return {
        "judges": list(frontier.judges),
        "rivals": list(frontier.rivals),
        "rows": [{**row, "on_calls": _name(row) in drawn} for row in _rows(frontier)],
        "real": [] if frontier.real is None else [_row(frontier, frontier.real)],
        "savings": [{**_saving(frontier, saving), "on_calls": (saving.way, saving.sampling) in drawn}
                    for saving in frontier.savings()],
    }  # fmt: skip


def _name(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["way"], row["sampling"]


def _rows(frontier: Frontier) -> list[dict[str, Any]]:
    return [_row(frontier, point) for way in frontier.ways for point in frontier.curve(way)]


def _saving(frontier: Frontier, saving: Saving) -> dict[str, Any]:
    at = label(saving.sampling, [point.drawn.sampling for point in frontier.curve(saving.way)])
    return {**saving.to_dict(), "point": at}


def _row(frontier: Frontier, point: Point) -> dict[str, Any]:
    drawn, row = point.drawn, dict[str, Any]()
    for place, judge in enumerate(frontier.judges):
        entropy, nats = point.seen_by(judge)
        found = {"n": len(point.nats[judge].total), "ar_nll": nats.value, "ar_nll_ci": list(nats.interval95),
                 "sample_entropy": entropy.value}  # fmt: skip
        row |= found if place == 0 else {"judged": {**row.get("judged", {}), judge: found}}
    settings = label(drawn.sampling, [drawn.sampling, *(p.drawn.sampling for p in frontier.curve(drawn.way))])
    calls = None if drawn.corpus.nfe is None else point.calls
    return {
        "way": drawn.way, "point": settings, "rival": drawn.way in frontier.rivals, "calls": calls, **row,
        **point.columns, "sampling": drawn.sampling,
    }  # fmt: skip


def label(sampling: str, others: Sequence[str]) -> str:
    """What is particular to a way of sampling among others, such as `score_temperature=0.9`."""
    common = set.intersection(*(set(_parts(text)) for text in others))
    return ", ".join(part for part in _parts(sampling) if part not in common)


def _parts(sampling: str) -> list[str]:
    return re.findall(r"\w+=[^,()]+", sampling)


def _varied(samplings: Sequence[str]) -> set[str]:
    """Names of the settings that are not the same in all."""
    parts = [set(_parts(sampling)) for sampling in samplings]
    return {part.split("=")[0] for part in set.union(*parts) - set.intersection(*parts)}


def markdown(frontier: Frontier) -> str:
    """Two tables to read: the points, and what they save against the rivals."""
    judged = [f"AR-NLL ({short(judge)})" for judge in frontier.judges]
    shares = [name for name in ("grammar", "right") if any(name in row for row in _rows(frontier))]
    heads = ["way", "at", "n", "calls", *judged, "H sample", "Fréchet", *shares, "dist-3", "copied"]
    lines = [heads]
    for row in [*_rows(frontier), *([] if frontier.real is None else [_row(frontier, frontier.real)])]:
        judged = [row, *row.get("judged", {}).values()]
        nats = [f"{one['ar_nll']:.3f} [{one['ar_nll_ci'][0]:.3f}, {one['ar_nll_ci'][1]:.3f}]" for one in judged]
        lines.append([
            row["way"], row["point"], str(row["n"]), _number(row["calls"], ".1f"), *nats,
            _number(row["sample_entropy"], ".3f"), _number(row.get("frechet"), ".3f"),
            *(_number(row.get(name), ".1%") for name in shares), _number(row.get("dist_3"), ".3f"),
            _number(row.get("copied"), ".1%"),
        ])  # fmt: skip
    against = [["way", "at", "judge", "calls", "hardest rival with at most as many", "difference",
                "at the same entropy", "as good", "saved", "not as sharp"]]  # fmt: skip
    against += [_against(frontier, saving) for saving in frontier.savings()]
    return "\n\n".join([markdown_table(lines), markdown_table(against), NOTE]) + "\n"


NOTE = (
    "AR-NLL in nats per token, 95 % intervals over samples. Differences are AR-NLL of the point less that of the rival,"
    " below 0 the point is better: first at the best of the rival's temperatures that are as sharp (entropies within"
    f" {BAND} nats, Fréchet distances within {DISTANCE_BAND - 1:.0%}), then at the same entropy, whose noise is in the"
    " interval. As good is the rival with the fewest calls whose AR-NLL is not above the point's, and in brackets the"
    " one that is not surely worse; the second saving is the careful one. A star: the rival is at its sharpest, and"
    " might do better at a lower temperature."
)


def _against(frontier: Frontier, saving: Saving) -> list[str]:
    at = label(saving.sampling, [p.drawn.sampling for p in frontier.curve(saving.way)])
    names = [match.rival if match else "none" for match in (saving.as_good, saving.not_worse)]
    return [
        saving.way, at, short(saving.judge), f"{saving.calls:.1f}", *_hardest(frontier, saving),
        f"{names[0]} ({names[1]})", f"{_number(saving.saved, '.0%')} ({_number(saving.saved_surely, '.0%')})",
        ", ".join(saving.unmatched) or "-",
    ]  # fmt: skip


def _hardest(frontier: Frontier, saving: Saving) -> list[str]:
    """The hardest rival with at most as many calls, and both differences to it."""
    found = saving.hardest
    if found is None:
        return ["-"] * 3
    at = label(found.sampling, [p.drawn.sampling for p in frontier.curve(found.rival)])
    rival = f"{found.rival}, {at}" if at else found.rival
    return [
        f"{rival} *" if found.sharpest else rival,
        _ends(found.difference, found.low, found.high),
        _ends(found.even, found.even_low, found.even_high),
    ]


def _ends(value: float | None, low: float | None, high: float | None) -> str:
    return "-" if value is None or low is None or high is None else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def short(judge: str) -> str:
    """The name of a judge without what is in brackets."""
    return judge.split(" (")[0]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def panels(frontier: Frontier) -> list[Panel]:
    """AR-NLL over entropy under each judge: a curve for each way."""
    return [
        Panel(judge, "entropy inside a sample, nats", "AR-NLL, nats per token",
              [_line(frontier, way, judge) for way in frontier.ways])
        for judge in frontier.judges
    ]  # fmt: skip


def _line(frontier: Frontier, way: str, judge: str) -> Line:
    seen = [point.seen_by(judge) for point in frontier.curve(way)]
    calls = np.mean([point.calls for point in frontier.curve(way)])
    x, y = (np.array([one[part].value for one in seen]) for part in (0, 1))
    return Line(f"{way}, {calls:.0f} calls", x, y, dots=True)


@dataclass(frozen=True)
class Family:
    """Ways that differ in a number at the end of their names, such as plain-32 and plain-64, at one temperature.

    Args:
        at: the temperature, or whatever else sets these points apart from the others of their ways; and the ways that
            were not drawn so.
        points: one of each way, from few calls to many.
    """

    name: str
    at: str
    points: Sequence[Point]


def families(frontier: Frontier) -> list[Family]:
    """All ways, each family at the temperature whose samples are nearest to real text by the Fréchet distance, the mean
    over the family. Where that is not known, its mean entropy is nearest to that of real text or of the rivals."""
    ways: dict[str, list[str]] = {}
    for way in frontier.ways:
        ways.setdefault(re.sub(r"-[\d.]+$", "", way), []).append(way)
    return [_family(frontier, name, members) for name, members in ways.items()]


def _family(frontier: Frontier, name: str, ways: Sequence[str]) -> Family:
    rivals = [point for point in frontier.points if point.drawn.way in frontier.rivals]
    target = frontier.entropy(rivals if frontier.real is None else [frontier.real])
    curves = [frontier.curve(way) for way in ways]
    varied = {name for curve in curves for name in _varied([point.drawn.sampling for point in curve])}
    found: dict[str, list[Point]] = {}
    for point in (point for curve in curves for point in curve):
        at = ", ".join(part for part in _parts(point.drawn.sampling) if part.split("=")[0] in varied)
        found.setdefault(at, []).append(point)
    most = max(map(len, found.values()))
    whole = {at: points for at, points in found.items() if len(points) == most}
    best = min(whole, key=lambda at: (_distance(whole[at]), abs(frontier.entropy(whole[at]) - target)))
    points = sorted(found[best], key=lambda point: point.calls)
    left_out = [way for way in ways if way not in {point.drawn.way for point in points}]
    return Family(name, ", ".join([best, *(f"without {way}" for way in left_out)]), points)


def _distance(points: Sequence[Point]) -> float:
    """Fréchet distance to real text, the mean over points; infinite where it is not known."""
    found = [point.columns.get("frechet") for point in points]
    return float(np.mean([math.inf if one is None or math.isnan(one) else one for one in found]))


def over_calls(frontier: Frontier) -> list[CurvePanel]:
    """AR-NLL over calls under each judge, a curve for each family."""
    real = [] if frontier.real is None else [(frontier.real.drawn.way, frontier.real)]
    return [
        CurvePanel(
            judge,
            [_curve(family, judge, family.points[0].drawn.way in frontier.rivals) for family in families(frontier)],
            [(name, point.seen_by(judge)[1].value) for name, point in real],
        )
        for judge in frontier.judges
    ]


def _curve(family: Family, judge: str, rival: bool) -> Curve:
    nats = [point.seen_by(judge)[1] for point in family.points]
    low, high = ([each.interval95[end] for each in nats] for end in (0, 1))
    name = ", ".join(part for part in (family.name, family.at) if part)
    return Curve(name, [point.calls for point in family.points], [each.value for each in nats], low, high, rival)


def save(frontier: Frontier, folder: Path, style: Style = "screen") -> str:
    """Write frontier.json, frontier.md and the pictures frontier, calls and every-call, and return the table.

    Args:
        style: of the pictures, which are .png for a screen and .pdf for a paper.
    """
    text, ending = markdown(frontier), look_of(style).ending
    write_json(folder / "frontier.json", to_dict(frontier))
    write_text(folder / "frontier.md", text)
    draw(panels(frontier), folder / f"frontier{ending}", columns=2, width=7.0, shared=True, style=style)
    plot_pareto(over_calls(frontier), folder / f"calls{ending}", style=style)
    plot_pareto(over_calls(frontier), folder / f"every-call{ending}", whole=True, style=style)
    return text
