"use strict";
// Shows the numbers of payload.py. Text from the data is set as text, or passes `plain` on its way into a chart.

const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"];
const UP = "#0072B2", DOWN = "#D55E00", WHOLE = "#555555";
const $ = (id) => document.getElementById(id);

let page;                                // what payload.py wrote, arrays decoded; ids are strings, `shown` a Map by them
const now = { query: 0, from: 0, to: 1 };  // the window: bins from .. to - 1

// reading

async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function decode(value) {
  if (Array.isArray(value)) return value.map(decode);
  if (value === null || typeof value !== "object") return value;
  if ("float32" in value) {
    const bytes = Uint8Array.from(atob(value.float32), (c) => c.charCodeAt(0));
    return { shape: value.shape, data: new Float32Array(bytes.buffer) };
  }
  return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, decode(v)]));
}

// entry [q, i, j] of an array (Q, I, J)
const at = (array, q, i, j) => array.data[(q * array.shape[1] + i) * array.shape[2] + j];
const range = (n) => Array.from({ length: n }, (_, k) => k);
const sum = (values) => values.reduce((a, b) => a + b, 0);

// writing

const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const cut = (text, n = 34) => (text.length > n ? text.slice(0, n - 1) + "…" : text);
const minus = (text) => text.replace("-", "−");

function number(value, signed = true) {
  if (value === null) return "not finite";
  const size = Math.abs(value);
  const digits = size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : value.toFixed(size < 10 ? 4 : 2);
  return minus((signed && value > 0 ? "+" : "") + digits);
}

const value = (v, signed = false) => `${number(v, signed)}${page.units ? ` ${page.units}` : ""}`;

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function numberCell(value, signed) {
  const cell = element("td", number(value, signed), "number");
  cell.dataset.value = value;
  return cell;
}

function row(...cells) {
  const made = document.createElement("tr");
  made.append(...cells);
  return made;
}

function head(text, kind = "", scope = "row") {
  const made = element("th", text, kind);
  made.scope = scope;
  return made;
}

const column = (text, kind = "") => head(text, kind, "col");

const fill = (id, rows) => $(id).tBodies[0].replaceChildren(...rows);

function shown(what, fallback) {
  const made = element("span", "", "shown");
  const [text, image] = what || ["", ""];
  if (image) {
    const picture = document.createElement("img");
    picture.src = image;
    picture.alt = text || fallback;
    made.append(picture);
  }
  if (text || !image) made.append(element("span", text || fallback));
  return made;
}

// an id where there is little room: a long one without its middle, the empty one as its quotes
function called(id, n = 24) {
  const letters = [...id];
  return letters.length > n ? `${letters.slice(0, n / 2 - 1).join("")}…${letters.slice(-n / 2).join("")}` : id || '""';
}

const label = (id) => {
  const text = (page.shown.get(id) || [""])[0];
  return cut(text ? `${called(id)}: ${text.replace(/\s+/g, " ")}` : `example ${called(id)}`);
};

// charts

const inUnits = (text) => (page.units ? `${text} (${page.units})` : text);
const many = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;

