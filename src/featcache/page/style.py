"""The page's style sheet: light and dark, screen, phone and paper.

Line colours are Okabe and Ito's, told apart with every common colour blindness; in the dark, the
lighter ones of their pairs stand in where the dark ones would sink into the ground.
"""

CSS = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --panel: #f5f6f8; --ink: #1c1f24; --soft: #59606b; --rule: #d8dce2;
  --heat: 0 114 178; --hot-ink: #ffffff; --link: #00598c;
  --s0: #d55e00; --s1: #0072b2; --s2: #009e73; --s3: #b8578a; --s4: #b07800; --s5: #3a8fc4;
  --s6: #1c1f24;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14161a; --panel: #1d2026; --ink: #e8eaee; --soft: #a3abb7; --rule: #363b44;
    --heat: 86 180 233; --hot-ink: #0b0d10; --link: #7cc4f0;
    --s0: #f08a3c; --s1: #56b4e9; --s2: #2fc79b; --s3: #e49ac0; --s4: #e6b422; --s5: #9fd3f5;
    --s6: #e8eaee;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.28rem; margin: 44px 0 10px; padding-top: 12px; border-top: 1px solid
  var(--rule); }
h3 { font-size: 1.05rem; margin: 28px 0 8px; overflow-wrap: anywhere; }
p { margin: 8px 0; max-width: 70ch; overflow-wrap: anywhere; }
.subtitle, .note, figcaption, .caption { color: var(--soft); }
.note { border-left: 3px solid var(--rule); padding-left: 12px; font-size: 0.94rem; }
a { color: var(--link); }
nav { margin: 14px 0 0; font-size: 0.94rem; display: flex; flex-wrap: wrap; gap: 2px 16px; }
ul { padding-left: 20px; margin: 8px 0; max-width: 72ch; }
li { margin: 4px 0; overflow-wrap: anywhere; }
ul.lead { list-style: none; padding: 14px 18px; background: var(--panel); border-radius: 8px;
  font-size: 1.06rem; margin: 18px 0; max-width: none; }
ul.lead li { margin: 7px 0; }
.scroll { overflow-x: auto; margin: 12px 0; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
.caption { margin: 14px 0 0; font-size: 0.9rem; }
.caption + .scroll { margin-top: 4px; }
table:not(.matrix) td:first-child { min-width: 9.5em; overflow-wrap: anywhere; }
table.wordy td { min-width: 8em; overflow-wrap: anywhere; }
th, td { padding: 5px 12px 5px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
th { font-weight: 600; vertical-align: bottom; }
.num { text-align: right; padding: 5px 0 5px 12px; white-space: nowrap; }
figure { margin: 16px 0 6px; }
figcaption { font-size: 0.92rem; margin-top: 6px; max-width: 75ch; }
svg.wide { display: block; width: 100%; height: auto; }
svg.narrow { display: none; width: 100%; height: auto; }
svg.sign { width: 34px; height: 14px; flex: none; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 20px; list-style: none; padding: 0; margin: 0
  0 6px;
  font-size: 0.92rem; max-width: none; }
.legend li { display: flex; align-items: center; gap: 8px; margin: 2px 0; }
.grid { stroke: var(--rule); stroke-width: 1; fill: none; }
.axis { stroke: var(--soft); stroke-width: 1; fill: none; }
svg text { fill: var(--soft); font-size: 12.5px; }
svg text.name { fill: var(--ink); font-size: 13px; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
.s4 { --c: var(--s4); } .s5 { --c: var(--s5); } .s6 { --c: var(--s6); }
.line, .bar, .ahead { stroke: var(--c); }
.dot, .mark { fill: var(--c); }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.ahead { fill: none; stroke-width: 1.6; stroke-dasharray: 5 4; }
.bar { fill: none; stroke-width: 1.3; opacity: 0.75; }
.dot { stroke: none; opacity: 0.55; }
.mark { stroke: var(--ground); stroke-width: 1.2; }
.line.s1 { stroke-dasharray: 9 3; } .line.s2 { stroke-dasharray: 2.5 2.5; }
.line.s3 { stroke-dasharray: 9 3 2.5 3; } .line.s4 { stroke-dasharray: 14 4; }
.line.s5 { stroke-dasharray: 1.5 4; } .line.s6 { stroke-dasharray: 5 2 1.5 2; }
details { margin: 6px 0 14px; font-size: 0.94rem; }
summary { cursor: pointer; color: var(--link); }
table.matrix { font-size: 0.82rem; border-collapse: separate; border-spacing: 1px; }
table.matrix th, table.matrix td { border: 0; padding: 4px 6px; text-align: right; min-width:
  34px; }
table.matrix th { font-weight: 500; }
table.matrix thead th { vertical-align: bottom; text-align: left; padding: 4px 2px; }
table.matrix thead th span { writing-mode: vertical-rl; transform: rotate(180deg); white-space:
  nowrap;
  max-height: 12em; overflow: hidden; text-overflow: ellipsis; }
table.matrix tbody th { white-space: nowrap; max-width: 16em; overflow: hidden;
  text-overflow: ellipsis; position: sticky; left: 0; background: var(--ground); }
table.matrix td { background: rgb(var(--heat) / var(--a)); }
table.matrix td.hot { color: var(--hot-ink); }
table.matrix td.right { outline: 1px solid var(--soft); outline-offset: -1px; }
table.matrix td.none { color: var(--soft); background: none; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 14px;
  list-style: none; padding: 0; max-width: none; }
.pictures li { margin: 0; font-size: 0.84rem; line-height: 1.35; overflow-wrap: anywhere; }
.pictures img { width: 100%; max-width: 128px; height: auto; border-radius: 4px; display: block;
  margin-bottom: 4px; background: var(--panel); }
pre { background: var(--panel); border-radius: 6px; padding: 10px 14px; overflow-x: auto; margin:
  10px 0;
  font: 0.86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
footer { margin-top: 50px; color: var(--soft); font-size: 0.88rem; }
@media (max-width: 560px) {
  main { padding: 18px 14px 40px; }
  h1 { font-size: 1.4rem; }
  svg.wide { display: none; }
  svg.narrow { display: block; }
  ul.lead { padding: 10px 14px; font-size: 1rem; }
}
@media print {
  :root { --ground: #fff; --panel: #f5f6f8; --ink: #000; --soft: #444; --rule: #bbb;
    --heat: 0 114 178; --hot-ink: #fff; --link: #000;
    --s0: #d55e00; --s1: #0072b2; --s2: #009e73; --s3: #b8578a; --s4: #b07800; --s5: #3a8fc4;
    --s6: #000; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  nav, summary { display: none; }
  figure, tr, .scroll, .pictures li, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  table.matrix { font-size: 7.5pt; }
  svg.wide { display: block; max-width: 160mm; }
  svg.narrow { display: none; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
  pre { white-space: pre-wrap; }
}
"""
