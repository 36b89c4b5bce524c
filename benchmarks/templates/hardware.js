// The hardware comparison: sorts and filters its rows, draws what is shown, and keeps the view in the address.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const rows = data.rows.map((row, index) => ({
  ...row,
  index,
  text: Object.values(row.facets).join(" ").toLowerCase(),
  line: byId(`r-${index}`),
  place: byId(`p-${index}`),
}));
const groups = [...new Set(rows.map((row) => row.group))];
const facets = [...document.querySelectorAll(".facet")];
const view = {
  words: "",
  chosen: {}, // values by facet; none: all
  sort: data.columns[0].key,
  falls: false,
  drawn: new Set(), // keys of the rows whose curves are drawn; none: the first ones
  metric: "",
  profiled: "",
  series: "",
};
let placed = rows; // in the order of their lines on the page

// What is shown

function isShown(row) {
  const words = view.words.toLowerCase().split(/\s+/).filter(Boolean);
  return (
    words.every((word) => row.text.includes(word)) &&
    Object.entries(view.chosen).every(([facet, values]) => values.length === 0 || values.includes(row.facets[facet]))
  );
}

/** Numbers by size, words as people sort them, nothing at all last, whichever way. */
function inOrder() {
  const column = data.columns.findIndex(({ key }) => key === view.sort);
  const sign = view.falls ? -1 : 1;
  return [...rows].sort((a, b) => {
    const [x, y] = [a.sort[column], b.sort[column]];
    if (x === null || y === null) return (x === null) - (y === null) || a.index - b.index;
    const difference = typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
    return sign * difference || a.index - b.index;
  });
}

/** Puts the page in the state of `view`: lines, places, counts, figures, address. */
function show() {
  const ordered = inOrder();
  const shown = ordered.filter(isShown);
  const visible = new Set(shown);
  for (const row of rows) row.line.hidden = row.place.hidden = !visible.has(row);
  place(ordered);
  byId("count").textContent = `${shown.length} of ${rows.length} rows`;
  byId("nothing").hidden = shown.length > 0;
  byId("reset").hidden = view.words === "" && Object.values(view.chosen).every((values) => values.length === 0);
  markHeadings();
  listProfiles(shown);
  draw(shown);
  address();
}

/** What stands in its place is not moved: it would lose the keyboard's focus. */
function place(ordered) {
  if (ordered.every((row, i) => row === placed[i])) return;
  document.querySelector("#rows tbody").append(...ordered.map((row) => row.line));
  byId("places").append(...ordered.map((row) => row.place));
  placed = ordered;
}

function markHeadings() {
  for (const heading of document.querySelectorAll("#rows th[data-key]")) {
    if (heading.dataset.key === view.sort) heading.setAttribute("aria-sort", view.falls ? "descending" : "ascending");
    else heading.removeAttribute("aria-sort");
  }
  byId("sort").value = view.sort;
}

// The address: a view can be shared by its link

function address() {
  const parts = new URLSearchParams();
  if (view.words) parts.set("words", view.words);
  for (const [facet, values] of Object.entries(view.chosen)) for (const value of values) parts.append(facet, value);
  if (view.sort !== data.columns[0].key || view.falls) parts.set("sort", `${view.sort}${view.falls ? ":down" : ""}`);
  for (const key of view.drawn) parts.append("draw", key);
  for (const name of ["metric", "profiled", "series"]) if (view[name]) parts.set(name, view[name]);
  const hash = parts.toString();
  if (hash || location.hash.includes("=")) history.replaceState(null, "", `#${hash}`);
}

/** Reads the view out of the address; an address without "=" is a place on the page. */
function readAddress() {
  if (!location.hash.includes("=")) return;
  const parts = new URLSearchParams(location.hash.slice(1));
  const [sort, down] = (parts.get("sort") ?? "").split(/:(down)$/);
  view.words = parts.get("words") ?? "";
  view.chosen = Object.fromEntries(facets.map(({ dataset }) => [dataset.facet, parts.getAll(dataset.facet)]));
  view.sort = data.columns.some(({ key }) => key === sort) ? sort : data.columns[0].key;
  view.falls = down === "down";
  view.drawn = new Set(parts.getAll("draw"));
  for (const name of ["metric", "profiled", "series"]) view[name] = parts.get(name) ?? "";
  fillControls();
}

function fillControls() {
  byId("words").value = view.words;
  for (const facet of facets) {
    const values = view.chosen[facet.dataset.facet] ?? [];
    for (const box of facet.querySelectorAll("input")) box.checked = values.includes(box.value);
    sayChosen(facet);
  }
  for (const box of document.querySelectorAll("input.draw")) box.checked = view.drawn.has(box.value);
  if (byId("metric")) byId("metric").value = view.metric || data.metrics[0].name;
  if (byId("series")) byId("series").value = view.series;
}

