"""How the page looks: system fonts, nothing loaded from anywhere, one column on a phone."""

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --back: #f5f7f9;
  --accent: #0b6e69; --warn: #8a5a00; --warn-back: #fff6e0; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--back); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC",
  "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", sans-serif; }
main, header > div { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { background: var(--accent); color: white; padding: 28px 0 22px; }
header h1 { margin: 0 0 4px; font-size: 1.7rem; line-height: 1.2; }
header p { margin: 0; opacity: .9; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 14px; font-size: .9rem; }
nav a { color: white; }
section { background: white; border: 1px solid var(--line); border-radius: 10px;
  margin: 18px 0; padding: 6px 20px 18px; }
h2 { font-size: 1.25rem; margin: 14px 0 8px; }
h3 { font-size: 1rem; margin: 16px 0 6px; }
p { margin: 8px 0; max-width: 75ch; }
.cards { display: grid; gap: 12px; margin: 18px 0; grid-template-columns: repeat(auto-fit,
  minmax(160px, 1fr)); }
.card { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.card h3 { margin: 0; font-size: .85rem; color: var(--soft); font-weight: 600; }
.card p { margin: 2px 0 0; font-size: .85rem; color: var(--soft); }
.card .big { font-size: 1.6rem; color: var(--ink); font-weight: 650; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.note { background: var(--warn-back); border-left: 4px solid var(--warn); border-radius: 6px;
  padding: 8px 14px; margin: 14px 0; max-width: none; }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 4px; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tr > :first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 500; }
table.words td, table.words th { text-align: left; }
.ci { color: var(--soft); font-size: .85em; white-space: nowrap; }
.figures { display: grid; gap: 14px; margin: 12px 0; grid-template-columns: repeat(auto-fit,
  minmax(min(320px, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figure svg { width: 100%; height: auto; max-width: 520px; display: block; }
figcaption { font-size: .85rem; color: var(--soft); max-width: 60ch; }
.prompt { border-top: 1px solid var(--line); padding: 10px 0 4px; }
.turn { margin: 2px 0; max-width: none; }
.turn b { color: var(--soft); font-weight: 600; margin-right: 6px; }
.answers { display: grid; gap: 10px; margin: 8px 0; grid-template-columns: repeat(auto-fit,
  minmax(min(230px, 100%), 1fr)); }
.answer { background: var(--back); border-radius: 8px; padding: 8px 12px; font-size: .92rem; }
.answer h4 { margin: 0 0 4px; font-size: .85rem; color: var(--accent); }
.answer div { white-space: pre-wrap; overflow-wrap: anywhere; }
.answer p { margin: 6px 0 0; font-size: .8rem; color: var(--soft); }
.truth { margin: 8px 0 0; padding: 0; list-style: none; font-size: .85rem; }
.truth li { padding-left: 1.3em; text-indent: -1.3em; }
.truth .good::before { content: "✓ "; color: var(--accent); font-weight: 700; }
.truth .bad::before { content: "✗ "; color: var(--bad); font-weight: 700; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--accent); }
code { font-size: .88em; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: .85rem; padding: 4px 0 32px; }
@media (max-width: 600px) { section { padding: 4px 14px 14px; } main, header > div { padding: 0
  12px; } .cards { grid-template-columns: 1fr 1fr; } .card { padding: 10px 12px; }
  .card .big { font-size: 1.3rem; }
  table.words, table.words tbody, table.words tr, table.words tbody th, table.words td {
    display: block; padding: 1px 0; border: 0; }
  table.words thead { display: none; }
  table.words tr { border-bottom: 1px solid var(--line); padding: 6px 0; } }
"""
