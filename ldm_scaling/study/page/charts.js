"use strict";
// The interactive charts of the report: drawn as SVG from the data that the page carries.
const study = JSON.parse(document.getElementById("study-data").textContent);
const NAMESPACE = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 4", "2 4", "9 3 2 3", "12 5", "4 2"];
const MARKS = [
  "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z", "M-4.4-4.4H4.4V4.4H-4.4Z", "M0-6.2L5.2 0L0 6.2L-5.2 0Z",
  "M0-5.6L5.6 4.6H-5.6Z", "M0 5.6L5.6-4.6H-5.6Z", "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
  "M-6-3L-3-6L0-3L3-6L6-3L3 0L6 3L3 6L0 3L-3 6L-6 3L-3 0Z",
  "M0-6.5L1.9-2.2L6.4-2L2.9 1.1L4 5.6L0 3.2L-4 5.6L-2.9 1.1L-6.4-2L-1.9-2.2Z",
];
const $ = (id) => document.getElementById(id);
const size = (model) => {
  const at = (name) => study.models.findIndex((m) => m.name === name);
  // A cascade of which the page is not about has the colour of its second network.
  return at(model) < 0 ? Math.max(at(model.split("+").at(-1)), 0) : at(model);
};
const colour = (model) => `var(--size-${size(model)})`;
const mark = (model) => MARKS[size(model) % MARKS.length];
const dash = (sampler) => DASHES[study.samplers.findIndex((s) => s.name === sampler) % DASHES.length];
const label = (sampler) => (study.samplers.find((s) => s.name === sampler) || { label: "any sampler" }).label;
const inSteps = (n) => `${n} step${n === 1 ? "" : "s"}`;
const measure = (name) => study.measures.find((m) => m.name === name);

function number(v, beside = 0) {
  if (v === null || v === undefined) return "–";
  const place = (u) => Number(u.toExponential(2).split("e")[1]);
  const most = place(Math.max(Math.abs(v), Math.abs(beside)));
  if (!v) return "0";
  if (most < -6 || most >= 9) return v.toExponential(2).replace("+", "");
  const text = v.toFixed(Math.max(0, 2 - Math.max(place(v), most - 4)));
  return Number(text) ? text : "0";
}
/** The same in few letters: 242k, 2.4e-5. */
function brief(v) {
  const a = Math.abs(v);
  if (a && a < 0.001) return v.toExponential(1);
  if (a < 9999.5) return number(v);
  const [, scale, unit] = [[999.5e6, 1e9, "B"], [999.5e3, 1e6, "M"], [0, 1e3, "k"]]
    .find(([least]) => a >= least);
  return `${Number((v / scale).toPrecision(3))}${unit}`;
}
/** What stands at an axis's ticks: all with an exponent where the largest is tiny or huge. */
function tickTexts(values) {
  const most = Math.max(...values.map(Math.abs));
  const tiny = most > 0 && (most < 1e-4 || most >= 1e7);
  return values.map((v) => (tiny && v ? v.toExponential().replace("+", "") : String(v)));
}
const sure = (p) => (p > 0.99 ? "p above 0.99" : p < 0.01 ? "p below 0.01" : `p ${p.toFixed(2)}`);
const range = (low, high) => (low === null ? "" : ` [${number(low, high)}, ${number(high, low)}]`);

function add(parent, tag, attributes = {}, text = null) {
  const node = document.createElementNS(NAMESPACE, tag);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

/** Cuts a text's end where it is longer than its room. */
function shorten(text, room) {
  const whole = text.textContent;
  for (let n = whole.length - 1; n > 0 && text.getComputedTextLength() > room; n--) {
    text.textContent = `${whole.slice(0, n)}…`;
  }
}

function scale(low, high, from, to, log) {
  const f = log ? Math.log : (v) => v;
  const span = f(high) - f(low) || 1;
  return (v) => from + ((f(v) - f(low)) / span) * (to - from);
}

function ticks(low, high, log, room) {
  const out = [];
  if (log && high >= 3 * low) {  // Below, even steps look even enough, and some are always there.
    const subs = high / low > 3000 ? [1] : high / low < 8 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : [1, 2, 5];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
      for (const s of subs) {
        const v = s * 10 ** e;
        if (v >= low * 0.999 && v <= high * 1.001) out.push(Number(v.toPrecision(3)));
      }
    }
    return out;
  }
  const raw = (high - low) / Math.max(room, 2);
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((s) => s * unit).find((s) => s >= raw);
  for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) {
    out.push(Number(v.toPrecision(6)));
  }
  return out;
}

function extent(values, log, pad = 0.05) {
  let low = Math.min(...values), high = Math.max(...values);
  if (log) { const f = (high / low || 2) ** pad * 1.02; return [low / f, high * f]; }
  const room = (high - low || Math.abs(high) || 1) * pad;
  return [low - room, high + room];
}

