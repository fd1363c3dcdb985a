"use strict";
// The report's interactive figures; needs charts.js and panel.js.

/** Quality against cost, seconds or steps; with room at the right for the longest of the names that
    find a place at their curves' ends. */
function drawQuality(svg, width, placedNames = null) {
  const axis = $("quality-axis").value, name = $("quality-measure").value, m = measure(name);
  const keep = filters();
  const placed = (p) => typeof p[axis] === "number";  // Seconds may not have been measured.
  const points = study.points.filter((p) => p.measure === name && keep(p) && placed(p))
    .sort((a, b) => size(a.model) - size(b.model));
  if (!points.length) return empty(svg, width);
  const all = $("quality-all").checked
    ? study.cells.filter((c) => keep(c) && placed(c) && c.values[name] !== undefined) : [];
  const ends = points.flatMap((p) => [p.value, p.low ?? p.value, p.high ?? p.value]);
  const values = ends.concat(all.map((c) => c.values[name]));
  const log = Math.min(...values) > 0 && Math.max(...values) > 3 * Math.min(...values);
  const [xl, xh] = extent(points.map((p) => p[axis]), true, 0.04);
  const [yl, yh] = extent(values, log);
  const only = [...new Set(points.map((p) => p.sampler))];
  const names = [], room = only.length > 1 ? 0
    : Math.min(Math.max(0, ...(placedNames ?? points.map((p) => p.model)).map((n) => n.length * 8 + 6)),
      0.35 * width);
  const box = { left: 54, right: width - Math.max(width < 560 ? 34 : 44, room), top: 34, bottom: 400 };
  const [sx, sy] = axes(svg, box,
    { low: xl, high: xh, log: true, title: width > 560 ? `${study.axes[axis]} (log scale)` : study.axes[axis].split(" = ")[0],
      ticks: axis === "steps" ? [...new Set(points.map((p) => p.steps))].sort((a, b) => a - b) : null },
    { low: yl, high: yh, log, title: `${width > 560 ? m.label : m.short}, ${m.better} is better` });

  // With some of the samplers, neither one sampler's winners nor those of all are what is shown.
  const whose = only.length === 1 ? only[0] : only.length === study.samplers.length ? "" : null;
  const won = study.winners.find((w) => w.axis === axis && w.sampler === whose);
  if ($("quality-winner").checked && won && name === study.metric) {
    const path = won.budgets.map((b, k) => (k ? `H${sx(b.budget)}V${sy(b.value)}`
      : `M${sx(b.budget)} ${sy(b.value)}`)).join("");
    const id = "clip-quality";
    add(add(svg, "clipPath", { id }), "rect", { x: box.left, y: box.top,
      width: box.right - box.left, height: box.bottom - box.top });
    add(svg, "path", { d: path, fill: "none", stroke: "var(--band)", "stroke-width": 9,
      "stroke-linejoin": "round", opacity: 0.5, "clip-path": `url(#${id})` });
  }
  for (const c of all) {
    add(svg, "circle", { cx: sx(c[axis]), cy: sy(c.values[name]), r: 2.6,
      style: `fill:${colour(c.model)}`, opacity: 0.45 });
  }
  const hits = [];
  for (const curve of groups(points, (p) => `${p.model}\n${p.sampler}`).values()) {
    curve.sort((a, b) => a[axis] - b[axis]);
    const { model, sampler } = curve[0], style = `stroke:${colour(model)}`;
    if ($("quality-ends").checked) {
      const inside = (v) => sy(Math.min(Math.max(v, yl), yh));
      const held = curve.filter((p) => typeof p.band_low === "number");
      if (held.length > 1) {
        const edge = (key) => held.map((p) => `${sx(p[axis])} ${inside(p[key])}`);
        add(svg, "path", { d: `M${[...edge("band_high"), ...edge("band_low").reverse()].join("L")}Z`,
          style: `fill:${colour(model)}`, opacity: 0.13 });
      }
      for (const p of curve.filter((q) => q.low !== null)) {
        add(svg, "line", { x1: sx(p[axis]), x2: sx(p[axis]), y1: sy(p.low), y2: sy(p.high), style,
          "stroke-width": 1.6, opacity: 0.6 });
      }
    }
    add(svg, "path", { d: "M" + curve.map((p) => `${sx(p[axis])} ${sy(p.value)}`).join("L"), style,
      fill: "none", "stroke-width": 2.2, "stroke-dasharray": dash(sampler) });
    for (const p of curve) {
      const x = sx(p[axis]), y = sy(p.value);
      add(svg, "path", { d: mark(model), transform: `translate(${x} ${y})`,
        style: `fill:${colour(model)}`, stroke: "var(--card)", "stroke-width": 1 });
      hits.push({ x, y, point: p, lines: [`${model}, ${label(sampler)}, ${inSteps(p.steps)}`,
        `${m.short} ${number(p.value)}${range(p.low, p.high)}`, `guidance ${p.guidance}`,
        `cost ${number(p.cost)}, ${number(p.seconds)} s per image`] });
    }
    const end = curve[curve.length - 1];
    names.push({ model, x: sx(end[axis]) + 9, y: sy(end.value) + 4 });
  }
  // Of one sampler names stand at the curves' ends, where they fit and cover nothing; else in a key.
  const shown = [];
  for (const { model, x, y } of only.length > 1 ? [] : names) {
    const text = add(svg, "text", { class: "name", x, y }, model), right = x + text.getComputedTextLength();
    const covers = right > width || shown.some((o) => o.x < right && x < o.right && Math.abs(o.y - y) < 15)
      || hits.some((h) => h.x > x - 4 && h.x < right + 4 && h.y > y - 15 && h.y < y + 7);
    if (covers) text.remove(); else shown.push({ model, x, y, right });
  }
  if (!placedNames && only.length === 1 && shown.length < names.length) {
    svg.replaceChildren();
    return drawQuality(svg, width, shown.map((s) => s.model));
  }
  $("quality-key").replaceChildren();
  const key = (style, name, model = null) => {
    const item = document.createElement("span");
    const line = add(item, "svg", { viewBox: "0 -6 42 12", "aria-hidden": "true" });
    add(line, "path", { d: "M0 0H42", stroke: "currentColor", "stroke-width": 2.2, ...style });
    if (model) add(line, "path", { d: mark(model), transform: "translate(21 0)", style: `fill:${colour(model)}` });
    item.append(name);
    $("quality-key").append(item);
  };
  for (const s of only.length > 1 ? only : []) key({ "stroke-dasharray": dash(s) }, label(s));
  for (const model of shown.length < names.length ? new Set(names.map((n) => n.model)) : []) {
    key({ style: `stroke:${colour(model)}` }, model, model);
  }
  return { height: 452, hits };
}

