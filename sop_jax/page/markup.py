"""The HTML of a page: its elements, and its style in light, dark and print.

Everything that is not HTML is escaped here, because names of files can contain anything.
"""

import html
from collections.abc import Sequence
from typing import Any

from sop_jax.data.folders import printable


def escape(text: str) -> str:
    r"""Returns a text as HTML; bytes of names that are not UTF-8 become `\xe9`."""
    return html.escape(printable(text))


def paragraph(text: str) -> str:
    """Returns a text as a paragraph."""
    return f"<p>{escape(text)}</p>"


def section(name: str, title: str, content: str) -> str:
    """Returns a part of the page with a heading, to which `#name` leads."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{escape(title)}</h2>\n{content}\n</section>'
    )


def contents(links: Sequence[tuple[str, str]]) -> str:
    """Returns links to the parts of a page, given by name and title."""
    items = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title in links)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def figure(content: str, caption: str, kind: str = "") -> str:
    """Returns a figure with its caption; `kind` is a class of the page's style."""
    own = f' class="{kind}"' if kind else ""
    return f"<figure{own}>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def details(summary: str, content: str) -> str:
    """Returns content that is hidden until the reader opens it."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str, shown: bool = True
) -> str:
    """Returns a table whose first column names the rows; the keyboard can scroll it.

    Args:
        columns: the names of the columns; the first can be empty.
        rows: the cells; numbers are formatted, and None becomes a dash.
        caption: what the table is.
        shown: whether the caption is visible; screen readers always read it.
    """
    head = "".join(
        f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in columns
    )
    lines = [f"<thead><tr>{head}</tr></thead><tbody>"]
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell_text(value))}</td>" for value in others)
        lines.append(f'<tr><th scope="row">{escape(cell_text(first))}</th>{cells}</tr>')
    hidden = "" if shown else ' class="unseen"'
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(caption)}">'
        f"<table><caption{hidden}>{escape(caption)}</caption>{''.join(lines)}</tbody></table></div>"
    )


def cell_text(value: Any) -> str:
    """Returns the text of a cell: numbers with four digits or two decimals, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if 0.1 <= abs(value) < 1e6 or value == 0 else f"{value:.4g}"


def page(title: str, body: str, script: str = "") -> str:
    """Returns a whole page.

    Args:
        title: the title of the window.
        body: HTML, with a `main` whose id is `main`.
        script: JavaScript that runs when the body is there; the page is complete without it.
    """
    drawn = f'<script>\n"use strict";\n{script}</script>' if script else ""
    begin, rest = PAGE.split("{{title}}")
    middle, rest = rest.split("{{body}}")
    between, end = rest.split("{{script}}")
    return f"{begin}{escape(title)}{middle}{body}{between}{drawn}{end}"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{title}}</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark;
  --ink: #24292f; --grid: #d0d7de; --paper: #fff; --faint: #57606a; --link: #0550ae;
  --panel: #f4f6f8; --good: #116329; --bad: #a40e26; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --grid: #3d444d; --paper: #14181d; --faint: #9aa4af; --link: #79b8ff;
    --panel: #1d232a; --good: #6fdd8b; --bad: #ff9492; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1120px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; font-weight: 600; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; font-weight: 600; margin: 40px 0 8px; padding-top: 12px;
  border-top: 1px solid var(--grid); }
h3, h4 { font-size: 16px; font-weight: 600; margin: 24px 0 6px; overflow-wrap: anywhere; }
p { margin: 6px 0; max-width: 75ch; overflow-wrap: anywhere; }
a { color: var(--link); }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -999px; }
.skip:focus { position: static; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
.faint { color: var(--faint); }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 12px 0; padding: 0;
  list-style: none; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
caption { text-align: left; color: var(--faint); padding: 4px 0; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--grid);
  font-weight: 400; white-space: nowrap; }
thead th { color: var(--faint); white-space: normal; vertical-align: bottom; }
tr > :first-child { text-align: left; padding-left: 0; }
.words { list-style: none; margin: 8px 0; padding: 0; max-width: 85ch; }
.words li { margin: 4px 0; padding-left: 10px; border-left: 4px solid var(--grid); }
.words .good { border-color: var(--good); }
.words .bad { border-color: var(--bad); }
.words .bad b { color: var(--bad); }
.charts { columns: 2 420px; column-gap: 40px; margin-top: 16px; }
.charts figure { break-inside: avoid; }
figure { margin: 0 0 28px; }
figure svg { width: 100%; max-width: 560px; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption { color: var(--faint); font-size: 14px; max-width: 85ch; }
.charts figcaption { max-width: 560px; }
.charts:has(> :only-child) { columns: auto; }
.charts > :only-child { display: grid; grid-template-rows: auto 1fr; column-gap: 40px;
  grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
.charts > :only-child svg { grid-row: 1 / span 2; }
.beside { display: flex; flex-wrap: wrap; gap: 0 56px; }
.beside > div { max-width: 100%; }
summary { cursor: pointer; color: var(--link); font-size: 14px; }
.gallery td, .gallery th { border: 0; padding: 4px; text-align: center; vertical-align: top;
  white-space: normal; max-width: 124px; font-size: 12px; line-height: 1.3; }
.gallery .name { display: block; width: 104px; margin: 0 auto; overflow-wrap: anywhere;
  white-space: pre-line; }
.gallery img, .sample { width: 96px; height: 96px; object-fit: contain; display: block;
  margin: 0 auto 2px; background: var(--panel); }
.gallery img.pixels { image-rendering: pixelated; }
.gallery .first img { outline: 2px solid var(--link); }
.map { position: relative; max-width: 640px; }
.map svg { width: 100%; max-width: none; display: block; border: 1px solid var(--grid); }
.map circle.here { stroke: var(--ink); stroke-width: 3; }
.tip { position: absolute; pointer-events: none; background: var(--panel); color: var(--ink);
  border: 1px solid var(--grid); padding: 4px; font-size: 12px; width: 112px; z-index: 1;
  overflow-wrap: anywhere; }
.tip i { display: block; margin: 0 auto 2px; }
.key { display: flex; flex-wrap: wrap; gap: 2px 14px; list-style: none; padding: 0;
  margin: 6px 0; font-size: 13px; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 50%;
  margin-right: 5px; }
@media print {
  :root { --ink: #000; --grid: #bbb; --paper: #fff; --faint: #444; --link: #000; --panel: #fff;
    --good: #060; --bad: #900; color-scheme: light; }
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav, .skip, .tip, details:not([open]) { display: none; }
  .charts { columns: 2 240px; column-gap: 24px; }
  .charts figure, .map, tr, .words li { break-inside: avoid; }
  .scroll { overflow: visible; }
  th, td { white-space: normal; padding: 3px 6px; font-size: 9pt; }
  tbody th { min-width: 11em; }
  h2, h3, h4, caption, thead { break-after: avoid; }
  * { print-color-adjust: exact; }
}
</style>
</head>
<body>
{{body}}
{{script}}
</body>
</html>
"""
