"use strict";
// The panel: one configuration in words, and the pictures that it drew. Needs charts.js.
const kept = JSON.parse($("study-images").textContent);
/** A point of the advice may be of another task than the page: it brings its name and its facts. */
const named = (p) => p.name || p.model;
const foreign = (p) => named(p) !== p.model || study.models.every((m) => m.name !== p.model);
const settings = (p) =>
  `${named(p)}, ${p.label || label(p.sampler)}, ${inSteps(p.steps)}, guidance ${p.guidance}`;

function element(parent, tag, text = null, attributes = {}) {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

const panel = (() => {
  const dialog = $("panel");
  let points = [], at = 0, closed = () => {};

  /** What was measured at this configuration, all measures. */
  function facts(p) {
    if (foreign(p)) return p.facts;
    const same = study.points.filter((q) =>
      q.model === p.model && q.sampler === p.sampler && q.steps === p.steps);
    const { cost, seconds } = same[0];
    return [...same.map((q) => `${measure(q.measure).short} ${number(q.value)}${range(q.low, q.high)}`),
      `cost ${number(cost)}`, `${number(seconds)} s per image`].join(" · ");
  }
  function show(k) {
    at = (k + points.length) % points.length;
    const p = points[at], shown = kept.points[[named(p), p.sampler, p.steps].join("\n")] || [];
    $("panel-title").textContent = settings(p);
    $("panel-facts").textContent = facts(p);
    $("panel-place").textContent = `${at + 1} of ${points.length}`;
    $("panel-images").replaceChildren();
    shown.forEach((src, n) => {
      const figure = element($("panel-images"), "figure"), caption = kept.captions[n];
      element(figure, "img", null, { src, alt: caption || `picture ${n + 1}` });
      if (caption) element(figure, "figcaption", caption, { "aria-hidden": "true" });
    });
    $("panel-note").textContent = shown.length
      ? `The same captions and noise at every point. ${kept.note}`
      : kept.note || "No images were kept of this point.";
  }

  $("panel-before").addEventListener("click", () => show(at - 1));
  $("panel-after").addEventListener("click", () => show(at + 1));
  $("panel-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    show(at + move);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => closed(at));

  /** Opens it at the k-th of some points; `onClose(k)` hears of the last that was shown. Escape
      closes it, as every dialog. */
  return function open(some, k, onClose = () => {}) {
    [points, closed] = [some, onClose];
    dialog.showModal();
    show(k);
  };
})();