/** Which size wins at each budget: probabilities stacked by size. */
function drawWinners(svg, width) {
  const axis = $("winner-axis").value, sampler = $("winner-sampler").value;
  const won = study.winners.find((w) => w.axis === axis && w.sampler === sampler);
  if (!won) return empty(svg, width, "No reported records for this choice yet.");
  const m = measure(study.metric), budgets = won.budgets;
  const high = budgets[budgets.length - 1].budget * 1.2;
  const box = { left: 54, right: width - 8, top: 34, bottom: 290 };
  const edges = budgets.map((b) => b.budget).concat(high);
  // Without replicates it is known which size is best, and not how surely.
  const known = (b) => b.contenders.every((c) => c.probability !== null), some = budgets.some(known);
  const [sx, sy] = axes(svg, box,
    { low: edges[0], high, log: true,
      title: width > 560 ? `budget: the most an image may cost (${won.unit}, log scale)` : `budget (${won.unit})` },
    { low: 0, high: 1, ticks: some ? [0, 0.25, 0.5, 0.75, 1] : [],
      title: some ? "probability of being the best" : "best at each budget (no replicates)" });
  const hits = [];
  budgets.forEach((b, k) => {
    const x = sx(edges[k]), wide = Math.max(sx(edges[k + 1]) - x, 1);
    const pale = some && !known(b);
    let base = 0;
    for (const c of b.contenders) {
      const share = c.probability ?? (c.model === b.best ? 1 : 0);
      if (share > 0) {
        add(svg, "rect", { x, width: wide + (pale ? 0 : 0.4), y: sy(base + share),
          height: sy(base) - sy(base + share), style: `fill:${colour(c.model)}`,
          opacity: pale ? 0.45 : 1, "shape-rendering": "crispEdges" });
      }
      base += share;
    }
    if (!b.complete) {
      add(svg, "rect", { x, width: wide + 0.4, y: box.top, height: box.bottom - box.top,
        fill: "url(#hatch)" });
    }
    const lines = [`Up to ${number(b.budget)}${axis === "seconds" ? " s" : ""}: ${b.best}`];
    for (const c of [...b.contenders].sort((p, q) => (q.probability ?? 0) - (p.probability ?? 0))) {
      const likely = c.probability === null ? "" : `, ${sure(c.probability)}`;
      lines.push(`${c.model}: ${m.short} ${number(c.value)}${range(c.low, c.high)}${likely}`
        + ` (${sampler ? "" : `${label(c.sampler)}, `}${inSteps(c.steps)})`);
    }
    if (!b.complete) lines.push("not every size can afford an image");
    hits.push({ x: x + wide / 2, y: (box.top + box.bottom) / 2, lines,
      box: { x, y: box.top, width: wide, height: box.bottom - box.top } });
  });
  let k = 0;
  while (k < budgets.length) {
    let end = k;
    while (end + 1 < budgets.length && budgets[end + 1].best === budgets[k].best) end++;
    const left = sx(edges[k]), right = sx(edges[end + 1]);
    if (right - left > 34) {
      shorten(add(svg, "text", { x: (left + right) / 2, y: (box.top + box.bottom) / 2,
        "text-anchor": "middle",
        style: "fill:#fff;stroke:#1a212b;stroke-width:3px;paint-order:stroke;font-weight:700" },
      budgets[k].best), right - left);
    }
    k = end + 1;
  }
  return { height: 340, hits };
}