/** Axes with gridlines and titles; returns the two scales. `x` and `y`: {low, high, log, title}. */
function axes(svg, box, x, y) {
  const sx = scale(x.low, x.high, box.left, box.right, x.log);
  const sy = scale(y.low, y.high, box.bottom, box.top, y.log);
  let last = -99;
  const across = x.ticks || ticks(x.low, x.high, x.log, (box.right - box.left) / 80);
  const up = y.ticks || ticks(y.low, y.high, y.log, (box.bottom - box.top) / 50);
  const acrossTexts = tickTexts(across), upTexts = tickTexts(up);
  across.forEach((v, k) => {
    add(svg, "line", { class: "gridline", x1: sx(v), x2: sx(v), y1: box.top, y2: box.bottom });
    if (sx(v) - last < 30) return;
    last = sx(v);
    add(svg, "text", { x: sx(v), y: box.bottom + 17, "text-anchor": "middle" }, acrossTexts[k]);
  });
  up.forEach((v, k) => {
    add(svg, "line", { class: "gridline", x1: box.left, x2: box.right, y1: sy(v), y2: sy(v) });
    add(svg, "text", { x: box.left - 7, y: sy(v) + 4, "text-anchor": "end" }, upTexts[k]);
  });
  const middle = (box.left + box.right) / 2;
  if (x.title) add(svg, "text", { x: middle, y: box.bottom + 38, "text-anchor": "middle" }, x.title);
  if (y.title) add(svg, "text", { x: 0, y: box.top - 12 }, y.title);
  return [sx, sy];
}

/**
 * Keeps a chart drawn in `host`: `draw(svg, width)` returns its height and its hits, places
 * {x, y, lines} that the pointer, a touch or the arrow keys can visit. Where there is `open`, a
 * click or Enter on the k-th of them calls `open(hits, k, show)`; `show(k)` marks another.
 */
function chart(host, draw, open = null) {
  // An application: screen readers leave the arrow keys to it.
  const svg = add(host, "svg", { role: "application", tabindex: 0, "aria-roledescription": "chart",
    "aria-label": host.dataset.label });
  if (open) host.classList.add("opens");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");
  host.append(tip);
  let hits = [], at = -1, ring = null;

  function show(k) {
    at = k;
    if (ring) ring.remove();
    ring = null;
    tip.hidden = k < 0;
    if (k < 0) return;
    const hit = hits[k];
    tip.replaceChildren();
    hit.lines.forEach((line, n) => {
      const row = document.createElement(n ? "div" : "b");
      row.textContent = line;
      tip.append(row);
    });
    ring = hit.box ? add(svg, "rect", { class: "ring", ...hit.box })
                   : add(svg, "circle", { class: "ring", cx: hit.x, cy: hit.y, r: 9 });
    const beside = hit.x + 16 + tip.offsetWidth > host.clientWidth;
    const left = beside ? hit.x - tip.offsetWidth - 16 : hit.x + 16;
    tip.style.left = `${Math.max(0, Math.min(left, host.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, hit.y - tip.offsetHeight / 2)}px`;
  }
  function visit(event) {
    const frame = svg.getBoundingClientRect();
    const px = event.clientX - frame.left, py = event.clientY - frame.top;
    let best = -1, least = Infinity;
    hits.forEach((hit, k) => {
      const inside = hit.box && px >= hit.box.x && px <= hit.box.x + hit.box.width
        && py >= hit.box.y && py <= hit.box.y + hit.box.height;
      const far = hit.box ? (inside ? 0 : Infinity) : Math.hypot(px - hit.x, py - hit.y);
      if (far < least && far < 36) { least = far; best = k; }
    });
    show(best);
  }
  svg.addEventListener("pointermove", visit);
  svg.addEventListener("pointerdown", visit);
  // A finger that is lifted leaves too, and has only now said what it wants to see.
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show(-1); });
  svg.addEventListener("blur", () => show(-1));
  svg.addEventListener("click", (event) => {
    visit(event);
    if (open && at >= 0) open(hits, at, show);
  });
  svg.addEventListener("keydown", (event) => {
    if (open && at >= 0 && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      open(hits, at, show);
    }
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") show(-1);
    if (!move || !hits.length) return;
    event.preventDefault();
    show((at + move + hits.length) % hits.length);
  });
  function redraw() {
    const width = host.clientWidth;
    if (!width) return;
    show(-1);
    svg.replaceChildren();
    const made = draw(svg, width);
    hits = made.hits;
    svg.setAttribute("viewBox", `0 0 ${width} ${made.height}`);
    svg.setAttribute("height", made.height);
    svg.dataset.points = hits.length;
  }
  let known = 0;
  new ResizeObserver(() => {
    if (host.clientWidth === known) return;
    known = host.clientWidth;
    // In the next frame: drawn here, the chart's new height would be reported as a console error.
    requestAnimationFrame(redraw);
  }).observe(host);
  return redraw;
}

function empty(svg, width, text = "Nothing is left to draw: switch a filter on again.") {
  add(svg, "text", { x: width / 2, y: 60, "text-anchor": "middle" }, text);
  return { height: 120, hits: [] };
}

const chosen = (name) =>
  new Set([...document.querySelectorAll(`.filters input[name="${name}"]:checked`)].map((i) => i.value));
function filters() {
  const models = chosen("model"), samplers = chosen("sampler"), steps = chosen("steps");
  return (p) => models.has(p.model) && samplers.has(p.sampler) && steps.has(String(p.steps));
}
function groups(points, key) {
  const out = new Map();
  for (const p of points) {
    const k = key(p);
    if (!out.has(k)) out.set(k, []);
    out.get(k).push(p);
  }
  return out;
}
