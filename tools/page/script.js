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
const range = (first, end) => (end - first === 1 ? `${first}` : `${first}–${end - 1}`);
const pass = (row) => (row.span.length ? range(...row.span) : "–");
const token = (row) => row.position ?? "–";
const channel = (row) => (row.channel.length === 1 ? row.channel[0] : list(row.channel));
const size = (row) => row.shape.reduce((product, length) => product * length, 1);
const flips = (row) => (row.flips ? `${row.flips} (≤ ${number(row.margin)})` : "0");
const says = (row) => (row.pass ? "pass" : "✕ fail");
const full = (row) => `${row.node} ${row.tensor}, ${row.phase}`;
const at = (row) =>
  (row.worst.length ? `, worst at token ${token(row)}, channel ${channel(row)}` : "");
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
        cell.title = `${full(row)}: ${times(row)}, ${row.pass ? "pass" : "fail"}${at(row)}`;
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
  showFailing(columns, body);
}

// On a narrow screen the first columns are often whole: begin with the leftmost one that fails.
function showFailing(columns, body) {
  const failing = (i) => [...body.rows].some((line) => line.cells[i + 1].classList.contains("fail"));
  const first = columns.findIndex((_, i) => failing(i));
  const cell = body.rows[0]?.cells[first + 1];
  if (first < 0 || !cell) return;
  const box = $("map").parentElement;
  const names = body.rows[0].cells[0].offsetWidth; // the column that stays in place
  const hidden = cell.offsetLeft + cell.offsetWidth > box.clientWidth;
  box.scrollLeft = hidden ? cell.offsetLeft - names - 2 * cell.offsetWidth : 0;
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
  ["× bf16", "number", (row) => row.x_bf16, (row) => number(row.x_bf16), true],
  ["node", "node", (row) => row.node, name, false],
  ["tensor", "", (row) => row.tensor, (row) => row.tensor, false],
  ["phase", "", (row) => row.phase, (row) => row.phase, false],
  ["token", "number", (row) => row.position ?? -1, token, false,
    "position in the sequence of the largest error; a recurrent state has none"],
  ["channel", "number", (row) => row.channel.join("."), channel, false,
    "of the largest error; that of a head first; a router's is an expert, that of logits a token"],
  ["errors", "", (row) => row.histogram.findLastIndex((n) => n > 0), chart, true,
    "elements by error: 2^-16 to 2^7 times bf16's largest, heights logarithmic, dashed: limit"],
  ["max |error|", "number", (row) => row.max_abs, (row) => number(row.max_abs), true],
  ["rel RMS", "number", (row) => row.rel_rms, (row) => number(row.rel_rms), true],
  ["pass", "number", (row) => row.span[0] ?? -1, pass, false,
    "tokens of the pass with the largest error"],
  ["shape", "", size, (row) => list(row.shape), true, "of the tensor in that pass"],
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