/** A colour of the page's ordered map; t in 0..1. */
function heat(t) {
  const stops = study.ramp, at = Math.max(0, Math.min(0.9999, t)) * (stops.length - 1);
  const k = Math.floor(at), f = at - k;
  return stops[k].map((v, n) => Math.round(v + (stops[k + 1][n] - v) * f));
}

/** Of white and the page's dark ink that which has more contrast (WCAG 2) with a colour. */
function inkOn(rgb) {
  const light = (colour) => colour.map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0.05);
  return 1.05 / light(rgb) > light(rgb) / light([26, 33, 43]) ? "#fff" : "#1a212b";
}

/** Guidance x steps, one panel per size and one row of panels per sampler. */
function drawHeat(svg, width) {
  const name = $("heat-measure").value, m = measure(name), keep = filters();
  const cells = study.cells.filter((c) => keep(c) && c.values[name] !== undefined);
  if (!cells.length) return empty(svg, width);
  const values = cells.map((c) => c.values[name]);
  const log = Math.min(...values) > 0;
  const shade = scale(Math.min(...values), Math.max(...values), 0, 1, log);
  const rates = [...new Set(cells.map((c) => c.guidance))].sort((a, b) => b - a);
  const models = study.models.map((p) => p.name).filter((n) => cells.some((c) => c.model === n));
  const hits = [];
  let top = 8;
  for (const { name: sampler, label: title } of study.samplers) {
    const row = cells.filter((c) => c.sampler === sampler);
    if (!row.length) continue;
    const steps = [...new Set(row.map((c) => c.steps))].sort((a, b) => a - b);
    const contest = new Set(row.map((c) => c.guidance)).size > 1;  // One rate is not the best of any.
    const across = Math.max(1, Math.min(models.length, Math.floor((width - 40) / (steps.length * 34))));
    const side = Math.min(46, (width - 44 - across * 12) / (across * steps.length)), tall = 30;
    add(svg, "text", { class: "name", x: 0, y: top + 14 }, title);
    top += 24;
    models.forEach((model, n) => {
      const left = 42 + (n % across) * (steps.length * side + 12);
      const up = top + Math.floor(n / across) * (rates.length * tall + 52) + 20;
      shorten(add(svg, "text", { class: "name", x: left, y: up - 7 }, model),
        across > 1 ? steps.length * side : width - left);
      rates.forEach((w, j) => {
        if (n % across === 0) {
          add(svg, "text", { x: left - 7, y: up + (j + 0.65) * tall, "text-anchor": "end" }, String(w));
        }
      });
      steps.forEach((s, i) => add(svg, "text", { x: left + (i + 0.5) * side,
        y: up + rates.length * tall + 15, "text-anchor": "middle" }, String(s)));
      for (const c of row.filter((p) => p.model === model)) {
        const best = contest && c.best[name];
        const t = shade(c.values[name]), rgb = heat(m.better === "lower" ? 1 - t : t);
        const x = left + steps.indexOf(c.steps) * side, y = up + rates.indexOf(c.guidance) * tall;
        add(svg, "rect", { x: x + 0.75, y: y + 0.75, width: side - 1.5, height: tall - 1.5, rx: 3,
          fill: `rgb(${rgb})` });
        const text = brief(c.values[name]), font = Math.min(11, (1.5 * side) / text.length);
        add(svg, "text", { x: x + side / 2, y: y + tall / 2 + 4, "text-anchor": "middle",
          style: `font-size:${font}px;fill:${inkOn(rgb)};font-weight:${best ? 700 : 400}` }, text);
        const frame = { x: x + 1, y: y + 1, width: side - 2, height: tall - 2, rx: 3 };
        if (best) {
          add(svg, "rect", { ...frame, fill: "none", stroke: "var(--frame)", "stroke-width": 2.2 });
        }
        hits.push({ x: x + side / 2, y: y + tall / 2, box: frame, lines: [
          `${model}, ${title}, ${inSteps(c.steps)}`, `guidance ${c.guidance}${best ? " (best)" : ""}`,
          ...study.measures.filter((q) => c.values[q.name] !== undefined)
            .map((q) => `${q.short} ${number(c.values[q.name])}`)] });
      }
    });
    top += Math.ceil(models.length / across) * (rates.length * tall + 52);
  }
  add(svg, "text", { x: 0, y: top + 14 }, "columns: sampling steps; rows: guidance rate");
  return { height: top + 22, hits };
}

