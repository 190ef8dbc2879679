"""The frame of a report: one HTML file that needs no network and reads well on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #5b6470; --line: #e2e6eb; }
:root { --accent: #0b6bcb; --good: #157f3c; --bad: #c2331d; --hint: #fff8e6; --hint-line: #f0d48a; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #111418; --card: #1a1f25; --ink: #e7eaee; --soft: #9aa5b1; --line: #2c333b; --accent: #6cb2f7; }
  :root { --good: #5fca86; --bad: #ff8f7a; --hint: #2b2616; --hint-line: #5c4d1d; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5; }
body { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 70rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 2rem; }
header p { margin: .25rem 0 1rem; color: var(--soft); }
h1 { margin: 0; font-size: 1.7rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 .3rem; font-size: 1.15rem; }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1rem; margin-bottom: 1rem; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
section { padding: 1.1rem 1.2rem; margin: 0 0 1rem; }
section > p { margin: .2rem 0 .8rem; color: var(--soft); max-width: 48rem; }
section > p.missing { background: var(--hint); border: 1px solid var(--hint-line); border-radius: 8px; }
section > p.missing { padding: .6rem .8rem; margin: .4rem 0 0; color: var(--ink); max-width: none; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 0 0 1rem; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .7rem .9rem; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
section .facts div { background: var(--ground); border: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
tbody tr:last-child td { border-bottom: 0; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .86em; overflow-wrap: anywhere; }
.plot { width: 100%; }
footer { color: var(--soft); font-size: .85rem; padding-bottom: 2rem; }
@media (max-width: 40rem) { section { padding: .9rem .8rem; border-radius: 10px; } h1 { font-size: 1.4rem; } }
@media print { body { background: white; } section { break-inside: avoid; } nav { display: none; } }
"""

SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const style = getComputedStyle(document.documentElement);
  const color = name => style.getPropertyValue(name).trim();
  document.querySelectorAll(".js-plotly-plot").forEach(plot => {
    const change = {"font.color": color("--ink"), "hoverlabel.bgcolor": color("--card")};
    change["hoverlabel.font.color"] = color("--ink");
    Object.keys(plot._fullLayout).filter(key => /^[xy]axis\\d*$/.test(key)).forEach(key => {
      ["gridcolor", "linecolor", "zerolinecolor"].forEach(what => { change[key + "." + what] = color("--line"); });
    });
    Plotly.relayout(plot, change);
  });
}
addEventListener("load", paint);
dark.addEventListener("change", paint);
"""


def page(
    title: str, subtitle: str, plotly: str, summary: str, sections: Sequence[tuple[str, str, str]], footer: str
) -> str:
    """The whole file.

    Args:
        title, subtitle: plain text.
        plotly: the library's source, put in once.
        summary: HTML above the sections.
        sections: (anchor, heading, HTML).
        footer: plain text.
    """
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in sections)
    body = "\n".join(f'<section id="{a}"><h2>{escape(h)}</h2>{inner}</section>' for a, h, inner in sections)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style><script>{plotly}</script></head><body>",
            f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><nav>{links}</nav></header>",
            f"<main>{summary}{body}</main><footer>{escape(footer)}</footer><script>{SCRIPT}</script></body></html>",
        ]
    )


def text(words: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(words)}</p>"


def missing(words: str, command: str) -> str:
    """What is not there, and the command that makes it."""
    return f'<p class="missing">{escape(words)} Make it with <code>{escape(command)}</code>.</p>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Figures in large type, each with a name."""
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)
        + "</dl>"
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """A table cell that says whether something holds."""

    text: str
    good: bool


def table(head: Sequence[str], rows: Iterable[Sequence[str | Verdict]]) -> str:
    """A table of plain text and verdicts."""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: str | Verdict) -> str:
    if isinstance(value, Verdict):
        return f'<td class="{"good" if value.good else "bad"}">{escape(value.text)}</td>'
    return f"<td>{escape(value)}</td>"
