"""The page of a report: one HTML file without scripts, which loads nothing. Whatever is not ours is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchclamp.edit.report import Change, Report

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --dim: #5b6675; --line: #d5dae1; --paper: #fff; --shade: #f4f6f8;
  --changed: #b3400a; --still: #1f6f54; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --dim: #9aa5b4; --line: #38414d; --paper: #14181d;
  --shade: #1d232a; --changed: #ff9d66; --still: #6ccfa8; } }
.report { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 0 auto; padding: 1.5rem; }
body { margin: 0; background: var(--paper); }
.report h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
.report h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.report p.models { color: var(--dim); margin: 0; }
.report li { margin: .25rem 0; }
.report .changed::marker { color: var(--changed); }
.report .still { color: var(--dim); }
.report .wide { overflow-x: auto; }
.report table { border-collapse: collapse; width: 100%; font-size: .9rem; }
.report th, .report td { text-align: left; vertical-align: top; padding: .35rem .6rem;
  border-bottom: 1px solid var(--line); background: var(--paper); color: var(--ink); }
.report th { color: var(--dim); font-weight: 600; }
.report td { font-variant-numeric: tabular-nums; }
.report code, .report pre { font: .9em/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
.report pre { white-space: pre-wrap; background: var(--shade); padding: .5rem .7rem; margin: .2rem 0; }
.report svg line.zero { stroke: var(--dim); stroke-dasharray: 2 2; }
.report svg .changed { stroke: var(--changed); fill: var(--changed); }
.report svg .still { stroke: var(--still); fill: var(--still); }
"""


def page(report: Report, whole: bool = True) -> str:
    """The page; `whole=False`: only what goes into the body, for a notebook."""
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="models"><code>{escape(report.before)}</code>, and after it <code>{escape(report.after)}</code></p>',
    ]
    if report.steps:
        parts += ["<h2>What was done</h2>", _list((step, "") for step in report.steps)]
    for role, heading in (("target", "What the edit was for"), ("guard", "What was to stay as it was")):
        if there := [each for each in report.changes if each.role == role]:
            parts.append(f"<h2>{heading}</h2>")
            parts.append(_list((each.sentence + ".", "changed" if each.resolvable else "still") for each in there))
            parts.append(_measured(there))
    parts += ["<h2>Weights</h2>", f"<p>{escape(_capital(report.weights.sentence))}.</p>"]
    if report.weights.parameters:
        rows = [
            (
                f"<code>{escape(each.parameter)}</code>",
                _shape(each.shape_before),
                _shape(each.shape),
                "" if each.changed is None else f"{each.changed:,}",
                "" if each.largest_change is None else f"{each.largest_change:.3g}",
            )
            for each in report.weights.parameters
        ]
        parts.append(_table(("parameter", "shape before", "shape after", "numbers changed", "largest change"), rows))
    if report.continuations:
        parts.append("<h2>Texts</h2>")
        rows = [
            tuple(f"<pre>{escape(text)}</pre>" for text in (c.prompt, c.before, c.after)) for c in report.continuations
        ]
        parts.append(_table(("prompt", "goes on before", "goes on after"), rows))
    body = f'<div class="report">{"".join(parts)}</div>'
    if not whole:
        return f"<style>{_STYLE}</style>{body}"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _measured(changes: Sequence[Change]) -> str:
    rows = [
        (
            escape(each.name),
            escape(each.metric),
            f"{each.before:.4g}",
            f"{each.after:.4g}",
            f"{each.difference:+.3g}",
            f"{each.low:.3g} to {each.high:.3g}",
            _picture(each),
            str(each.examples),
        )
        for each in changes
    ]
    interval = f"{changes[0].level:.0%} interval"
    return _table(("data", "metric", "before", "after", "difference", interval, "beside 0", "examples"), rows)


def _picture(change: Change) -> str:
    """The interval and 0 on one line."""
    low, high = min(change.low, 0.0), max(change.high, 0.0)
    span = (high - low) or 1.0

    def at(value: float) -> str:
        return f"{6 + 108 * (value - low) / span:.1f}"

    kind = "changed" if change.resolvable else "still"
    said = f"difference {change.difference:.3g}, interval {change.low:.3g} to {change.high:.3g}"
    return (
        f'<svg width="120" height="16" role="img" aria-label="{escape(said)}">'
        f'<line class="zero" x1="{at(0)}" x2="{at(0)}" y1="1" y2="15"/>'
        f'<line class="{kind}" stroke-width="2" x1="{at(change.low)}" x2="{at(change.high)}" y1="8" y2="8"/>'
        f'<circle class="{kind}" cx="{at(change.difference)}" cy="8" r="3"/></svg>'
    )


def _list(items: Iterable[tuple[str, str]]) -> str:
    listed = "".join(f'<li class="{kind}">{escape(_capital(text))}</li>' for text, kind in items)
    return f"<ul>{listed}</ul>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already, columns are not."""
    head = "".join(f"<th>{escape(each)}</th>" for each in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _shape(shape: Any) -> str:
    return "" if shape is None else " × ".join(map(str, shape))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
