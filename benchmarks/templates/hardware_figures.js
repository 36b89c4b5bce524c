// What the hardware comparison draws, of the rows that are shown. Colour is precision, symbol and dash are what ran it.

const COLOURS = { int8: "var(--int8)", fp32: "var(--fp32)", bf16: "var(--half)", fp16: "var(--half)" };
const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "star", "cross", "triangle-down", "hexagon", "x", "pentagon"];
const SIGNS = "●◆■▲★✚▼⬢✖⬟"; // the same, as text
const DASHES = ["solid", "dot", "dash", "longdash", "dashdot", "longdashdot"];
const NUM_CURVES = 6;
const waiting = new Map(); // figures that are not drawn yet, by the id of their place
const inSight = new Set();

/** A row's name, and that it is not to be believed. */
const nameOf = (row) => row.label + (row.valid ? "" : " (not valid)");
/** plotly reads tags in any text. */
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const short = (text, most) => (text.length > most ? `${text.slice(0, most - 9)}…${text.slice(-8)}` : text);
const colourOf = (row) => COLOURS[row.precision] ?? "var(--other)";
const figureOf = (value) => (value >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(3));
const isNarrow = () => innerWidth < 640;
const axis = (title, more = {}) => ({ ...data.axis, ...more, title: { ...data.axis.title, text: title } });
const layout = (more) => ({ ...data.layout, ...more });

/** Ticks in plain figures; `margin` is left free on either side, as a share of the span, for labels. */
function logAxis(title, values, margin) {
  const [low, high] = [Math.log10(Math.min(...values)), Math.log10(Math.max(...values))];
  const free = margin * Math.max(high - low, 0.3);
  const digits = high - low < 1.2 ? [1, 1.5, 2, 3, 5, 7] : high - low < 3 ? [1, 3] : [1];
  const ticks = [];
  for (let decade = Math.floor(low - free); decade <= Math.ceil(high + free); decade += 1)
    ticks.push(...digits.map((digit) => digit * 10 ** decade));
  return axis(title, {
    type: "log",
    range: [low - free, high + free],
    tickvals: ticks,
    ticktext: ticks.map((tick) => String(Number(tick.toPrecision(3)))),
  });
}

/** Draws, or says why there is nothing to draw. What is out of sight is drawn when it comes into it. */
function put(id, figure, otherwise, said) {
  const plot = byId(id);
  plot.hidden = !figure;
  plot.nextElementSibling.hidden = Boolean(figure);
  plot.nextElementSibling.textContent = otherwise;
  waiting.delete(id);
  if (!figure) return;
  plot.setAttribute("aria-label", said);
  plot.style.minHeight = `${figure.layout.height}px`;
  waiting.set(id, figure);
  if (inSight.has(id) || root.classList.contains("print")) paint(id);
}

function paint(id) {
  const figure = waiting.get(id);
  waiting.delete(id);
  if (figure) drawFigure(id, figure);
}

function look(entries) {
  for (const { target, isIntersecting } of entries) {
    inSight[isIntersecting ? "add" : "delete"](target.id);
    if (isIntersecting) paint(target.id);
  }
}

function symbolsOf(shown) {
  return shown.map((row) => SYMBOLS[groups.indexOf(row.group) % SYMBOLS.length] + (row.valid ? "" : "-open"));
}

/** One trace a group of configurations, each with a symbol of its own. */
function markers(shown, x, y, more, colour = colourOf) {
  return groups
    .map((group) => [group, shown.filter((row) => row.group === group)])
    .filter(([, members]) => members.length > 0)
    .map(([group, members]) => ({
      type: "scatter",
      mode: "markers",
      name: plain(group),
      x: members.map(x),
      y: members.map(y),
      customdata: members.map((row) => [plain(row.label), row.valid ? "" : "<br><b>not valid</b>"]),
      cliponaxis: false,
      marker: {
        size: 10,
        symbol: symbolsOf(members),
        color: members.map(colour),
        line: { width: 1.5, color: members.map(colour) },
      },
      showlegend: false, // the page has one key of symbols for all figures
      ...more(members),
    }));
}

