"""How the page of a report looks, on a light and on a dark screen, and on paper."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1d2125; --soft: #5d6670; --line: #dfe3e7; --grid: #e9ecef;
  --mark: #1f6f8b; --fill: #9cc4d2; --good: #23794a; --bad: #b3392f; --note: #fff5d6; --code: #f3f5f6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181b; --card: #1c2024; --ink: #e4e7ea; --soft: #9aa4ae; --line: #343a40; --grid: #2a3036;
    --mark: #6cc0dc; --fill: #2f6274; --good: #5fc48c; --bad: #ee8378; --note: #3a3114; --code: #23282d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .95rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
p { margin: .25rem 0 .75rem; max-width: 52rem; }
a { color: var(--mark); }
.soft, .faint { color: var(--soft); font-weight: 400; }
.about { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1rem; }
.about dt { color: var(--soft); }
.about dd { margin: 0; overflow-wrap: anywhere; }
.arms, .figures { display: grid; gap: 1rem; }
.arms { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.figures { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.note { background: var(--note); border-radius: 6px; padding: .4rem .75rem; margin: .4rem 0; max-width: none; }
figure {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem; margin: 0 0 1rem;
  overflow-x: auto;
}
figcaption { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: .85rem; white-space: nowrap; }
tbody th { font-weight: 600; }
td.n, th.n { text-align: right; }
td.n, th.n, td.one { white-space: nowrap; }
td.text { min-width: 12rem; overflow-wrap: anywhere; }
.better { color: var(--good); font-weight: 600; }
.worse { color: var(--bad); font-weight: 600; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0 0 .6rem; }
details > .inside { padding: 0 1rem .75rem; }
summary { cursor: pointer; padding: .5rem 1rem; overflow-wrap: anywhere; }
summary .soft { margin-left: .5rem; }
details details { border-width: 1px 0 0; border-radius: 0; margin: .5rem -1rem -.75rem; }
details:target { outline: 2px solid var(--mark); }
h4 { font-size: .8rem; margin: .75rem 0 .15rem; color: var(--soft); font-weight: 600; }
.said, pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-width: none; }
pre { background: var(--code); border-radius: 6px; padding: .6rem .75rem; }
pre, code { font: 12.5px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
pre.trace { white-space: pre; overflow: auto; max-height: 32rem; }
code { overflow-wrap: anywhere; }
svg.plot { display: block; max-width: 100%; height: auto; margin: .25rem auto 0; }
svg.small { display: block; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: var(--ink); }
svg .tick, svg text.faint { fill: var(--soft); }
svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; }
svg .grid { stroke: var(--grid); }
svg .zero { stroke: var(--soft); stroke-width: 1.5; }
svg .ideal { stroke: var(--soft); stroke-dasharray: 4 4; }
svg .whisker { stroke: var(--mark); stroke-width: 2; stroke-linecap: round; }
svg .mark { fill: var(--mark); stroke: var(--card); stroke-width: 1; }
svg .bar, svg .dot { fill: var(--fill); }
svg .way { stroke-width: 2; }
svg .way.better { stroke: var(--good); } svg .way.worse { stroke: var(--bad); }
svg .from { fill: var(--card); stroke-width: 1.5; }
svg .from.better { stroke: var(--good); } svg .from.worse { stroke: var(--bad); }
svg .to.better { fill: var(--good); } svg .to.worse { fill: var(--bad); }
@media print {
  body { max-width: none; padding: 0; }
  figure, details, tr { break-inside: avoid; }
  .wide { overflow: visible; border: 0; }
  td, th, td.n, th.n, td.one { white-space: normal; padding: .3rem .4rem; }
}
"""
