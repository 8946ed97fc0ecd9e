// Which predicates are busy, over time.

import { get } from "../api.js";
import { STEPS, warmth } from "../charts.js";
import { h, lay, svg } from "../dom.js";
import { empty, failed, head, predicateLink } from "../parts.js";
import { bytes, clock, count } from "../words.js";

const REFRESH_MS = 5000;
const RANGES = [["10", "10 minutes", 60], ["120", "6 hours", 180]];
const WHATS = [["writes", "Writes", 1], ["reads", "Reads", 2], ["bytes", "Bytes written", 3]];
const ROW = 22;

export function open(place, _, query) {
  const wanted = { range: query.get("range") ?? "10", what: query.get("what") ?? "writes" };
  let [seen, error, closed, cursor] = [null, null, false, null];
  const ask = async () => {
    try {
      [seen, error] = [await get("/api/heat", { column: wanted.range }), null];
    } catch (refused) {
      error = refused;
    }
    if (!closed) draw();
  };
  const choose = (name, value) => {
    wanted[name] = value;
    history.replaceState(null, "", `#/heat?${new URLSearchParams(wanted)}`);
    name === "range" ? ask() : draw();
  };
  const choice = (label, name, values) => h("fieldset", { class: "choice" }, h("legend", {}, label), values.map(([value, word]) =>
    h("label", {}, h("input", { type: "radio", name, value, checked: wanted[name] === value, on: { change: () => choose(name, value) } }), h("span", {}, word))));
  const draw = () => lay(place, head("Heat map", "The busiest predicates, each column a span of time; darker is busier, by orders of magnitude."),
    h("div", { class: "filters" }, choice("Time", "range", RANGES), choice("Of", "what", WHATS)),
    error ? failed(error) : seen ? map(seen, wanted, cursor, (next) => { cursor = next; draw(); }) : h("p", { class: "loading" }, "Asking every node…"));
  const timer = setInterval(() => document.hidden || ask(), REFRESH_MS);
  draw();
  ask();
  return { close() { closed = true; clearInterval(timer); } };
}

function map(seen, wanted, cursor, point) {
  const at = WHATS.find(([what]) => what === wanted.what)[2];
  const length = RANGES.find(([range]) => range === wanted.range)[2];
  const words = (value) => (wanted.what === "bytes" ? bytes(value) : count(value));
  const width = seen.column_s;
  if (!seen.columns.length) return empty("Nothing was asked lately", "Whatever is written or read is shown here within seconds.");
  const to = Math.floor(Date.now() / 1000 / width) * width;
  const from = to - (length - 1) * width;
  const rows = [...seen.rows.map((row) => ({ name: row.predicate ?? `group ${row.group}`, known: Boolean(row.predicate), values: new Map() })), { name: "all others", known: false, values: new Map() }];
  for (const column of seen.columns) {
    const place = (column.from_s - from) / width;
    if (place < 0) continue;
    for (const cell of column.cells) rows[cell[0]].values.set(place, cell[at]);
    if (column.rest[at - 1]) rows.at(-1).values.set(place, column.rest[at - 1]);
  }
  const shown = rows.filter((row) => row.values.size);
  const most = Math.max(1, ...shown.flatMap((row) => [...row.values.values()]));
  const moved = (event) => {
    const [row, column] = cursor ?? [0, length - 1];
    const next = { ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column] }[event.key];
    if (!next) return;
    event.preventDefault();
    point([Math.min(Math.max(next[0], 0), shown.length - 1), Math.min(Math.max(next[1], 0), length - 1)]);
  };
  const over = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const next = [Math.floor((event.clientY - box.top) / ROW), Math.floor(((event.clientX - box.left) / box.width) * length)];
    if (next[0] >= 0 && next[0] < shown.length && String(next) !== String(cursor)) point(next);
  };
  const told = cursor && shown[cursor[0]] ? `${shown[cursor[0]].name}, ${clock((from + cursor[1] * width) * 1000)}: ${words(shown[cursor[0]].values.get(cursor[1]) ?? 0)} ${wanted.what === "bytes" ? "written" : wanted.what}` : "Point at a cell, or move with the arrow keys.";
  return h("section", { class: "panel" }, h("h2", { class: "unseen" }, "Map"),
    h("div", { class: "heat" },
      h("ul", { class: "heat-names" }, shown.map((row) => h("li", {}, row.known ? predicateLink(row.name) : h("span", { class: "muted" }, row.name)))),
      svg("svg", { class: "heat-map", viewBox: `0 0 ${length * 10} ${shown.length * ROW}`, preserveAspectRatio: "none", tabindex: "0", role: "img",
        "aria-label": `${wanted.what} of ${shown.length} predicates over time, the busiest ${shown[0]?.name}`, style: { height: `${shown.length * ROW}px` }, on: { keydown: moved, pointermove: over } },
      shown.map((row, y) => [...row.values].filter(([, value]) => value > 0).map(([x, value]) => svg("rect", { class: `heat-${warmth(value, most)}`, x: x * 10, y: y * ROW + 1, width: 9, height: ROW - 2 }))),
      cursor ? svg("rect", { class: "cursor", x: cursor[1] * 10, y: cursor[0] * ROW, width: 10, height: ROW }) : null)),
    h("div", { class: "heat-foot" }, h("span", { class: "num muted" }, clock(from * 1000)), h("span", { class: "num muted" }, clock((to + width) * 1000))),
    h("p", { class: "told num", "aria-live": "polite" }, told),
    h("p", { class: "scale", "aria-hidden": "true" }, "less", Array.from({ length: STEPS }, (_, step) => svg("svg", { width: 18, height: 12 }, svg("rect", { class: `heat-${step + 1}`, width: 18, height: 12 }))), `up to ${words(most)} in ${width} s`),
    seen.silent.length ? h("p", { class: "warn-text" }, `Without ${seen.silent.map((node) => `n${node}`).join(", ")}, which did not answer.`) : null);
}