const LAYOUT = {
  font: { family: "system-ui, sans-serif", size: 13, color: "#1b1b1b" }, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
  margin: { l: 70, r: 70, t: 40, b: 45 }, hoverlabel: { namelength: -1 },
};
const STILL = { responsive: true, displayModeBar: false };
const ZOOMED = {
  responsive: true, displaylogo: false, displayModeBar: true,
  modeBarButtons: [["select2d", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
};
const LEGEND = { orientation: "h", x: 0, y: 1, yanchor: "bottom" };
const axis = (title, rest = {}) =>
  ({ zerolinecolor: "#999", gridcolor: "#eee", automargin: true, title: { text: plain(title) }, ...rest });
const rows = (names, size = 13) => ({
  autorange: "reversed", automargin: true, zeroline: false, showgrid: false, tickvals: range(names.length),
  ticktext: names.map(plain), tickfont: { size },
});
const draw = (id, traces, layout, options = STILL) => Plotly.react(id, traces, { ...LAYOUT, ...layout }, options);

// room for `rows` bars with their names
function grow(id, rows) {
  $(id).style.height = `${Math.max(220, 90 + 24 * rows)}px`;
}

// from the smallest to the largest place that is reached, and room for numbers beside them
function padded(values) {
  const low = Math.min(0, ...values), high = Math.max(0, ...values), room = 0.12 * (high - low || 1);
  return [low - room, high + room];
}

function drawWaterfall() {
  const { terms, tags } = page.queries[now.query];
  const examples = tags.length ? tags : [["examples", terms.examples]];
  const others = Object.entries(terms).filter(([name]) => !["initial", "examples", "final"].includes(name));
  const moves = [...examples, ...others];
  const names = ["initial", ...moves.map(([name]) => name), "final"];
  const values = [terms.initial, ...moves.map(([, value]) => value), terms.final];
  const levels = moves.reduce((all, [, value]) => [...all, all[all.length - 1] + value], [terms.initial]);
  grow("waterfall", names.length);
  draw("waterfall", [{
    type: "waterfall", orientation: "h", y: range(names.length), x: values, text: values.map((v) => number(v)),
    measure: ["absolute", ...moves.map(() => "relative"), "total"], textposition: "outside", cliponaxis: false,
    increasing: { marker: { color: UP } }, decreasing: { marker: { color: DOWN } }, totals: { marker: { color: WHOLE } },
    hovertext: names.map(plain), hovertemplate: "%{hovertext}: %{text}<extra></extra>", connector: { line: { width: 0.5 } },
  }], {
    margin: { l: 20, r: 80, t: 10, b: 45 }, dragmode: false,
    xaxis: axis(inUnits(page.measurement), { range: padded(levels) }),
    yaxis: rows(names.map((n) => cut(n, 20))),
  });
}

function drawTimeline() {
  const q = now.query, edges = page.edges, bins = edges.length - 1, groups = page.timeline_groups;
  const steps = range(bins).map((b) => `steps ${edges[b]} to ${edges[b + 1] - 1}`);
  const bars = groups.map((name, g) => ({
    type: "bar", name: plain(cut(name)), x: edges.slice(0, -1), y: range(bins).map((b) => at(page.timeline, q, b, g)), offset: 0,
    width: range(bins).map((b) => edges[b + 1] - edges[b]), marker: { color: COLOURS[g % COLOURS.length], line: { width: 0 } },
    text: steps, textposition: "none", hovertemplate: "%{text}: %{y:+.4g}", unselected: { marker: { opacity: 1 } },
  }));
  const curve = range(bins + 1).map((b) => page.curve.data[q * (bins + 1) + b]);
  draw("timeline", [...bars, {
    type: "scatter", mode: "lines", name: plain(page.measurement), x: edges, y: curve, yaxis: "y2",
    line: { color: "#000", width: 2 }, hovertemplate: "step %{x}: %{y:.5g}", unselected: { marker: { opacity: 1 } },
  }], {
    barmode: "relative", bargap: 0, dragmode: "select", selectdirection: "h", legend: LEGEND,
    xaxis: axis("step", { range: [edges[0], edges[bins]] }), yaxis: axis(inUnits(binWidth() === 1 ? "change per step" : `change per ${binWidth()} steps`)),
    yaxis2: axis(inUnits(page.measurement), {
      overlaying: "y", side: "right", showgrid: false, zeroline: false, tickmode: "auto",
    }),
    shapes: shading(), selections: [],
  }, ZOOMED);
}

const binWidth = () => page.edges[1] - page.edges[0];

function shading() {
  const [low, high] = bounds();
  const beyond = { type: "rect", yref: "paper", y0: 0, y1: 1, fillcolor: "#777", opacity: 0.22, line: { width: 0 }, layer: "above" };
  const last = page.edges.length - 1;
  return [{ ...beyond, x0: page.edges[0], x1: low }, { ...beyond, x0: high, x1: page.edges[last] }]
    .filter((shape) => shape.x1 > shape.x0);
}

function drawHeat(chosen) {
  const table = page.tables[now.query], bins = table.values.shape[0], n = table.values.shape[1];
  const starts = tableEdges();
  const z = chosen.map((k) => range(bins).map((b) => table.values.data[b * n + k]));
  const largest = Math.max(1e-30, ...z.flat().map(Math.abs));
  const names = chosen.map((k) => label(table.ids[k]));
  draw("heat", [{
    type: "heatmap", x: starts, y: range(chosen.length + 1).map((k) => k - 0.5), z, zmin: -largest, zmax: largest,
    colorscale: [[0, DOWN], [0.5, "#fff"], [1, UP]], colorbar: { title: { text: plain(page.units) }, thickness: 14 },
    customdata: chosen.map((k) => range(bins).map(() => plain(label(table.ids[k])))),
    hovertemplate: "%{customdata}, step %{x}: %{z:+.4g}<extra></extra>",
  }], {
    margin: { l: 20, r: 20, t: 30, b: 45 }, dragmode: false, xaxis: axis("step"), shapes: shading(),
    yaxis: rows(names, 11),
  });
}

function drawLayers() {
  const layers = page.layers;
  if (layers === null) {
    $("layers-hint").textContent = "Not kept along step and group: attribute again with keep=[(\"step\", \"group\"), ...].";
    $("layers").hidden = $("layers-numbers").hidden = true;
    return;
  }
  const within = (array, g) => sum(range(now.to - now.from).map((b) => at(array, now.query, now.from + b, g)));
  const places = range(layers.groups.length);
  const bar = (name, array, colour) => ({
    type: "bar", orientation: "h", name, y: places, x: places.map((g) => within(array, g)), marker: { color: colour },
    hovertemplate: "%{x:+.5g}",
  });
  grow("layers", 1.5 * places.length);
  const colours = [UP, "#999999", "#E69F00"];
  const bars = layers.rows.map(({ name, values }, k) => bar(name, values, colours[k]));
  $("layers-table").tHead.replaceChildren(row(column("group"), ...bars.map((bar) => column(bar.name, "number"))));
  fill("layers-table", layers.groups.map((name, g) => row(head(name), ...bars.map((bar) => numberCell(bar.x[g])))));
  draw("layers", bars, {
    margin: { l: 20, r: 20, t: 30, b: 45 }, dragmode: false, barmode: "group", legend: LEGEND,
    xaxis: axis(inUnits("contribution in the window"), { range: padded(bars.flatMap((bar) => bar.x)) }),
    yaxis: rows(layers.groups.map((n) => cut(n))),
  });
}

// sections

const bounds = () => [now.from, now.to].map((b) => page.edges[page.windows[b]]);

const tableEdges = () => (page.by_steps ? page.windows.map((b) => page.edges[b]) : [page.edges[0], page.edges[page.edges.length - 1]]);

function showQuestion() {
  const query = page.queries[now.query], terms = query.terms;
  $("title").textContent = page.title || `Why is ${page.measurement} ${value(terms.final)}?`;
  $("query-shown").replaceChildren(shown(query.shown, `query ${query.name}`));
  const steps = page.edges[page.edges.length - 1] - page.edges[0];
  $("answer").textContent =
    `In ${many(steps, "step")}, ${page.measurement} went from ${number(terms.initial, false)} to ${value(terms.final)}.`;
}

function showLedger() {
  const { terms, tags } = page.queries[now.query];
  const line = (name, value, kind) => {
    const made = row(head(name), numberCell(value, !["initial", "final"].includes(name)));
    made.className = kind;
    return made;
  };
  fill("ledger", Object.entries(terms).flatMap(([name, value]) => [
    line(name, value, name === "final" ? "total" : "term"),
    ...(name === "examples" ? tags.map(([tag, sum]) => line(tag, sum, "tag")) : []),
  ]));
}

function showExamples() {
  const table = page.tables[now.query], n = table.ids.length;
  const [low, high] = page.by_steps ? [now.from, now.to] : [0, 1];
  const bins = range(high - low).map((b) => low + b);
  const sums = range(n).map((k) => sum(bins.map((b) => table.values.data[b * n + k])));
  const order = range(n).sort((a, b) => sums[b] - sums[a]);
  const top = order.slice(0, page.ranks).filter((k) => sums[k] > 0);
  const bottom = order.slice(-page.ranks).reverse().filter((k) => sums[k] < 0);
  const largest = Math.max(1e-30, ...[...top, ...bottom].map((k) => Math.abs(sums[k])));
  const made = (k) => {
    const bar = element("td", "", "bar"), mark = element("span", "", sums[k] < 0 ? "down" : "up");
    mark.style.width = `${(100 * Math.abs(sums[k])) / largest}%`;
    bar.append(mark);
    const what = element("td");
    const id = element("td", table.ids[k] || '""', "id");
    id.style.minWidth = `calc(${Math.min(table.ids[k].length, 20)}ch + .7rem)`;  // 19 digits stand in one line
    what.append(shown(page.shown.get(table.ids[k]), `example ${called(table.ids[k])}`));
    return row(id, what, numberCell(sums[k]), bar);
  };
  fill("top", top.map(made));
  fill("bottom", bottom.map(made));
  const listed = new Set([...top, ...bottom]);
  const others = sum(bins.map((b) => table.others.data[b])) + sum(range(n).filter((k) => !listed.has(k)).map((k) => sums[k]));
  const left = n + table.left - listed.size;
  $("rest").textContent = left ? `${many(left, "other example")} together: ${value(others, true)}.` : "";
  $("rest").dataset.value = others;
  drawHeat([...top, ...bottom.slice().reverse()]);
}

function showWindow() {
  const [low, high] = bounds();
  $("from").value = now.from;
  $("to").value = now.to;
  $("from-step").textContent = low;
  $("to-step").textContent = high;
  $("from").setAttribute("aria-valuetext", `step ${low}`);
  $("to").setAttribute("aria-valuetext", `step ${high}`);
  $("window-said").textContent = page.by_steps
    ? `Contributions of the batches of ${high - low === 1 ? `step ${low}` : `steps ${low} to ${high - 1}`}.`
    : "Contributions over all steps: they were not kept along the steps.";
  showExamples();
  drawLayers();
}

function showQuery() {
  showQuestion();
  showLedger();
  drawWaterfall();
  drawTimeline();
  showWindow();
}

// choosing

function choose(from, to) {
  const last = page.windows.length - 1;
  now.from = Math.min(Math.max(0, from), last - 1);
  now.to = Math.min(Math.max(now.from + 1, to), last);
  Plotly.relayout("timeline", { shapes: shading(), selections: [] });
  showWindow();
}

// the bins that a range of steps touches
function chooseSteps(low, high) {
  const edges = page.windows.map((b) => page.edges[b]);
  const from = edges.findLastIndex((e) => e <= low), to = edges.findIndex((e) => e >= high);
  choose(from, to < 0 ? edges.length - 1 : to);
}

function listen() {
  $("from").addEventListener("input", (e) => choose(+e.target.value, Math.max(now.to, +e.target.value + 1)));
  $("to").addEventListener("input", (e) => choose(Math.min(now.from, +e.target.value - 1), +e.target.value));
  $("window").addEventListener("submit", (e) => e.preventDefault());
  $("whole").addEventListener("click", () => choose(0, page.windows.length - 1));
  $("query").addEventListener("change", (e) => { now.query = +e.target.value; showQuery(); });
  $("timeline").on("plotly_selected", (event) => {
    if (event && event.range && event.range.x) chooseSteps(...event.range.x.slice().sort((a, b) => a - b));
  });
}

// paper is narrower than the screen
const PAPER = 650;
const charts = () => [...document.querySelectorAll(".chart")].filter((chart) => chart.data);
addEventListener("beforeprint", () => charts().forEach((c) => Plotly.relayout(c, { width: PAPER, autosize: false })));
addEventListener("afterprint", () => charts().forEach((c) => Plotly.relayout(c, { width: null, autosize: true })));

async function main() {
  const script = document.createElement("script");
  script.textContent = await unpack("library");
  document.head.append(script);
  const { shown, ...rest } = JSON.parse(await unpack("page"));
  page = { ...decode(rest), shown: new Map(Object.entries(shown)) };
  now.to = page.windows.length - 1;
  $("from").max = page.windows.length - 2;
  $("to").max = page.windows.length - 1;
  $("query").append(...page.queries.map((q, k) => { const o = element("option", q.name); o.value = k; return o; }));
  $("query-choice").hidden = page.queries.length < 2;
  fill("identities", Object.entries(page.identities).map(([name, gap]) => row(head(name),
    gap === null ? element("td", "not checked", "number") : numberCell(gap, false))).concat(
    Object.entries(page.sizes).map(([name, size]) => row(head(name), element("td", size)))));
  fill("facts", page.facts.map(([name, value]) => row(head(name), element("td", value))));
  $("notices").append(...page.notices.map((text) => element("li", text)));
  showQuery();
  listen();
  document.body.dataset.ready = "yes";
}

main().catch((error) => {
  $("title").textContent = `This page could not be shown: ${error.message}. It needs a browser of 2023 or later.`;
  throw error;
});
