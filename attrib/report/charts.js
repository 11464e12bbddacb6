// The charts: plotly draws them.

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
