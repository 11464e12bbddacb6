// The tables of examples: ranked in the window, searched by id, text and tag.

function described(id) {
  const what = element("td");
  what.append(shown(page.shown.get(id), `example ${called(id)}`));
  if (page.tags.has(id)) what.append(element("span", page.tags.get(id), "of"));
  return what;
}

// of each example of a query's table, over the window
function windowed(query) {
  const { values } = page.tables[query], n = values.shape[1], [low, high] = page.by_steps ? [now.from, now.to] : [0, 1];
  return range(n).map((k) => sum(range(high - low).map((b) => values.data[(low + b) * n + k])));
}

const searched = new Map();  // id -> all that is known of it, in small letters

function matches(id) {
  if (!searched.has(id)) {
    searched.set(id, `${id} ${(page.shown.get(id) || [""])[0]} ${page.tags.get(id) || ""}`.toLowerCase());
  }
  return (!now.tag || page.tags.get(id) === now.tag) && now.words.every((word) => searched.get(id).includes(word));
}

function exampleRow(id, value, largest, done) {
  const name = element("td", id || '""', "id");
  name.style.minWidth = `calc(${Math.min(id.length, 20)}ch + .7rem)`;  // 19 digits stand in one line
  const cells = [name, described(id), numberCell(value), barCell(value, largest)];
  if (page.really.length) cells.push(done.has(id) ? numberCell(done.get(id)) : element("td"));
  return row(...cells);
}

function showExamples() {
  const table = page.tables[now.query], n = table.ids.length, sums = windowed(now.query);
  const found = range(n).filter((k) => matches(table.ids[k])), order = found.slice().sort((a, b) => sums[b] - sums[a]);
  const top = order.slice(0, page.ranks).filter((k) => sums[k] > 0);
  const bottom = order.slice(-page.ranks).reverse().filter((k) => sums[k] < 0);
  const largest = Math.max(1e-30, ...[...top, ...bottom].map((k) => Math.abs(sums[k])));
  const done = really(), rows = (chosen) => chosen.map((k) => exampleRow(table.ids[k], sums[k], largest, done));
  fill("top", rows(top));
  fill("bottom", rows(bottom));
  const listed = new Set([...top, ...bottom]), [low, high] = page.by_steps ? [now.from, now.to] : [0, 1];
  const absent = sum(range(high - low).map((b) => table.others.data[low + b]));
  const others = absent + sum(range(n).filter((k) => !listed.has(k)).map((k) => sums[k]));
  const left = n + table.left - listed.size;
  $("rest").textContent = left ? `${many(left, "other example")} ${page.words.rest}: ${value(others, true)}.` : "";
  $("rest").dataset.value = others;
  showFound(found.length, sum(found.map((k) => sums[k])), table.left);
  $("heat").hidden = !listed.size;
  if (listed.size) drawHeat([...top, ...bottom.slice().reverse()]);
  showTokens([...top, ...bottom].map((k) => table.ids[k]));
}

// what a search found, and where it could not look
function showFound(count, total, left) {
  const what = [...now.words.map((word) => `“${word}”`), ...(now.tag ? [`tag ${now.tag}`] : [])].join(" and ");
  const said = `${what}: ${many(count, "example")} found, ${page.words.rest} ${value(total, true)}.`;
  const beyond = left ? ` Not searched: ${many(left, "example")} that no table of this query shows.` : "";
  $("found").textContent = what ? said + beyond : "";
}

function listenToSearch() {
  const tags = [...new Set(page.tags.values())].sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
  $("tag-choice").hidden = tags.length < 2;
  $("tag").append(option("all", ""), ...tags.map((tag) => option(tag, tag)));
  $("tag").addEventListener("change", (e) => { now.tag = e.target.value; showExamples(); });
  $("search").addEventListener("input", (e) => {
    now.words = e.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    showExamples();
  });
  $("searching").addEventListener("submit", (e) => e.preventDefault());
}