function latencyFigure(shown) {
  const fastest = new Map();
  for (const row of shown) fastest.set(row.model, Math.min(row.p50, fastest.get(row.model) ?? Infinity));
  const models = [...fastest.keys()].sort((a, b) => fastest.get(b) - fastest.get(a));
  const ends = shown.flatMap((row) => [row.p50, ...(row.ci ?? [])]);
  return {
    data: markers(
      shown,
      (row) => row.p50,
      (row) => models.indexOf(row.model),
      (members) => ({
        error_x: {
          type: "data",
          symmetric: false,
          array: members.map((row) => (row.ci ? row.ci[1] - row.p50 : null)),
          arrayminus: members.map((row) => (row.ci ? row.p50 - row.ci[0] : null)),
          width: 3,
          thickness: 1,
          color: "var(--muted)",
        },
        hovertemplate: "%{customdata[0]}<br>%{x:.3g} ms%{customdata[1]}<extra></extra>",
      }),
    ),
    layout: layout({
      height: 90 + 26 * models.length,
      xaxis: logAxis("p50, ms (log scale)", ends, 0.04),
      yaxis: axis("", {
        tickvals: models.map((_, i) => i),
        ticktext: models.map((model) => plain(short(model, isNarrow() ? 18 : 38))),
        range: [-0.6, models.length - 0.4],
      }),
    }),
  };
}

/** x: less is better; accuracy: more is. What is not valid beats nothing. */
function isBeaten(row, shown, x) {
  return shown.some(
    (other) =>
      other.valid &&
      x(other) <= x(row) &&
      other.accuracy.value >= row.accuracy.value &&
      (x(other) < x(row) || other.accuracy.value > row.accuracy.value),
  );
}

function drawPareto(id, title, unit, shown, x) {
  if (!byId(id)) return;
  const { name: metric, is_fraction: isFraction } = data.metrics.find(({ name }) => name === view.metric) ?? data.metrics[0];
  const known = shown.filter((row) => row.accuracy?.name === metric && x(row) > 0);
  if (known.length === 0) {
    put(id, null, `No shown row has ${unit[1]} and ${metric}.`);
    return;
  }
  const [scale, percent] = isFraction ? [100, " %"] : [1, ""];
  const y = (row) => scale * row.accuracy.value;
  const front = known.filter((row) => row.valid && !isBeaten(row, known, x)).sort((a, b) => x(a) - x(b));
  const line = {
    type: "scatter",
    mode: "lines",
    x: front.map(x),
    y: front.map(y),
    line: { shape: "hv", width: 1, dash: "dot", color: "var(--muted)" },
    hoverinfo: "skip",
    showlegend: false,
  };
  const ends = new Set([front[0], front.at(-1)]);
  const points = markers(
    known,
    x,
    y,
    (members) => ({
      mode: "markers+text",
      text: members.map((row) => (ends.has(row) ? plain(short(`${row.model} ${row.precision}`, 28)) : "")),
      textposition: members.map((row) => (row === front[0] ? "bottom right" : "top left")),
      hovertemplate: `%{customdata[0]}<br>%{x:.3g} ${unit[0]}, %{y:.2f}${percent}%{customdata[1]}<extra></extra>`,
    }),
    (row) => (isBeaten(row, known, x) ? "var(--dominated)" : colourOf(row)),
  );
  const figure = {
    data: [line, ...points],
    layout: layout({
      height: 340,
      xaxis: logAxis(`${title}, ${unit[0]} (log scale)`, known.map(x), 0.1),
      yaxis: axis(plain(metric) + (isFraction ? ", %" : "")),
    }),
  };
  const best = front.map((row) => `${row.label} at ${figureOf(x(row))} ${unit[0]} and ${figureOf(y(row))}`).join("; ");
  put(id, figure, "", `Accuracy against ${title}: ${known.length} rows. None beats ${best || "any: no row is valid"}.`);
}

