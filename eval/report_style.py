"""The style sheet of the HTML report: light and dark, phone and desktop, screen and paper."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --page: #fbfaf7; --card: #ffffff; --ink: #1d1c1a; --muted: #625d55; --line: #e2ded5;
  --accent: #0b5f9e; --good: #10703d; --good-tint: #d9f0e0; --miss: #a8361c; --tint: #ece9e1;
  --c0: #0b62a8; --c1: #c2410c; --c2: #0f766e; --c3: #7e3f98; --c4: #8a6100; --c5: #4b5563;
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
    "Liberation Sans", sans-serif;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia,
    "Liberation Serif", serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1d2024; --ink: #e9e6e0; --muted: #a8a39a; --line: #33373d;
    --accent: #84bdf5; --good: #6bd896; --good-tint: #1c4430; --miss: #ff9c82; --tint: #2b2f35;
    --c0: #6cb2f5; --c1: #ff9b63; --c2: #4fd1b5; --c3: #d29bf0; --c4: #e6c05c; --c5: #b7bdc8;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.55 var(--sans); overflow-wrap: break-word;
}
header, main, footer { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 3.5rem; }
h1 {
  font: 400 clamp(2rem, 5vw, 3.1rem)/1.12 var(--serif); letter-spacing: -0.015em;
  margin: 0 0 1.1rem; text-wrap: balance;
}
h2 { font: 400 1.7rem/1.2 var(--serif); margin: 0 0 0.35rem; }
section { margin-top: 3.25rem; scroll-margin-top: 1rem; }
p { margin: 0; max-width: 46rem; text-wrap: pretty; }
.lead { font-size: 1.2rem; line-height: 1.5; }
.points { margin: 0.9rem 0 0; padding: 0; list-style: none; max-width: 46rem; }
.points li { text-wrap: pretty; padding: 0.45rem 0; border-top: 1px solid var(--line); }
.note, figcaption small { color: var(--muted); font-size: 0.9rem; }
nav { margin-top: 1.6rem; display: flex; flex-wrap: wrap; gap: 0.3rem 1.4rem; }
nav a { color: var(--accent); text-decoration: none; padding: 0.2rem 0; }
nav a:hover { text-decoration: underline; text-underline-offset: 0.2em; }
a:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
figure { margin: 0; min-width: 0; }
figcaption, caption { font-weight: 600; text-align: left; }
figcaption small { display: block; font-weight: 400; }
.pair {
  display: grid; gap: 1.5rem; margin-top: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr));
}
.pair > :only-child { grid-column: 1 / -1; }
.card, .chart {
  background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem;
  padding: 1rem 1.1rem;
}

.columns { display: grid; gap: 1rem 3rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.columns > * { min-width: 0; }
.columns > :only-child { grid-column: 1 / -1; }
.scroll { overflow-x: auto; margin-top: 1.4rem; }
table { border-collapse: collapse; min-width: min(100%, 30rem); font-size: 0.95rem; }
caption { padding-bottom: 0.5rem; }
th, td { padding: 0.5rem 0.9rem; text-align: left; vertical-align: baseline; }
thead th {
  color: var(--muted); font-size: 0.85rem; font-weight: 500; vertical-align: bottom;
  border-bottom: 1.5px solid var(--ink);
}
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--page); min-width: 9rem; }
th:first-child { padding-left: 0; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
.num { text-align: right; font-variant-numeric: tabular-nums; }
td.num { white-space: nowrap; }
.note { margin-top: 0.6rem; }

.matrix { min-width: 0; font-size: 0.82rem; border-spacing: 2px; border-collapse: separate; }
.matrix td, .matrix th { padding: 0; border: 0; vertical-align: middle; }
.matrix thead th { height: 7rem; padding-bottom: 0.4rem; vertical-align: bottom; }
.matrix thead span { writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap;
  max-height: 7rem; overflow: hidden; text-overflow: ellipsis; }
.matrix tbody th { min-width: 0; max-width: 8.5rem; padding-right: 0.6rem; white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; }
.matrix tbody tr + tr > * { border-top: 0; }
.matrix tbody td { width: 1.85rem; min-width: 1.85rem; height: 1.85rem; text-align: center;
  vertical-align: middle; border-radius: 0.2rem; font-variant-numeric: tabular-nums;
  background: color-mix(in srgb, var(--shade) calc(var(--share) * 70%), var(--tint)); }
.matrix .hit { --shade: var(--good); }
.matrix .slip { --shade: var(--miss); }
.origin { display: block; color: var(--muted); font-size: 0.82rem; margin-bottom: 0.3rem; }

.chart { display: flex; flex-direction: column; }
.chart svg { display: block; margin-top: auto; width: 100%; height: auto; overflow: visible; }
.chart text { font-size: 11.5px; fill: var(--muted); font-variant-numeric: tabular-nums; }
.chart text.name { fill: var(--ink); }
.grid { stroke: var(--line); }
.axis { stroke: var(--muted); }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round;
  stroke-linecap: round; }
/* Many up-and-downs: step back, so that a smoothed curve over them can be read. */
.line.noisy { stroke-width: 0.9; opacity: 0.6; }
.dot { fill: currentColor; stroke: var(--card); stroke-width: 1; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 1.2rem; list-style: none; padding: 0;
  margin: 0.2rem 0 0.5rem; font-size: 0.88rem; }
.chart svg.key { display: inline-block; width: 26px; height: 12px; margin-right: 0.35rem;
  vertical-align: -1px; }
.legend b { font-weight: 500; color: var(--muted); font-variant-numeric: tabular-nums; }

.ask { display: flex; justify-content: space-between; gap: 0.8rem; align-items: baseline; }
.ask q { font: 400 1.15rem/1.3 var(--serif); overflow-wrap: anywhere; min-width: 0; }
.verdict { font-size: 0.82rem; font-weight: 500; white-space: nowrap; color: var(--miss); }
.verdict.good { color: var(--good); }
.answers { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 0.75rem;
  list-style: none; padding: 0; margin: 0.9rem 0 0; }
.answers img, .shown {
  display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff;
  border-radius: 0.4rem; border: 1px solid var(--line);
}
.answers .good img { border-color: transparent; outline: 3px solid var(--good); }
.score { font-size: 0.8rem; color: var(--muted); font-variant-numeric: tabular-nums; }
.answers .score { display: block; text-align: center; margin-top: 0.3rem; }
.good > .score, .mark { color: var(--good); font-weight: 600; }
.show { display: grid; grid-template-columns: 7.5rem minmax(0, 1fr); gap: 1.1rem;
  align-items: center; }
.show figcaption { text-align: right; }
.captions { list-style: none; padding: 0; margin: 0.3rem 0 0; font-size: 0.92rem; }
.captions li {
  display: flex; justify-content: space-between; gap: 0.8rem; padding: 0.16rem 0.5rem;
  margin-top: 0.25rem; border-radius: 0.25rem;
  background: linear-gradient(var(--tint), var(--tint)) no-repeat 0 0 /
    calc(var(--part) * (100% - 4.4rem)) 100%;
}
.captions .text { min-width: 0; overflow-wrap: anywhere; }
.captions li.good { --tint: var(--good-tint); font-weight: 500; }
.captions .good > .score { color: inherit; }
.captions .score { white-space: nowrap; }

.picture.wide { grid-column: 1 / -1; }
.picture img {
  display: block; max-width: 100%; height: auto; margin: 0.8rem auto 0; border-radius: 0.3rem;
}
dl { display: grid; grid-template-columns: minmax(8rem, max-content) minmax(0, 1fr);
  gap: 0.45rem 1.6rem; margin: 1rem 0 0; font-size: 0.95rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 3.5rem; padding-top: 1rem; padding-bottom: 2.5rem; color: var(--muted);
  font-size: 0.85rem; }
@media (max-width: 34rem) {
  header { padding-top: 2rem; }
  .pair { gap: 1rem; }
  .card, .chart { padding: 0.85rem; }
  .chart text { font-size: 14px; }
  .answers { gap: 0.45rem; }
  .answers .score { font-size: 0.74rem; }
  .show { grid-template-columns: 5.2rem minmax(0, 1fr); gap: 0.8rem; }
  table { min-width: 0; font-size: 0.88rem; }
  th, td { padding: 0.45rem; }
  th:last-child, td:last-child { padding-right: 0; }
  thead th { font-size: 0.8rem; }
  tbody th { min-width: 6.5rem; }
  /* Figures with text in them stay large enough to read, and are pushed sideways. */
  .picture { overflow-x: auto; }
  .picture img { max-width: 36rem; }
  .picture figcaption { position: sticky; left: 0; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: 0.7rem; }
}
@media print {
  nav { display: none; }
  .card, .chart, tr { break-inside: avoid; }
}
"""
