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

const value = (v, signed = false, units = page.units) => `${number(v, signed)}${units ? ` ${units}` : ""}`;

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
  const low = Math.min(0, ...values), high = Math.max(0, ...values), room = 0.18 * (high - low || 1);
  return [low - room, high + room];
}

function drawWaterfall() {
  const { terms, tags } = page.queries[now.query], [first, ...rest] = Object.entries(terms), last = rest.pop();
  $("waterfall").hidden = !last;  // one number is no ledger
  if (!last) return;
  const moves = rest.flatMap(([name, value]) => (name === "examples" && tags.length ? tags : [[name, value]]));
  const names = [first, ...moves, last].map(([name]) => name), values = [first, ...moves, last].map(([, value]) => value);
  const levels = moves.reduce((all, [, value]) => [...all, all[all.length - 1] + value], [first[1]]);
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
  const { values, logarithmic } = page.trace, trace = range(bins + 1).map((b) => values.data[q * (bins + 1) + b]);
  draw("timeline", [...bars, {
    type: "scatter", mode: "lines", name: plain(page.words.trace), x: edges, y: trace, yaxis: "y2",
    line: { color: "#000", width: 2 }, hovertemplate: "step %{x}: %{y:.5g}", unselected: { marker: { opacity: 1 } },
  }], {
    barmode: "relative", bargap: 0, dragmode: "select", selectdirection: "h", legend: LEGEND,
    xaxis: axis("step", { range: [edges[0], edges[bins]] }), yaxis: axis(inUnits(`${page.words.change} per ${binWidth() === 1 ? "step" : `${binWidth()} steps`}`)),
    yaxis2: axis(logarithmic ? page.words.trace : inUnits(page.measurement), {
      overlaying: "y", side: "right", showgrid: false, zeroline: false, tickmode: "auto", type: logarithmic ? "log" : "linear",
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
  const colours = [UP, "#999999", "#E69F00", "#009E73", "#CC79A7"];
  const bars = layers.rows.map(({ name, values }, k) => bar(name, values, colours[k]));
  $("layers-table").tHead.replaceChildren(row(column("group"), ...bars.map((bar) => column(bar.name, "number"))));
  fill("layers-table", layers.groups.map((name, g) => row(head(name), ...bars.map((bar) => numberCell(bar.x[g])))));
  draw("layers", bars, {
    margin: { l: 20, r: 20, t: 30, b: 45 }, dragmode: false, barmode: "group", legend: LEGEND,
    xaxis: axis(inUnits(`${page.words.term} in the window`), { range: padded(bars.flatMap((bar) => bar.x)) }),
    yaxis: rows(layers.groups.map((n) => cut(n))),
  });
}

// sections

const bounds = () => [now.from, now.to].map((b) => page.edges[page.windows[b]]);

const tableEdges = () => (page.by_steps ? page.windows.map((b) => page.edges[b]) : [page.edges[0], page.edges[page.edges.length - 1]]);

function showQuestion() {
  const query = page.queries[now.query], ends = Object.values(query.terms), initial = ends[0], final = ends[ends.length - 1];
  const change = initial === null || final === null ? null : final - initial, units = page.measured_units;
  const known = { initial: number(initial, false), final: value(final, false, units), change: value(change, true, units) };
  const filled = (text) => text.replace(/{(initial|final|change)}/g, (_, name) => known[name]);
  $("title").textContent = page.title || filled(page.words.title);
  $("query-shown").replaceChildren(shown(query.shown, `query ${query.name}`));
  $("answer").textContent = filled(page.words.answer);
  $("warning").textContent = query.warning ? `Warning: ${query.warning}.` : "";
}

function showLedger() {
  const { terms, tags, sizes } = page.queries[now.query], names = Object.keys(terms), last = names[names.length - 1];
  const line = (name, value, kind) => {
    const made = row(head(name), numberCell(value, ![names[0], last].includes(name)));
    made.className = kind;
    return made;
  };
  const tagged = tags.map(([tag, sum]) => line(tag, sum, "tag"));
  const shared = row(head("examples, by the weight that all of a tag share"), element("td"));
  shared.className = "tag head";
  fill("ledger", Object.entries(terms).flatMap(([name, value]) => [
    line(name, value, name === last ? "total" : "term"), ...(name === "examples" ? tagged : []),
  ]).concat("examples" in terms || !tags.length ? [] : [shared, ...tagged]));
  fill("identities", Object.entries(page.identities).map(([name, gap]) => row(head(name),
    gap === null ? element("td", "not checked", "number") : numberCell(gap, false))).concat(
    Object.entries(sizes).map(([name, size]) => row(head(name), element("td", size)))));
}

// a difference that was run: id -> what was done to it did
const really = () => new Map(page.really.length ? page.really[now.query].ids.map((id, n) => [id, page.really[now.query].terms[n]]) : []);

function showReally() {
  $("really-section").hidden = !page.really.length;
  document.querySelectorAll("th.really").forEach((th) => { th.hidden = !page.really.length; });
  if (!page.really.length) return;
  const { title, number: count, ids, terms, contributions, totals, sentences } = page.really[now.query];
  const largest = Math.max(1e-30, ...terms.map(Math.abs)), listed = ids.slice(0, 2 * page.ranks);
  const cell = (value) => (value === null ? element("td", "", "number") : numberCell(value));
  const total = (name, said, done) => row(element("td"), head(name), cell(said), cell(done), element("td", "", "bar"));
  const lines = listed.map((id, n) => row(
    element("td", id || '""', "id"), described(id), cell(contributions[n]), cell(terms[n]), barCell(terms[n], largest)));
  const sums = totals.map((line) => total(...line)), left = count - listed.length;
  if (left > 0) {
    const rest = (values, whole) => whole - sum(values.slice(0, listed.length));
    lines.push(total(`${many(left, "other example")} of these`, rest(contributions, totals[0][1]), rest(terms, totals[0][2])));
  }
  sums[sums.length - 1].className = "total";
  fill("really", [...lines, ...sums]);
  $("really-title").textContent = title;
  $("really-said").textContent = sentences.join(" ");
}

function barCell(value, largest) {
  const bar = element("td", "", "bar"), mark = element("span", "", value < 0 ? "down" : "up");
  mark.style.width = `${(100 * Math.abs(value)) / largest}%`;
  bar.append(mark);
  return bar;
}

function described(id) {
  const what = element("td");
  what.append(shown(page.shown.get(id), `example ${called(id)}`));
  return what;
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
  const done = really();
  const made = (k) => {
    const id = element("td", table.ids[k] || '""', "id");
    id.style.minWidth = `calc(${Math.min(table.ids[k].length, 20)}ch + .7rem)`;  // 19 digits stand in one line
    const cells = [id, described(table.ids[k]), numberCell(sums[k]), barCell(sums[k], largest)];
    if (page.really.length) cells.push(done.has(table.ids[k]) ? numberCell(done.get(table.ids[k])) : element("td"));
    return row(...cells);
  };
  fill("top", top.map(made));
  fill("bottom", bottom.map(made));
  const listed = new Set([...top, ...bottom]);
  const others = sum(bins.map((b) => table.others.data[b])) + sum(range(n).filter((k) => !listed.has(k)).map((k) => sums[k]));
  const left = n + table.left - listed.size;
  $("rest").textContent = left ? `${many(left, "other example")} ${page.words.rest}: ${value(others, true)}.` : "";
  $("rest").dataset.value = others;
  drawHeat([...top, ...bottom.slice().reverse()]);
}

const terms = () => `${page.words.term[0].toUpperCase()}${page.words.term.slice(1)}s`;

function showWindow() {
  const [low, high] = bounds();
  $("from").value = now.from;
  $("to").value = now.to;
  $("from-step").textContent = low;
  $("to-step").textContent = high;
  $("from").setAttribute("aria-valuetext", `step ${low}`);
  $("to").setAttribute("aria-valuetext", `step ${high}`);
  $("window-said").textContent = page.by_steps
    ? `${terms()} of the batches of ${high - low === 1 ? `step ${low}` : `steps ${low} to ${high - 1}`}.`
    : `${terms()} over all steps: they were not kept along the steps.`;
  showExamples();
  drawLayers();
}

function showQuery() {
  showQuestion();
  showLedger();
  drawWaterfall();
  showReally();
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
  document.querySelectorAll("[data-word]").forEach((e) => { e.textContent = page.words[e.dataset.word]; });
  fill("facts", page.facts.map(([name, value]) => row(head(name), element("td", value))));
  $("notices").append(...[...page.words.signs, ...page.notices].map((text) => element("li", text)));
  showQuery();
  listen();
  document.body.dataset.ready = "yes";
}

main().catch((error) => {
  $("title").textContent = `This page could not be shown: ${error.message}. It needs a browser of 2023 or later.`;
  throw error;
});
