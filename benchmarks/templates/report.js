"use strict";
// Draws the figures in the colours that the page has now: light, dark, or those of print.

const figures = JSON.parse(document.getElementById("figures").textContent);
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

function draw() {
  const style = getComputedStyle(root);
  for (const [id, figure] of Object.entries(figures)) {
    const { data, layout } = themed(figure, style);
    const width = document.getElementById(id).clientWidth;
    Plotly.react(id, data, { ...layout, width }, { displayModeBar: false });
  }
}

function drawForPrint() {
  root.classList.add("print");
  draw();
}

function drawForScreen() {
  root.classList.remove("print");
  draw();
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("resize", draw);
addEventListener("beforeprint", drawForPrint);
addEventListener("afterprint", drawForScreen);
