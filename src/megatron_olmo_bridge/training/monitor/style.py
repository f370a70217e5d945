"""CSS of a report, for light and dark themes, desktops and phones."""

STYLE = """
:root {
  --ink: #1c2330; --muted: #5b6577; --line: #e3e7ee; --page: #f5f6f9; --card: #ffffff;
  --good: #14713d; --good-back: #e2f4e9; --bad: #b3202a; --bad-back: #fdeaea;
  --busy: #2557c7; --busy-back: #e7eefc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e7eaf1; --muted: #97a1b3; --line: #2a303d; --page: #0f1218; --card: #171b24;
    --good: #6fd69a; --good-back: #14301f; --bad: #ff8b85; --bad-back: #3a1719;
    --busy: #8fb2ff; --busy-back: #18264a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; font-size: 16px;
  font-family: Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
    sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1, h2, p, dl, dd, figure { margin: 0; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em;
  overflow-wrap: anywhere; text-wrap: balance; }
h2 { font-size: 1.1rem; letter-spacing: -.005em; }
a { color: var(--busy); overflow-wrap: anywhere; }
.eyebrow { color: var(--muted); font-size: .8rem; font-weight: 600; letter-spacing: .08em;
  text-transform: uppercase; margin-bottom: .35rem; }
.about { color: var(--muted); margin-top: .5rem; }
.state { display: flex; flex-wrap: wrap; align-items: baseline; gap: .3rem .7rem;
  margin-top: 1.1rem; overflow-wrap: anywhere; }
.state strong { border-radius: 99px; padding: .1rem .75rem; font-size: .85rem; font-weight: 600;
  color: var(--busy); background: var(--busy-back); }
.done strong { color: var(--good); background: var(--good-back); }
.stopped strong { color: var(--bad); background: var(--bad-back); }
.state span { flex: 1 1 16rem; }
.figures, figure, details, section { background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; margin-top: 1.25rem; }
.figures { display: flex; flex-wrap: wrap; overflow: hidden; margin-top: 2rem; }
.figures div { flex: 1 1 10.5rem; padding: .95rem 1.25rem; box-shadow: 0 0 0 .5px var(--line); }
dt { color: var(--muted); font-size: .82rem; }
dd { font-size: 1.5rem; font-weight: 600; letter-spacing: -.015em; line-height: 1.3;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
dd.note { font-size: .78rem; font-weight: 400; letter-spacing: 0; color: var(--muted); }
nav { margin-top: 1.1rem; }
figure { padding: 1.1rem 1.25rem .8rem; }
figcaption p { color: var(--muted); font-size: .9rem; }
picture, img { display: block; width: 100%; height: auto; }
img { margin-top: .6rem; }
details, section { padding: .9rem 1.25rem; }
summary { cursor: pointer; }
summary h2 { display: inline; }
summary span { color: var(--muted); font-size: .9rem; margin-left: .35rem; }
.scroll { overflow-x: auto; scrollbar-width: thin; margin-top: .6rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--muted); }
th, td { padding: .36rem 1.1rem .36rem 0; vertical-align: top; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
td.number, th.number { text-align: right; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
tbody td { border-top: 1px solid var(--line); }
footer { color: var(--muted); font-size: .82rem; margin-top: 2rem; }
@media (max-width: 640px) {
  main { padding: 1.75rem .9rem 3rem; }
  figure, details, section { padding-left: .9rem; padding-right: .9rem; }
  .figures div { flex-basis: 8rem; padding: .8rem .9rem; }
  dd { font-size: 1.3rem; }
}
@media print {
  body { background: none; }
  figure, .figures { break-inside: avoid; }
}
"""
