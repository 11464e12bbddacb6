// A text of which each token is a query: a line of tokens, shaded by what was done to each.
// What an example contributed is of the whole example: nothing here is said of its tokens.

const visible = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +$/, (spaces) => "␣".repeat(spaces.length)) || "∅";

// what each token is shaded by; null where this file does not hold it
function shades() {
  if (now.example === "") {
    return page.queries.map(({ terms }) => {
      const ends = Object.values(terms), last = ends[ends.length - 1];
      return ends.length < 2 || last === null || ends[0] === null ? last : last - ends[0];
    });
  }
  return page.tables.map(({ ids }, q) => {
    const k = ids.indexOf(now.example);
    return k < 0 ? null : windowed(q)[k];
  });
}

// ids: of the examples in the tables, any of which can be chosen
function showTokens(ids) {
  if (!page.tokens) return;
  const by = $("token-by"), values = shades(), largest = Math.max(1e-30, ...values.map((v) => Math.abs(v)));
  const chosen = now.example === "" || ids.includes(now.example) ? ids : [now.example, ...ids];
  by.replaceChildren(option(page.words.token, ""), ...chosen.map((id) => option(`${page.words.term} of ${label(id)}`, id)));
  by.value = now.example;
  const unit = now.example === "" ? page.measured_units : page.units;
  [...$("tokens").querySelectorAll("button")].forEach((button, q) => {
    const v = values[q], said = v === null ? "not in this file" : value(v, true, unit);
    button.className = v === null ? "unknown" : v > 0 ? "up" : v < 0 ? "down" : "";
    button.style.setProperty("--shade", `${v === null ? 0 : Math.round((70 * Math.abs(v)) / largest)}%`);
    button.dataset.value = v;
    button.title = `${page.queries[q].name}: ${said}`;
    button.setAttribute("aria-label", button.title);
    button.setAttribute("aria-pressed", q === now.query);
    button.tabIndex = q === now.query ? 0 : -1;  // the arrow keys go from one to the next
  });
  $("tokens-said").textContent = `Each token is a query: choose one. Shades: ${by.selectedOptions[0].textContent}, up to `
    + `${value(largest, false, unit)}; blue with a line below: above zero, orange with a line above: below zero.`;
}

function listenToTokens() {
  $("tokens-section").hidden = !page.tokens;
  if (!page.tokens) return;
  page.queries.forEach((query, q) => {
    const button = element("button", visible(query.name)), last = q && page.queries[q - 1].number;
    button.type = "button";
    button.addEventListener("click", () => ask(q));
    if (q && query.number !== last + 1) $("tokens").append(" … ");  // others of the text stand between
    $("tokens").append(button);
  });
  $("token-by").addEventListener("change", (e) => { now.example = e.target.value; showExamples(); });
}