function drawCurves(shown) {
  const known = shown.filter((row) => row.curve.length > 0);
  const chosen = known.filter((row) => view.drawn.has(row.key));
  const drawn = chosen.length > 0 ? chosen : known.slice(0, NUM_CURVES);
  if (drawn.length === 0) {
    put("ecdf", null, "No shown row has samples.");
    return;
  }
  const alike = (row, i) => drawn.slice(0, i).filter(({ precision }) => precision === row.precision).length;
  const traces = drawn.map((row, i) => ({
    type: "scatter",
    mode: "lines",
    name: isNarrow() ? plain(nameOf(row)).replace(" on ", "<br>on ") : plain(nameOf(row)),
    x: row.curve,
    y: row.curve.map((_, i) => (100 * (i + 1)) / row.curve.length),
    line: { shape: "hv", width: 2, color: colourOf(row), dash: DASHES[alike(row, i) % DASHES.length] },
    hovertemplate: "%{y:.1f} % within %{x:.3g} ms",
  }));
  const figure = {
    data: traces,
    layout: layout({
      height: 320 + (isNarrow() ? 36 : 12) * traces.length,
      xaxis: logAxis("latency, ms (log scale)", drawn.flatMap((row) => [row.curve[0], row.curve.at(-1)]), 0.02),
      yaxis: axis("calls answered, %", { range: [0, 101] }),
      showlegend: true,
    }),
  };
  put("ecdf", figure, "", `Curves of ${drawn.map(nameOf).join("; ")}.`);
}

function drawHistory() {
  const lines = data.history[view.series] ? [data.history[view.series]] : data.history;
  const palette = ["var(--int8)", "var(--half)", "var(--fp32)", "var(--other)"];
  const traces = lines.map((line, i) => ({
    type: "scatter",
    mode: "lines+markers",
    name: plain(line.name),
    x: line.utc,
    y: line.ms,
    customdata: line.mark.map((mark) => (mark ? `<br>${plain(mark)}` : "")),
    line: {
      width: 1.5,
      color: palette[i % palette.length],
      dash: DASHES[Math.floor(i / palette.length) % DASHES.length],
    },
    marker: {
      size: line.mark.map((mark) => (mark ? 12 : 6)),
      symbol: line.mark.map((mark) => (mark ? "diamond" : "circle")),
    },
    hovertemplate: "%{x}<br>%{y:.4g} ms%{customdata}",
  }));
  const figure = {
    data: traces,
    layout: layout({
      height: 360,
      xaxis: axis("", { type: "date" }),
      yaxis: axis("p50, ms", { rangemode: lines.length > 1 ? "tozero" : "normal" }),
      showlegend: true,
    }),
  };
  const marks = lines.flatMap(({ name, utc, mark }) => mark.flatMap((text, i) => (text ? [`${name}, ${utc[i]}: ${text}`] : [])));
  const names = lines.map(({ name }) => name).join("; ");
  put("past", figure, "", `p50 over time of ${names}. Marks: ${marks.join("; ") || "none"}.`);
}

function draw(shown = inOrder().filter(isShown)) {
  const said = `p50 latency of ${shown.length} rows, by model. The values stand in the table.`;
  put("latency", shown.length > 0 && latencyFigure(shown), "No row fits the filter.", said);
  drawPareto("pareto-latency", "p50 latency", ["ms", "a latency"], shown, (row) => row.p50);
  drawPareto("pareto-size", "size", ["MiB", "a size"], shown, (row) => row.size);
  drawPareto("pareto-energy", "energy", ["mJ", "an energy"], shown, (row) => row.mj ?? 0);
  if (byId("ecdf")) drawCurves(shown);
  if (byId("past")) drawHistory();
}

function listSymbols() {
  const items = groups.map((group, i) => {
    const item = document.createElement("li");
    item.append(Object.assign(document.createElement("b"), { textContent: [...SIGNS][i % SYMBOLS.length] }), group);
    return item;
  });
  byId("symbols").replaceChildren(...(groups.length > 1 ? items : []));
}
