"""The style sheet of the page; its colours are those of the HTML report."""

from __future__ import annotations

CSS = """
.gradio-container {
  --ink: #1d1c1a; --muted: #625d55; --line: #e2ded5; --panel: #ffffff; --tint: #ece9e1;
  --bar: #0b62a8; --wrong: #a8361c; --track: #d6d1c6; --color-accent: var(--bar);
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia,
    "Liberation Serif", serif;
}
.dark .gradio-container, .gradio-container.dark {
  --ink: #e9e6e0; --muted: #a8a39a; --line: #33373d; --panel: #1d2024; --tint: #2b2f35;
  --bar: #6cb2f5; --wrong: #ff9c82; --track: #4a5058;
}
.gradio-container main { width: 100%; max-width: 76rem; margin: 0 auto; }
.gradio-container .html-container { padding: 0; color: var(--ink); }
#picture img { width: 100%; height: 100%; object-fit: contain; }
.gradio-container .wrap input[type=range]::-webkit-slider-runnable-track {
  background: linear-gradient(to right, var(--bar) var(--range_progress),
    var(--track) var(--range_progress)); }
.gradio-container .wrap input[type=range]::-moz-range-track { background: var(--track); }
.gradio-container input[type=range]::-webkit-slider-thumb { background: var(--bar); }
.gradio-container input[type=range]::-moz-range-thumb { background: var(--bar); }
.top h1 { font: 400 clamp(1.6rem, 4vw, 2.3rem)/1.15 var(--serif); color: var(--ink); margin: 0; }
.top ul { list-style: none; display: flex; flex-wrap: wrap; gap: 0.1rem 1.3rem; margin: 0.4rem 0 0;
  padding: 0; color: var(--muted); font-size: 0.9rem; }
.top li { margin: 0; overflow-wrap: anywhere; }
.heading { margin: 0; font-weight: 600; color: var(--ink); font-size: 0.95rem; }
.small { color: var(--muted); font-size: 0.85rem; margin: 0.6rem 0 0; }
.notice { color: var(--muted); border: 1px dashed var(--line); border-radius: 0.5rem;
  padding: 1.2rem; text-align: center; margin: 0; text-wrap: balance; }
.notice.wrong { color: var(--wrong); border: 1px solid currentColor; }

.bars, .captions { list-style: none; margin: 0; padding: 0; }
.bars li { display: grid; grid-template-columns: 1fr auto; gap: 0.15rem 0.8rem;
  margin: 0 0 0.6rem; }
.bars .name, .captions .name { color: var(--ink); overflow-wrap: anywhere; min-width: 0; }
.bars .value, .captions .value, .card .value { color: var(--muted);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.bars .track { grid-column: 1 / -1; height: 0.6rem; border-radius: 0.3rem; background: var(--tint);
  overflow: hidden; }
.bars .track i { display: block; height: 100%; background: var(--bar); border-radius: 0.3rem; }
.bars li:first-child .name { font-weight: 600; }

.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr));
  gap: 0.6rem; }
.cards.samples { grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 0.45rem; }
.heading + .cards { margin-top: 0.6rem; }
.cards.slots { grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)); }
.card { display: flex; flex-direction: column; width: 100%; font-weight: 400;
  min-width: 0; padding: 0.35rem; text-align: left;
  background: var(--panel); border: 1px solid var(--line); border-radius: 0.5rem; cursor: pointer;
  font-size: 0.8rem; line-height: 1.3; color: var(--ink); }
.card:hover, .card:focus-visible { border-color: var(--bar); }
.card img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; margin: 0;
  border-radius: 0.3rem; background: #fff; }
.card .caption { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical;
  overflow: hidden; overflow-wrap: anywhere; margin-top: 0.3rem; }
.card .value { display: block; font-size: 0.75rem; }
.captions li { margin: 0; }
.captions button { display: flex; width: 100%; font-weight: 400;
  justify-content: space-between; gap: 0.8rem;
  padding: 0.4rem 0.2rem; text-align: left; background: none; border: 0; cursor: pointer;
  border-bottom: 1px solid var(--line); }
.captions button:hover, .captions button:focus-visible { background: var(--tint); }
.chips { display: flex; flex-wrap: wrap; gap: 0.4rem; }
.chips button { padding: 0.25rem 0.7rem; border: 1px solid var(--line); border-radius: 1rem;
  background: var(--panel); color: var(--ink); font-size: 0.85rem; font-weight: 400;
  cursor: pointer;
  max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.chips button:hover, .chips button:focus-visible { border-color: var(--bar); }

.slot p { color: var(--ink); margin: 0 0 0.8rem; }
.figures { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 0.8rem; }
.figures figure { margin: 0; }
.figures img { display: block; width: 100%; aspect-ratio: 1; margin: 0; border-radius: 0.4rem;
  border: 1px solid var(--line); }
.figures .seen img { image-rendering: pixelated; }
.figures figcaption { font-size: 0.85rem; color: var(--muted); margin-top: 0.3rem; }
.scale { display: flex; align-items: center; gap: 0.4rem; font-variant-numeric: tabular-nums; }
.scale i { flex: 1; max-width: 8rem; height: 0.5rem; border-radius: 0.25rem; }
@media (max-width: 40rem) {
  .figures { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .figures .seen { order: 3; }
  .cards { grid-template-columns: repeat(auto-fill, minmax(5.2rem, 1fr)); }
  .cards.samples { display: flex; overflow-x: auto; padding-bottom: 0.3rem; }
  .samples .card { flex: 0 0 5.2rem; }
  #picture { height: 220px !important; }
}
"""
