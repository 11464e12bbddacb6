"use strict";
// Shows the numbers of payload.py. Text from the data is set as text, or passes `plain` on its way into a chart.

const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"];
const UP = "#0072B2", DOWN = "#D55E00", WHOLE = "#555555";
const $ = (id) => document.getElementById(id);

let page;                                // what payload.py wrote, arrays decoded; ids are strings, `shown` and `tags` Maps by them
// the window: bins from .. to - 1; what is searched; the example that tokens are shaded by
const now = { query: 0, from: 0, to: 1, words: [], tag: "", example: "" };

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

function option(text, value) {
  const made = element("option", text);
  made.value = value;
  return made;
}

// whole words, about so many letters of them
const words = (text, n) => text.slice(0, n).replace(/\s+\S{0,40}$/, "");

const FOLD = 180, unfolded = new Set();  // texts

// a long text, of which the rest folds out
function folding(text) {
  const letters = element("span");
  if (text.length <= FOLD) {
    letters.textContent = text;
    return [letters];
  }
  const more = element("button", "", "more");
  const show = () => {
    const open = unfolded.has(text);
    letters.textContent = open ? text : `${words(text, FOLD)} …`;
    more.textContent = open ? "less" : "more";
    more.setAttribute("aria-expanded", open);
  };
  more.type = "button";
  more.addEventListener("click", () => {
    if (!unfolded.delete(text)) unfolded.add(text);
    show();
  });
  show();
  return [letters, more];
}

function shown(what, fallback) {
  const made = element("span", "", "shown");
  const [text, image] = what || ["", ""];
  if (image) {
    const picture = document.createElement("img");
    picture.src = image;
    picture.alt = text || fallback;
    made.append(picture);
  }
  if (text || !image) made.append(...folding(text || fallback));
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
