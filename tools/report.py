"""The page of a comparison: verdict, heat map and table in one HTML file that needs nothing else."""

import json
import math
from html import escape
from typing import Any

from qwen35.compare.judge import BINS, MOST

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fff; --ink: #1b1f24; --soft: #59626d; --line: #d3d8de; --panel: #f5f6f8;
  --link: #0b57b0; --hit: #fff2b8; --fail-ink: #a03a00; --bar: #5f7388; --none: #d9d9d9;
  --pass-lo: #fff; --pass-hi: #6aa6de; --fail-lo: #fdb45c; --fail-hi: #701c00; --deep: #fff;
  --mark: #2a1200; --fail-row: #fff5ea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --ink: #e4e7eb; --soft: #a2abb6; --line: #39404a; --panel: #1d2127;
    --link: #8cbcf5; --hit: #4d4312; --fail-ink: #ffb066; --bar: #8ea3b8; --none: #30343a;
    --pass-lo: #565d66; --pass-hi: #2f7fc9; --fail-lo: #c9711f; --fail-hi: #ffe3a6;
    --deep: #2a1200; --fail-row: #2b211a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 16px; max-width: 1600px; background: var(--page); color: var(--ink);
  font: 14px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif;
}
h1 { font-size: 22px; margin: 0 0 2px; }
h2 { font-size: 16px; margin: 28px 0 8px; }
p { margin: 6px 0; max-width: 90ch; }
h1, p, .box th, .facts dd { overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.verdict { border-left: 6px solid var(--pass-hi); padding: 2px 0 2px 12px; }
.verdict.fail { border-color: var(--fail-ink); }
.verdict.fail h1 b { color: var(--fail-ink); }
.facts { display: flex; flex-wrap: wrap; gap: 8px 32px; margin: 12px 0; }
.facts dt { color: var(--soft); font-size: 12px; }
.facts dd { margin: 0; }
.bar { display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: center; margin: 8px 0; }
.bar label { display: inline-flex; gap: 6px; align-items: center; }
select, input, button { font: inherit; color: inherit; }
select, input[type=search], .plain {
  padding: 4px 8px; border: 1px solid var(--line); border-radius: 4px; background: var(--page);
}
input[type=search] { width: 22em; max-width: 70vw; }
.link {
  padding: 0; border: 0; background: none; color: var(--link); text-decoration: underline;
  cursor: pointer; text-align: left; overflow-wrap: anywhere;
}
:focus-visible { outline: 2px solid var(--link); outline-offset: 1px; }
.box { overflow: auto; border: 1px solid var(--line); border-radius: 6px; max-width: 100%; }
table { border-collapse: separate; border-spacing: 0; font-size: 12px; }

.map { max-height: 85vh; width: fit-content; }
.map table { border-spacing: 1px; padding: 0 6px 6px 0; }
.map th { font-weight: normal; white-space: nowrap; background: var(--page); }
.map thead th { position: sticky; top: 0; z-index: 1; vertical-align: bottom; padding: 6px 0 4px; }
.map thead span { display: block; margin: auto; writing-mode: vertical-rl; rotate: 180deg; }
.map tbody th, .map thead th:first-child {
  position: sticky; left: 0; z-index: 1; text-align: right; padding: 0 6px;
}
.map thead th:first-child { z-index: 2; }
.cell, .map td { min-width: 22px; height: 20px; text-align: center; }
.cell { color: var(--mark); font-weight: bold; line-height: 1; }
.cell.pass { --lo: var(--pass-lo); --hi: var(--pass-hi); }
.cell.fail { --lo: var(--fail-lo); --hi: var(--fail-hi); }
.cell.pass, .cell.fail {
  background: color-mix(in oklab, var(--hi) var(--t), var(--lo));
  box-shadow: inset 0 0 0 1px var(--line);
}
.cell.deep { color: var(--deep); }
.cell.none { background: var(--none); }
.map .pass, .map .fail { cursor: pointer; }
.map td:hover:not(.none), .map td:focus { outline: 2px solid var(--link); outline-offset: 0; }
#now { min-height: 1.5em; overflow-wrap: anywhere; }
.key { display: flex; flex-wrap: wrap; gap: 4px 10px; font-size: 12px; }
.key span { display: inline-flex; align-items: center; gap: 4px; }
.key i { width: 22px; line-height: 20px; font-style: normal; }

.rows { max-height: 90vh; }
.rows table { width: 100%; }
.rows th, .rows td {
  padding: 3px 8px; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap;
}
.rows thead th { position: sticky; top: 0; z-index: 2; background: var(--panel); padding: 0; }
.rows thead button {
  width: 100%; padding: 6px 8px; border: 0; background: none; font-weight: 600; cursor: pointer;
  text-align: inherit; white-space: nowrap;
}
.rows thead button:focus-visible { outline-offset: -2px; }
.rows .number { text-align: right; font-variant-numeric: tabular-nums; }
.rows .node { position: sticky; left: 0; z-index: 1; background: var(--page); font-weight: 600; }
.rows thead .node { z-index: 3; background: var(--panel); }
.rows tr.fail > * { background: var(--fail-row); }
.rows tr.fail .says { color: var(--fail-ink); font-weight: bold; }
.rows tr.hit > * { background: var(--hit); }
.rows svg { display: block; }
.chart { fill: var(--bar); }
.chart .over { fill: var(--fail-ink); }
.chart .limit { stroke: var(--ink); stroke-dasharray: 2 2; }
.chart .base { stroke: var(--line); }
@media (max-width: 700px) {
  body { padding: 10px; }
  .map tbody th { max-width: 84px; overflow: hidden; text-overflow: ellipsis; }
  .map { max-height: 75vh; }
  .rows tbody .node { white-space: normal; min-width: 130px; max-width: 150px; }
  .rows th, .rows td { padding: 3px 6px; }
}
@media print { .box { max-height: none; overflow: visible; } }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { rows, most: MOST, bins: BINS, mode: MODE } = data;
const $ = (id) => document.getElementById(id);
const CHUNK = 80; // table rows made at a time: a chart each is too slow for thousands at once
const collator = new Intl.Collator("en", { numeric: true });

// Text only ever enters as a text node or an attribute: names come from files.
function make(tag, attributes = {}, ...children) {
  const drawn = ["svg", "path", "line", "title"].includes(tag);
  const element = drawn
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function number(value) {
  if (typeof value !== "number") return "NaN";
  if (value >= 1e100) return "∞"; // a sum of squares of 1e300 is clamped below it
  if (value === 0) return "0";
  const [digits, exponent] = value.toPrecision(3).split("e");
  if (exponent !== undefined) return `${digits}e${Number(exponent)}`;
  return digits;
}
const times = (row) => `${number(row.x_bf16)} × bf16`;
const list = (values) => (values.length ? `[${values.join(", ")}]` : "–");
const size = (row) => row.shape.reduce((product, length) => product * length, 1);
const flips = (row) => (row.flips ? `${row.flips} (≤ ${number(row.margin)})` : "0");
const says = (row) => (row.pass ? "pass" : "✕ fail");
const full = (row) => `${row.node} ${row.tensor}, ${row.phase}`;
const worse = (a, b) => (a.pass !== b.pass ? !a.pass : (a.x_bf16 ?? MOST) > (b.x_bf16 ?? MOST));

rows.forEach((row, rank) => {
  row.rank = rank + 1;
  row.text = `${row.node} ${row.tensor} ${row.phase}`.toLowerCase();
});

// ---- heat map

// In the order of the forward pass, so that the leftmost mark of a layer is where it began.
const KINDS = `pre_fc_norm_embedding pre_fc_norm_hidden fc input_layernorm
  linear_attn.in_proj_qkv linear_attn.in_proj_z linear_attn.in_proj_b linear_attn.in_proj_a
  linear_attn/conv linear_attn/recurrent linear_attn.norm linear_attn.out_proj linear_attn
  self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.q_norm self_attn.k_norm
  self_attn/k self_attn/v self_attn.o_proj self_attn post_attention_layernorm
  mlp.gate mlp.experts mlp.shared_expert.gate_proj mlp.shared_expert.up_proj
  mlp.shared_expert.down_proj mlp.shared_expert mlp.shared_expert_gate
  mlp.gate_proj mlp.up_proj mlp.down_proj mlp norm`.split(/\s+/);
const WHOLE = "(output)"; // of a layer, or of a node outside of the layers
const GROUPS = ["embed_tokens", "layers", "norm", "lm_head", "mtp"];

function place(row) {
  const numbered = row.node.match(/^((?:[^.]+\.)*?[^.]+\.\d+)(?:\.(.*))?$/s);
  const dot = row.node.indexOf(".");
  let group = numbered ? numbered[1] : dot < 0 ? row.node : row.node.slice(0, dot);
  let kind = (numbered ? numbered[2] : dot < 0 ? "" : row.node.slice(dot + 1)) || WHOLE;
  if (row.tensor !== "output") kind += `/${row.tensor}`;
  return [group, kind];
}

function rank(names, name) {
  const at = names.indexOf(name);
  return at < 0 ? names.length : at;
}
function byKind(a, b) {
  const last = (kind) => (kind.startsWith(WHOLE) ? KINDS.length + 1 : rank(KINDS, kind));
  return last(a) - last(b) || collator.compare(a, b);
}
function byGroup(a, b) {
  const first = (group) => rank(GROUPS, group.split(".")[0]);
  return first(a) - first(b) || collator.compare(a, b);
}

function paint(cell, x, pass, mark = true) {
  // Hue is the verdict, strength the size: from 1 to 3 when it passes, to 1000 when it fails.
  const part = Math.log(Math.max(x ?? MOST, 1)) / Math.log(pass ? 3 : 1000);
  const t = Math.min(part, 1);
  cell.className = `cell ${pass ? "pass" : "fail"}${!pass && t > 0.4 ? " deep" : ""}`;
  cell.style.setProperty("--t", `${Math.round(100 * t)}%`);
  if (!pass && mark) cell.textContent = x >= 1e100 ? "∞" : "✕";
}

const worstAt = new Map(); // group \n kind -> the row shown there
function drawMap() {
  const phase = $("phase").value;
  const groups = new Set();
  const kinds = new Set();
  worstAt.clear();
  for (const row of rows) {
    const [group, kind] = place(row);
    groups.add(group);
    kinds.add(kind);
    if (phase && row.phase !== phase) continue;
    const key = `${group}\n${kind}`;
    const other = worstAt.get(key);
    if (!other || worse(row, other)) worstAt.set(key, row);
  }
  const columns = [...kinds].sort(byKind);
  const head = make("tr", {}, make("th", { scope: "col" }, "layer"));
  for (const kind of columns) {
    head.append(make("th", { scope: "col" }, make("span", {}, kind)));
  }
  const body = make("tbody");
  for (const group of [...groups].sort(byGroup)) {
    const label = group.replace(/^layers\.(?=\d+$)/, "");
    const line = make("tr", {}, make("th", { scope: "row", title: group }, label));
    for (const kind of columns) {
      const row = worstAt.get(`${group}\n${kind}`);
      const cell = make("td", { tabindex: -1 });
      if (row) {
        paint(cell, row.x_bf16, row.pass);
        cell.title = `${full(row)}: ${times(row)}, ${row.pass ? "pass" : "fail"}`;
        cell.setAttribute("aria-label", cell.title);
        cell.row = row;
      } else {
        cell.className = "cell none";
        cell.setAttribute("aria-label", "no such node");
      }
      line.append(cell);
    }
    body.append(line);
  }
  $("map").replaceChildren(make("thead", {}, head), body);
  const first = body.querySelector(".fail") ?? body.querySelector("td");
  if (first) first.tabIndex = 0; // one stop for the tab key, arrows inside
}

function tell(cell) {
  if (cell) $("now").textContent = cell.title || "no such node";
}
$("map").addEventListener("mouseover", (event) => tell(event.target.closest("td")));
$("map").addEventListener("focusin", (event) => tell(event.target.closest("td")));
$("map").addEventListener("click", (event) => {
  const cell = event.target.closest("td");
  if (cell?.row) jump(cell.row);
});
$("map").addEventListener("keydown", (event) => {
  const cell = event.target.closest("td");
  if (!cell) return;
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if ((event.key === "Enter" || event.key === " ") && cell.row) jump(cell.row);
  else if (!steps[event.key]) return;
  event.preventDefault();
  const [down, right] = steps[event.key] ?? [0, 0];
  const line = cell.closest("tbody").rows[cell.parentNode.rowIndex - 1 + down];
  const next = line?.cells[cell.cellIndex + right];
  if (!next || next.tagName !== "TD" || next === cell) return;
  cell.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});

function drawKey() {
  const swatch = (label, x, pass) => {
    const mark = make("i");
    paint(mark, x, pass);
    return make("span", {}, mark, label);
  };
  const none = make("span", {}, make("i", { class: "cell none" }, "\u00a0"), "no such node");
  $("key").append("× bf16:", swatch("≤ 1", 1, true), swatch("1.5", 1.5, true));
  $("key").append(swatch("2, within the limit", 2.2, true));
  $("key").append(swatch("2, fails", 2, false), swatch("10", 10, false));
  $("key").append(swatch("100", 100, false), swatch("≥ 1000", 1000, false));
  $("key").append(swatch("infinite", MOST, false), none);
}

// ---- table

function chart(row) {
  const [step, height] = [4, 24];
  const most = Math.max(...row.histogram, 0);
  if (!most) return "–";
  const unit = Math.max(row.bf16, row.floor);
  // Free, single errors have no limit; their mean square has.
  const nearest = unit > 0 ? Math.log2((2 * row.bf16 + row.floor) / unit) : 1;
  const limit = MODE === "free" ? Infinity : nearest;
  const within = []; // the limit may cut a bin in two: of a failing row that bin counts as over
  const over = [];
  let beyond = 0;
  row.histogram.forEach((count, bin) => {
    if (!count) return;
    // Logarithmic, since one bad element in a million is what matters.
    const tall = Math.max(1.5, (height - 1) * Math.log1p(count) / Math.log1p(most));
    const bar = `M${bin * step} ${height}v${-tall.toFixed(1)}h${step - 1}v${tall.toFixed(1)}z`;
    const bad = !row.pass && bin - 15 > limit;
    if (bad) beyond += count;
    (bad ? over : within).push(bar);
  });
  const width = BINS * step;
  const at = (16 + limit) * step;
  const peak = row.histogram.indexOf(most);
  const where = peak ? `2^${peak - 16} × bf16's largest` : "0 or the smallest bin";
  const label = `most errors near ${where}` + (beyond ? `; ${beyond} over the limit` : "");
  const size = { width, height, viewBox: `0 0 ${width} ${height}` };
  return make("svg", { class: "chart", role: "img", "aria-label": label, ...size },
    make("title", {}, label),
    make("line", { class: "base", x1: 0, x2: width, y1: height - 0.5, y2: height - 0.5 }),
    make("path", { d: within.join("") }),
    make("path", { class: "over", d: over.join("") }),
    ...(limit < Infinity ? [make("line", { class: "limit", x1: at, x2: at, y1: 0, y2: height })] : []));
}

function name(row) {
  // A line may break after a dot: names are long and phones narrow.
  const parts = row.node.split(/(?<=[._])/);
  return parts.flatMap((part, i) => (i ? [make("wbr"), part] : [part]));
}

// title, class, sort key, what the cell shows, first click sorts downwards
const COLUMNS = [
  ["#", "number", (row) => row.rank, (row) => row.rank, false],
  ["verdict", "says", (row) => (row.pass ? 1 : 0), says, false],
  ["node", "node", (row) => row.node, name, false],
  ["tensor", "", (row) => row.tensor, (row) => row.tensor, false],
  ["phase", "", (row) => row.phase, (row) => row.phase, false],
  ["× bf16", "number", (row) => row.x_bf16, (row) => number(row.x_bf16), true],
  ["errors", "", (row) => row.histogram.findLastIndex((n) => n > 0), chart, true,
    "elements by error: 2^-16 to 2^7 times bf16's largest, heights logarithmic, dashed: limit"],
  ["max |error|", "number", (row) => row.max_abs, (row) => number(row.max_abs), true],
  ["rel RMS", "number", (row) => row.rel_rms, (row) => number(row.rel_rms), true],
  ["shape", "", size, (row) => list(row.shape), true],
  ["worst index", "", (row) => row.worst.join("."), (row) => list(row.worst), false],
  ["NaN/Inf", "number", (row) => row.nonfinite, (row) => row.nonfinite, true],
  ["flips (margin)", "number", (row) => row.flips + Math.min(row.margin, 0.9), flips, true,
    "tokens whose experts differ, and the widest gap between the last chosen and the next"],
  ["unsure", "number", (row) => row.unsure, (row) => row.unsure, true,
    "tokens left out: rounding alone may flip their experts"],
];

let shown = rows;
let made = 0;
let sorted = 0;
let down = false;

function drawHead() {
  const head = make("tr");
  COLUMNS.forEach(([label, kind, , , , hint], i) => {
    const button = make("button", { type: "button", title: hint }, label);
    button.addEventListener("click", () => {
      down = sorted === i ? !down : COLUMNS[i][4];
      sorted = i;
      refresh();
    });
    head.append(make("th", { scope: "col", class: kind.replace("says", "") }, button));
  });
  $("head").append(head);
}

function line(row) {
  const tr = make("tr", { class: row.pass ? "pass" : "fail", tabindex: -1 });
  for (const [label, kind, , show] of COLUMNS) {
    const content = show(row);
    const cell = label === "node" ? make("th", { scope: "row", class: kind })
      : make("td", kind ? { class: kind } : {});
    if (label === "node") cell.title = row.node;
    cell.append(...(Array.isArray(content) ? content : [content]));
    tr.append(cell);
  }
  row.line = tr;
  if (row === hit) tr.classList.add("hit");
  return tr;
}

const nearEnd = new IntersectionObserver((seen) => {
  if (seen.some((entry) => entry.isIntersecting)) more();
}, { root: $("rows"), rootMargin: "600px" });

function more(until = made + CHUNK) {
  const part = document.createDocumentFragment();
  for (; made < Math.min(until, shown.length); made++) part.append(line(shown[made]));
  $("body").append(part);
  $("more").hidden = made >= shown.length;
  $("more").textContent = `Show more (${shown.length - made} left)`;
  nearEnd.unobserve($("more")); // anew: it only speaks when something changes
  nearEnd.observe($("more"));
}

function refresh() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const failing = $("failing").checked;
  shown = rows.filter((row) =>
    (!failing || !row.pass) && words.every((word) => row.text.includes(word)));
  const key = COLUMNS[sorted][2];
  const sign = down ? -1 : 1;
  const compare = (a, b) =>
    typeof a === "string" ? collator.compare(a, b) : (a ?? MOST) - (b ?? MOST);
  shown.sort((a, b) => sign * compare(key(a), key(b)) || a.rank - b.rank);
  [...$("head").rows[0].cells].forEach((cell, i) => {
    const arrow = i !== sorted ? "" : down ? " ↓" : " ↑";
    cell.firstChild.textContent = COLUMNS[i][0] + arrow;
    if (i === sorted) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
  });
  for (const row of rows) row.line = undefined;
  $("body").replaceChildren();
  $("count").textContent = `${shown.length} of ${rows.length} rows`;
  $("rows").scrollTop = 0;
  made = 0;
  more();
}

let hit;
function jump(row) {
  if (!shown.includes(row)) {
    $("filter").value = "";
    $("failing").checked = false;
    refresh();
  }
  if (!row.line) more(shown.indexOf(row) + CHUNK);
  hit?.line?.classList.remove("hit");
  hit = row;
  row.line.classList.add("hit");
  $("rows").scrollLeft = 0;
  row.line.scrollIntoView({ block: "center", inline: "nearest" });
  row.line.focus({ preventScroll: true });
}

// ---- start

const PHASES = ["prefill", "decode", "after all"];
const phases = [...new Set(rows.map((row) => row.phase))];
phases.sort((a, b) => rank(PHASES, a) - rank(PHASES, b) || collator.compare(a, b));
for (const phase of phases) $("phase").append(make("option", { value: phase }, phase));
$("phase").addEventListener("change", drawMap);
$("filter").addEventListener("input", refresh);
$("failing").addEventListener("change", refresh);
$("more").addEventListener("click", () => more());
$("first")?.addEventListener("click", () => jump(rows.find((row) => !row.pass)));
drawKey();
drawMap();
drawHead();
refresh();
"""

BODY = """
<h2>Where</h2>
<div class="bar">
<label>Phase <select id="phase"><option value="">all, the worst of them</option></select></label>
<div class="key" id="key"></div>
</div>
<div class="box map"><table id="map" role="grid" aria-label="largest error of each node"></table></div>
<p id="now" class="soft">Point at a cell, or move with the arrow keys; a click or Enter goes to its
row.</p>
<h2>Rows</h2>
<div class="bar">
<label>Filter <input type="search" id="filter" placeholder="layers.2 mlp decode"></label>
<label><input type="checkbox" id="failing"> failing only</label>
<span id="count" class="soft" role="status"></span>
</div>
<div class="box rows" id="rows" tabindex="0" role="region" aria-label="rows">
<table><thead id="head"></thead><tbody id="body"></tbody></table>
<button type="button" class="plain" id="more" hidden></button>
</div>
"""

READING = """
<p><b>How to read it.</b> Each tensor is compared with an oracle of higher precision; “× bf16” is its
largest error over the one that bfloat16 itself makes there (or half a unit in the last place, if that is
larger). A row passes when its largest error is at most twice bfloat16's plus that half unit, and nothing
is NaN or infinite. In local mode every node gets the oracle's inputs, so <b>the first failing row is the
broken node</b>. In free mode errors travel on: look for the earliest layer that fails. There the roots of
mean squares are what is compared, and the experts are the candidate's on all sides. Small charts show
how many elements have which error, from 2<sup>-16</sup> to 2<sup>7</sup> times bfloat16's largest; the
dashed line, at or a little above 2<sup>1</sup>, is the row's limit in local mode. Bars apart from the
hill are single bad elements; a hill that moved to the right as a whole is an error of all of them.</p>
"""


def page(document: dict[str, Any]) -> str:
    """One HTML page of a report: {"pass", "title", "rows", "tokens"}, rows worst first."""
    title = escape(str(document["title"]))
    data = {"rows": _plain(document["rows"]), "most": MOST, "bins": BINS, "mode": document["mode"]}
    # No "<" in the data: neither </script> nor <!-- of a name may end or change its element.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{"pass" if document["pass"] else "FAIL"}: {title}</title>
<style>{STYLE}</style>
</head>
<body>
{_summary(document, title)}
{READING}
<noscript><p>The heat map and the table need JavaScript.</p></noscript>
<main>{BODY}</main>
<script type="application/json" id="data">{text}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _summary(document: dict[str, Any], title: str) -> str:
    """The verdict and its counts: readable without JavaScript."""
    rows = document["rows"]
    nodes = {row["node"] for row in rows}
    failing = {row["node"] for row in rows if not row["pass"]}
    broken = sum(not row["pass"] for row in rows)
    if not rows:
        verdict = "Nothing was compared"
    elif document["pass"]:
        verdict = "✓ Pass: no node differs by more than bfloat16 explains"
    else:
        verdict = "✕ Fail: " + (
            "1 node differs" if len(failing) == 1 else f"{len(failing)} nodes differ"
        )
    facts = [
        ("nodes that fail", f"{len(failing)} of {len(nodes)}"),
        ("rows that fail", f"{broken} of {len(rows)}"),
        ("most likely token", _tokens(document["tokens"])),
    ]
    if broken:
        first = next(row for row in rows if not row["pass"])
        name = escape(f"{first['node']} {first['tensor']}, {first['phase']}")
        facts.insert(
            0,
            ("first failing row", f'<button type="button" class="link" id="first">{name}</button>'),
        )
    listed = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts)
    return f"""<header class="verdict{"" if document["pass"] else " fail"}">
<h1><b>{verdict}</b></h1>
<p class="soft">{title}</p>
</header>
<dl class="facts">{listed}</dl>"""


def _tokens(tokens: dict[str, Any]) -> str:
    if not tokens["compared"]:
        return "not compared"
    text = f"{tokens['equal']} of {tokens['compared']} equal"
    if tokens["first"] is None:
        return text
    text += f"; first other one at {tokens['first']}"
    if tokens["margin"] is not None:
        text += f", where the oracle's logits are {tokens['margin']:.3g} apart"
    return escape(text)


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN, and a browser's parser refuses Python's spellings of them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(MOST, value)
    return value