/** The two measures against each other as guidance rises. */
function drawTrade(svg, width) {
  const keep = filters(), [a, b] = study.trade.map(measure), wanted = Number($("trade-steps").value);
  const cells = study.cells.filter((c) => keep(c) && c.steps === wanted
    && c.values[a.name] !== undefined && c.values[b.name] !== undefined);
  if (!cells.length) return empty(svg, width, "Nothing to draw: switch this step count on in the filters.");
  const [xl, xh] = extent(cells.map((c) => c.values[b.name]), false);
  const [yl, yh] = extent(cells.map((c) => c.values[a.name]), false);
  const box = { left: 54, right: width - 20, top: 34, bottom: 360 };
  const [sx, sy] = axes(svg, box,
    { low: xl, high: xh, title: `${b.label}, ${b.better} is better` },
    { low: yl, high: yh, title: `${width > 560 ? a.label : a.short}, ${a.better} is better` });
  const hits = [];
  for (const line of groups(cells, (c) => `${c.model}\n${c.sampler}`).values()) {
    line.sort((p, q) => p.guidance - q.guidance);
    const { model, sampler } = line[0], at = (c) => [sx(c.values[b.name]), sy(c.values[a.name])];
    add(svg, "path", { d: "M" + line.map((c) => at(c).join(" ")).join("L"), fill: "none",
      style: `stroke:${colour(model)}`, "stroke-width": 2, "stroke-dasharray": dash(sampler) });
    line.forEach((c, k) => {
      const [x, y] = at(c);
      add(svg, "path", { d: mark(model), transform: `translate(${x} ${y})`,
        style: `fill:${colour(model)}`, stroke: "var(--card)", "stroke-width": 1 });
      if (k === 0 || k === line.length - 1) {
        add(svg, "text", { x: x + 7, y: y - 7, style: "font-size:11px" }, String(c.guidance));
      }
      hits.push({ x, y, lines: [`${model}, ${label(sampler)}, ${inSteps(c.steps)}`,
        `guidance ${c.guidance}`, `${a.short} ${number(c.values[a.name])}`,
        `${b.short} ${number(c.values[b.name])}`] });
    });
  }
  return { height: 412, hits };
}

/** The pictures of a point; afterwards the chart marks the last that was looked at. */
const openPoint = (hits, k, show) => panel(hits.map((hit) => hit.point), k, show);

const drawings = { quality: drawQuality, winner: drawWinners, heat: drawHeat, trade: drawTrade };
const redraw = {};
for (const [name, draw] of Object.entries(drawings)) {
  if ($(`${name}-chart`)) {
    redraw[name] = chart($(`${name}-chart`), draw, name === "quality" ? openPoint : null);
  }
}
for (const name of Object.keys(redraw)) {
  for (const control of document.querySelectorAll(`[id^="${name}-"]`)) {
    control.addEventListener("change", redraw[name]);
  }
}
for (const input of document.querySelectorAll(".filters input")) {
  input.addEventListener("change", () => Object.values(redraw).forEach((f) => f()));
}
