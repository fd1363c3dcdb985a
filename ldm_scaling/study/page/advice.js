"use strict";
// The advice: what `ldm-scaling advise` says at the budget that is chosen. Looked up, not computed:
// the page carries every budget at which it changes. Needs charts.js and panel.js.
if (study.advice.length) {
  const TICKS = 400;
  const slider = $("advice-slider"), amount = $("advice-amount"), unit = $("advice-unit");
  let of, low, high, budget;

  const whole = (v) => Number(v.toPrecision(3));
  const written = (v) => `${v} ${of.written}`;
  const share = (v) => Math.log(v / low) / Math.log(high / low);
  /** The least amount of 5 digits that pays for a cost: typed, it buys what it is written at. */
  const enough = (v) => {
    const near = Number(v.toPrecision(5));
    if (near * (1 + 1e-9) >= v) return near;
    return Number((near + 10 ** (Math.floor(Math.log10(v)) - 4)).toPrecision(5));
  };
  const spent = (p) => written(enough(p.cost));
  const reached = (p) => `${of.measure} ${number(p.value)}${range(p.low, p.high)}`;

  const lead = ({ advantage: [by, least, most] }) => (by < 0
    ? `is behind by ${number(-by)}${range(-most, -least)}`
    : `leads by ${number(by)}${range(least, most)}`);

  /** The piece that holds for a budget, or nothing below the cheapest. A budget that is just what
      something costs pays for it, whatever rounding says. */
  const at = (v) => of.pieces.filter((piece) => piece.from <= v * (1 + 1e-9)).at(-1);

  function choice(term, p, ...lines) {
    const box = element($("advice-result"), "div");
    element(box, "dt", term);
    const what = element(box, "dd");
    const head = element(what, "b");
    const key = add(head, "svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" });
    const style = foreign(p) ? `fill:none;stroke-width:2;stroke:${colour(p.model)}`
      : `fill:${colour(p.model)}`;
    add(key, "path", { d: mark(p.model), style });
    head.append(settings(p));
    for (const line of lines) element(what, "div", line);
    return box;
  }

  function front(affordable) {
    const body = $("advice-front").tBodies[0];
    body.replaceChildren();
    for (const p of affordable) {
      const row = element(body, "tr");
      for (const [text, kind] of [[enough(p.cost)], [named(p), "word"], [p.label, "word"],
        [p.steps], [p.guidance], [number(p.value)], [range(p.low, p.high).trim(), "word"]]) {
        element(row, "td", text, kind ? { class: kind } : {});
      }
    }
  }

  /** Which size is advised where, and the budget. */
  function band() {
    const svg = $("advice-band"), width = svg.clientWidth;
    svg.replaceChildren();
    // Paper is narrower than the window that this is drawn for.
    svg.setAttribute("viewBox", `0 0 ${width} 30`);
    svg.setAttribute("preserveAspectRatio", "none");
    const x = (v) => share(v) * width;
    let k = 0;
    while (k < of.pieces.length) {
      const best = of.points[of.pieces[k].best], name = named(best), left = x(of.pieces[k].from);
      while (k < of.pieces.length && named(of.points[of.pieces[k].best]) === name) k++;
      const right = k < of.pieces.length ? x(of.pieces[k].from) : width;
      add(svg, "rect", { x: left, y: 4, width: right - left, height: 22,
        style: `fill:${colour(best.model)}`, class: foreign(best) ? "foreign" : "own" });
      if (right - left > 9 * name.length + 6) {
        add(svg, "text", { x: (left + right) / 2, y: 20, "text-anchor": "middle" }, name);
      }
    }
    const now = Math.min(Math.max(x(budget), 1), width - 1);
    add(svg, "line", { class: "now", x1: now, x2: now, y1: 0, y2: 30 });
  }

  function draw() {
    const piece = at(budget), result = $("advice-result");
    const affordable = of.front.map((k) => of.points[k]).filter((p) => p.cost <= budget * (1 + 1e-9));
    const notes = [];
    result.replaceChildren();
    $("advice-budget").textContent = `Budget: ${written(budget)}`;
    $("advice-images").disabled = !piece;
    if (piece) {
      const best = of.points[piece.best], next = of.points[piece.runner_up];
      choice("Take", best, `expect ${reached(best)}`, `at ${spent(best)}`);
      if (next) {
        choice("Runner-up", next, `${reached(next)} at ${spent(next)}`,
          piece.probability === null ? "how probably it is better is not known (no replicates)"
            : `better with probability ${sure(piece.probability).slice(2)}; the first ${lead(piece)}`);
      }
      notes.push(...piece.notes);
      if (budget > of.points.at(-1).cost) notes.push(...of.beyond);
      slider.setAttribute("aria-valuetext", `${written(budget)}: ${settings(best)}`);
    } else {
      const least = of.points[0];
      notes.push(`Below range: the cheapest that was measured is ${settings(least)}, ${spent(least)}.`);
      slider.setAttribute("aria-valuetext", `${written(budget)}: below range`);
    }
    $("advice-range").textContent = notes.join(" ");
    $("advice-command").textContent = ["ldm-scaling advise --records=DIR",
      ...of.flags, `--budget="${written(budget)}"`].join(" ");
    front(affordable);
    band();
  }

  function set(value) {
    budget = value;
    slider.value = Math.round(Math.min(Math.max(share(value), 0), 1) * TICKS);
    amount.value = value;
    draw();
  }
  function choose() {
    of = study.advice.find((u) => u.unit === unit.value);
    [low, high] = [of.points[0].cost / 1.5, of.points.at(-1).cost * 1.5];
    $("advice-label").textContent = of.label;
    for (const head of document.querySelectorAll(".advice-written")) head.textContent = of.written;
    $("advice-notes").textContent = of.notes.join(" ");
    set(Math.max(whole(Math.sqrt(low * high)), enough(of.points[0].cost)));
  }

  slider.max = TICKS;
  const slide = (tick) => set(whole(low * (high / low) ** (tick / TICKS)));
  slider.addEventListener("input", () => slide(slider.value));
  // Where a typed amount is beyond an end, the knob is at that end already and no input follows.
  slider.addEventListener("keydown", ({ key }) => {
    if (key === "Home" || key === "End") slide(key === "Home" ? 0 : TICKS);
  });
  // What is no budget gives way to the one that the advice is for.
  amount.addEventListener("change", () => set(Number(amount.value) > 0 ? Number(amount.value) : budget));
  unit.addEventListener("change", choose);
  $("advice-images").addEventListener("click", () => {
    const points = [...new Set([...of.front, at(budget).best])].map((k) => of.points[k])
      .filter((p) => p.cost <= budget * (1 + 1e-9));
    const shown = points.map((p) => ({ ...p, facts: `${reached(p)} · ${spent(p)}` }));
    panel(shown, points.indexOf(of.points[at(budget).best]));
  });
  new ResizeObserver(() => requestAnimationFrame(band)).observe($("advice-band").parentElement);
  choose();
}
