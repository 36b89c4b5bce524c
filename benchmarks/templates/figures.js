"use strict";
// Draws figures in the colours that the page has now: light, dark, or those of print.

const root = document.documentElement;

/** A copy of `value` with every "var(--name)" replaced by the page's colour of that name. */
function themed(value, style) {
  if (typeof value === "string") {
    const variable = /^var\((--[a-z0-9-]+)\)$/.exec(value);
    return variable ? style.getPropertyValue(variable[1]).trim() : value;
  }
  if (Array.isArray(value)) return value.map((item) => themed(item, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
}

/** Draws `figure` into the element `id`, as wide as that is. */
function drawFigure(id, figure) {
  const { data, layout } = themed(figure, getComputedStyle(root));
  const width = document.getElementById(id).clientWidth;
  Plotly.react(id, data, { ...layout, width }, { displayModeBar: false });
}

/** Calls `draw` now, and again whenever colours or widths are others: another theme, another window, print and back. */
function keepDrawn(draw) {
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("resize", draw);
  addEventListener("beforeprint", () => {
    root.classList.add("print");
    draw();
  });
  addEventListener("afterprint", () => {
    root.classList.remove("print");
    draw();
  });
}
