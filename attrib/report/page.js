// The page: its sections, and what is chosen in it.

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
  showTree();
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

function ask(query) {
  now.query = Math.min(Math.max(0, query), page.queries.length - 1);
  $("query").value = now.query;
  const within = $("tokens").contains(document.activeElement);
  showQuery();
  if (within) $("tokens").querySelector("[aria-pressed=true]").focus();
}

function press(event) {
  const { key, target } = event, turn = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (event.ctrlKey || event.metaKey || event.altKey || target.matches("input, select")) return;
  if (key === "/") {
    event.preventDefault();
    $("search").focus();
  } else if (turn && target.matches("summary")) target.parentElement.open = turn > 0;
  else if (turn) ask(now.query + turn);
}

const KEYS = "Keys: left and right for the query, and to fold what has the focus; / to search; Tab and Enter for all else.";

function listen() {
  addEventListener("keydown", press);
  $("from").addEventListener("input", (e) => choose(+e.target.value, Math.max(now.to, +e.target.value + 1)));
  $("to").addEventListener("input", (e) => choose(Math.min(now.from, +e.target.value - 1), +e.target.value));
  $("window").addEventListener("submit", (e) => e.preventDefault());
  $("whole").addEventListener("click", () => choose(0, page.windows.length - 1));
  $("query").addEventListener("change", (e) => ask(+e.target.value));
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
  const { shown, tags, ...rest } = JSON.parse(await unpack("page"));
  page = { ...decode(rest), shown: new Map(Object.entries(shown)), tags: new Map(Object.entries(tags)) };
  now.to = page.windows.length - 1;
  $("from").max = page.windows.length - 2;
  $("to").max = page.windows.length - 1;
  $("query").append(...page.queries.map((q, k) => option(q.name, k)));
  $("query-choice").hidden = page.queries.length < 2;
  document.querySelectorAll("[data-word]").forEach((e) => { e.textContent = page.words[e.dataset.word]; });
  fill("facts", page.facts.map(([name, value]) => row(head(name), element("td", value))));
  $("notices").append(...[...page.words.signs, ...page.notices, KEYS].map((text) => element("li", text)));
  document.body.classList.toggle("long", [...page.shown.values()].some(([text]) => text.length > FOLD));
  plantTree();
  listenToSearch();
  listenToTokens();
  showQuery();
  listen();
  document.body.dataset.ready = "yes";
}

main().catch((error) => {
  $("title").textContent = `This page could not be shown: ${error.message}. It needs a browser of 2023 or later.`;
  throw error;
});