function sayChosen(facet) {
  const chosen = [...facet.querySelectorAll("input:checked")].map((box) => box.value);
  view.chosen[facet.dataset.facet] = chosen;
  facet.classList.toggle("active", chosen.length > 0);
  facet.querySelector(".chosen").textContent = chosen.length > 2 ? `${chosen.length} chosen` : chosen.join(", ");
}

// Layers

function listProfiles(shown) {
  const select = byId("profiled");
  if (!select) return;
  const known = shown.filter((row) => row.layers);
  const wanted = known.find((row) => row.key === view.profiled) ?? known[0];
  select.replaceChildren(...known.map((row) => new Option(row.label, row.key, false, row === wanted)));
  byId("no-layers").hidden = Boolean(wanted);
  byId("layer-times").hidden = select.disabled = !wanted;
  if (wanted) listLayers(wanted);
}

function listLayers({ label, layers, precision }) {
  const { top, rest, total_us: total, source } = layers;
  const longest = Math.max(...top.map((layer) => layer[4]));
  const lines = rest.num > 0 ? [...top, [`${rest.num} other layers`, "", "", 0, rest.us]] : top;
  byId("t-layers").textContent = `${label}: ${figureOf(total)} µs in all its layers, by ${source}`;
  document.querySelector("#layer-times tbody").replaceChildren(
    ...lines.map(([name, op, runsIn, macs, us]) => {
      const line = document.createElement("tr");
      const share = total > 0 ? ((100 * us) / total).toFixed(1) : "";
      const bar = document.createElement("i");
      bar.className = `bar-of ${COLOURS[runsIn] ? runsIn : ""}`;
      bar.style.width = `${Math.min(5, (5 * us) / longest)}rem`;
      const speed = macs > 0 && us > 0 ? figureOf((2 * macs) / us / 1e3) : "";
      const texts = [name, op, runsIn, macs > 0 ? macs.toLocaleString("en") : "", figureOf(us), share, speed];
      for (const [i, text] of texts.entries())
        line.append(Object.assign(document.createElement("td"), { className: i < 3 ? "words" : "", textContent: text }));
      line.children[5].prepend(bar);
      if (precision === "int8" && macs > 0 && runsIn !== "int8") line.children[2].append(" (fell back)");
      return line;
    }),
  );
}

// What a person does

function listen() {
  byId("filter").addEventListener("submit", (event) => event.preventDefault());
  byId("words").addEventListener("input", ({ target }) => change({ words: target.value }));
  byId("sort").addEventListener("change", ({ target }) => sortBy(target.value));
  byId("reset").addEventListener("click", reset);
  for (const name of ["metric", "profiled", "series"])
    byId(name)?.addEventListener("change", ({ target }) => change({ [name]: target.value }));
  for (const button of document.querySelectorAll("#rows th[data-key] button"))
    button.addEventListener("click", () => sortBy(button.parentElement.dataset.key));
  for (const box of document.querySelectorAll("input.draw"))
    box.addEventListener("change", () => {
      view.drawn[box.checked ? "add" : "delete"](box.value);
      show();
    });
  for (const facet of facets) {
    facet.addEventListener("change", () => {
      sayChosen(facet);
      show();
    });
    facet.addEventListener("keydown", ({ key }) => {
      if (key !== "Escape" || !facet.open) return;
      facet.open = false;
      facet.querySelector("summary").focus();
    });
  }
  document.addEventListener("click", ({ target }) => {
    for (const facet of facets) if (!facet.contains(target)) facet.open = false;
  });
  addEventListener("hashchange", () => {
    readAddress();
    show();
  });
  addEventListener("beforeprint", () => openReasons(true));
  addEventListener("afterprint", () => openReasons(false));
}

function change(changes) {
  Object.assign(view, changes);
  show();
}

/** A second time by the same column turns it round; where more is better, more comes first. */
function sortBy(key) {
  const first = data.columns.find((column) => column.key === key).falls;
  change({ sort: key, falls: view.sort === key ? !view.falls : first });
}

function reset(event) {
  event.preventDefault();
  change({ words: "", chosen: {} });
  fillControls();
  byId("words").focus();
}

/** On paper nobody can click. */
function openReasons(open) {
  for (const details of document.querySelectorAll(".why")) {
    if (open) details.dataset.was = details.open;
    details.open = open || details.dataset.was === "true";
  }
}

root.classList.add("js");
listSymbols();
readAddress();
listen();
show();
keepDrawn(() => draw());
const observer = new IntersectionObserver(look, { rootMargin: "200px" });
for (const plot of document.querySelectorAll(".plot")) observer.observe(plot);
