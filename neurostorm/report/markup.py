"""The pieces of the page: tables whose numbers unfold to run ids, figures inside the file, and the style sheet.

    Table --> <table>, each number a <details> with the ids of its runs      Drawn --> <figure>, SVG as a data URI
    MLflow's address --Links--> a link to a run's page if it is a server, else the id to copy

Every text passes `escape`. The file needs no other: no script, no font, no address outside but MLflow's own.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

from neurostorm.report.figures.drawing import Drawn
from neurostorm.report.table import Cell, Column, Table

_ROOMY = 10  # columns of a table in the usual size of letters
_TABLE_COLUMNS = 8  # of a table of means, beside its first: more are shown as several tables

CSS = """
:root { --ink: #1f2328; --quiet: #59636e; --line: #dfe3e8; --soft: #f6f8fa; --accent: #0b5c8f; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 1200px; padding: 40px 40px 96px; color: var(--ink); background: #fff;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; margin: 4px 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 56px 0 12px; padding-top: 14px;
  border-top: 1px solid var(--line); }
h3 { font-size: 17px; margin: 36px 0 8px; }
h2, h3 { break-after: avoid; overflow-wrap: anywhere; }
p, ul, dl { margin: 8px 0 14px; max-width: 860px; }
li { margin: 4px 0; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.kicker { color: var(--accent); font-size: 13px; font-weight: 600; letter-spacing: 0.06em; text-transform: uppercase; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 3px 20px; font-size: 14px; }
.facts dt { color: var(--quiet); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 22px 0 0; padding: 10px 0; font-size: 14px;
  border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
.warning { background: #fff8e6; border-left: 3px solid #d9a400; padding: 9px 14px; max-width: none; }
.note, figcaption { color: var(--quiet); font-size: 13px; max-width: 940px; }
table { border-collapse: collapse; margin: 12px 0 8px; font-size: 13px; line-height: 1.4; }
table.wide { width: 100%; }
table.dense { font-size: 12px; }
table.dense th, table.dense td { padding: 5px; }
table.dense th:first-child, table.dense td:first-child { padding-left: 2px; min-width: 130px; overflow-wrap: normal; }
th, td { padding: 6px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--quiet); vertical-align: bottom; border-bottom: 1.5px solid #b6bec8; }
th:first-child, td:first-child { padding-left: 2px; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n, td.id { white-space: nowrap; }
td.words { overflow-wrap: anywhere; }
tbody tr:hover { background: var(--soft); }
.best { font-weight: 700; }
tr.chance td { color: var(--quiet); border-top: 1.5px solid #b6bec8; }
code, .ids { font: 12px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { user-select: all; }
details { position: relative; }
summary { cursor: pointer; list-style: none; }
summary::-webkit-details-marker { display: none; }
td summary:hover, figure summary:hover { color: var(--accent); }
td details[open] > summary { color: var(--accent); }
.ids { position: absolute; z-index: 2; top: 100%; right: -6px; padding: 8px 12px; text-align: left; font-weight: 400;
  background: #fff; border: 1px solid var(--line); border-radius: 6px; box-shadow: 0 6px 24px rgb(31 35 40 / 14%);
  white-space: nowrap; max-height: 260px; overflow-y: auto; }
.left .ids, figure .ids { right: auto; left: -6px; }
.ids a, .ids code { display: block; }
figure { margin: 18px 0 30px; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; }
figure summary, .fold > summary { color: var(--quiet); font-size: 13px; }
.fold > summary::before { content: "\\25B8\\00A0"; }
.fold[open] > summary::before { content: "\\25BE\\00A0"; }
@media print {
  body { padding: 0; max-width: none; font-size: 11pt; }
  nav, figure details { display: none; }
  table { font-size: 8pt; }
  th, td { padding: 3px 5px; }
  tr { break-inside: avoid; }
  thead { display: table-header-group; }
  h2 { margin-top: 28px; }
}
"""


@dataclass(frozen=True)
class Links:
    """Where a run is looked at.

    Attributes:
        uri: of MLflow, without credentials; only an HTTP server has pages.
        experiment_of: run id -> experiment id.
    """

    uri: str
    experiment_of: dict[str, str]

    def run(self, run_id: str) -> str:
        """The run's id as a link to MLflow's page of it, or to be copied."""
        if not self.uri.startswith(("http://", "https://")):
            return f"<code>{escape(run_id)}</code>"
        experiment = quote(self.experiment_of.get(run_id, ""), safe="")
        address = f"{self.uri.rstrip('/')}/#/experiments/{experiment}/runs/{quote(run_id, safe='')}"
        return f'<a href="{escape(address)}"><code>{escape(run_id)}</code></a>'

    def fold(self, summary: str, runs: Sequence[str]) -> str:
        """`summary` (escaped already), which opens to a list of runs."""
        ids = "".join(self.run(run) for run in dict.fromkeys(runs))
        return f'<details><summary>{summary}</summary><div class="ids">{ids}</div></details>'


def tables(table: Table, links: Links) -> str:
    """A table with its note; one of many means as several tables with the first column in each."""
    width = len(table.columns)
    if width <= _TABLE_COLUMNS + 1 or not all(column.spread for column in table.columns[1:]):
        parts = [_table(table, links, range(width))]
    else:
        starts = range(1, width, _TABLE_COLUMNS)
        parts = [_table(table, links, [0, *range(at, min(width, at + _TABLE_COLUMNS))]) for at in starts]
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return "".join(parts) + note


def figure(drawn: Drawn, links: Links) -> str:
    """A figure inside the page, with its caption and the runs it shows."""
    data = base64.b64encode(drawn.svg).decode()
    count = len(drawn.runs)
    return (
        f'<figure id="figure-{escape(drawn.name)}">'
        f'<img alt="{escape(drawn.title)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(drawn.caption)}</figcaption>"
        f"{links.fold(f'Runs in this figure ({count})', drawn.runs)}</figure>"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text, of the style sheet's class `kind`."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(texts: Sequence[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values, one a line; empty values are left out."""
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs if value)
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _table(table: Table, links: Links, keep: Sequence[int]) -> str:
    wide = ' class="wide dense"' if len(keep) > _ROOMY else ' class="wide"' if len(keep) > 5 else ""
    head = "".join(
        f'<th scope="col"{_class(["n"] if table.columns[at].number else [])}>{escape(table.columns[at].name)}</th>'
        for at in keep
    )
    body = ""
    for row in table.rows:
        chance = ' class="chance"' if row[0].text == "Chance" else ""
        cells = (_cell(row[at], table.columns[at], links, left=at * 2 < len(keep)) for at in keep)
        body += f"<tr{chance}>{''.join(cells)}</tr>"
    return f"<table{wide}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(cell: Cell, column: Column, links: Links, *, left: bool) -> str:
    kinds = ["n"] if column.number else []
    if cell.runs == (cell.text,):
        return f"<td{_class([*kinds, 'id'])}>{links.run(cell.text)}</td>"
    text = escape(cell.text)
    if cell.strong:
        kinds.append("best")
    if not cell.runs:
        return f"<td{_class([*kinds, *([] if column.number else ['words'])])}>{text}</td>"
    return f"<td{_class([*kinds, *(['left'] if left else [])])}>{links.fold(text, cell.runs)}</td>"


def _class(kinds: Sequence[str]) -> str:
    return f' class="{" ".join(kinds)}"' if kinds else ""
