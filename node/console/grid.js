// A table of very many rows: only those in view are in the document, and only those near the view are asked for.

import { h, lay } from "./dom.js";

export const ROW_PX = 40;
const AHEAD = 12;
const PAGE = 100;

// `ask(offset, limit)` answers {total, rows}; `show(row, index)` gives the cells of a row; `label` names the table.
export function grid({ label, ask, head, show, failed }) {
  const body = h("tbody", {});
  const top = h("tr", { class: "pad", "aria-hidden": "true" }, h("td", {}));
  const bottom = h("tr", { class: "pad", "aria-hidden": "true" }, h("td", {}));
  const columns = h("thead", {});
  const table = h("table", { class: "grid", "aria-label": label }, columns, body);
  const place = h("div", { class: "window", tabindex: "0", role: "region", "aria-label": `${label}, scrolls`, on: { scroll: draw } }, table);
  const pages = new Map();
  let [total, closed, asked] = [0, false, 0];

  async function fetch(page) {
    const turn = asked;
    pages.set(page, pages.get(page) ?? { rows: [] });
    try {
      const answer = await ask(page * PAGE, PAGE);
      if (closed || turn !== asked) return;
      total = answer.total;
      pages.set(page, { rows: answer.rows, at: Date.now() });
      lay(columns, head());
      draw();
    } catch (error) {
      if (!closed) failed(error);
    }
  }

  function span() {
    const first = Math.max(0, Math.floor(place.scrollTop / ROW_PX) - AHEAD);
    const seen = Math.ceil(Math.max(place.clientHeight, 400) / ROW_PX) + 2 * AHEAD;
    return [first, Math.min(total, first + seen)];
  }

  function draw() {
    const [from, to] = span();
    for (let page = Math.floor(from / PAGE); page * PAGE < to; page += 1) if (!pages.has(page)) fetch(page);
    const rows = [];
    for (let at = from; at < to; at += 1) {
      const row = pages.get(Math.floor(at / PAGE))?.rows[at % PAGE];
      rows.push(h("tr", { "aria-rowindex": String(at + 2), key: row ? `row-${row.group}` : `gap-${at}` },
        row ? show(row, at) : h("td", { class: "gap", colspan: "99" }, "…")));
    }
    top.style.height = `${from * ROW_PX}px`;
    bottom.style.height = `${(total - to) * ROW_PX}px`;
    table.setAttribute("aria-rowcount", String(total + 1));
    top.key = "top";
    bottom.key = "bottom";
    lay(body, top, rows, bottom);
  }

  return {
    place,
    // From the beginning, with another question.
    restart() {
      asked += 1;
      pages.clear();
      place.scrollTop = 0;
      return fetch(0);
    },
    // The same rows as they are now.
    refresh() {
      const [from, to] = span();
      const seen = new Set([Math.floor(from / PAGE), Math.floor(Math.max(from, to - 1) / PAGE)]);
      for (const page of [...pages.keys()]) if (!seen.has(page)) pages.delete(page);
      return Promise.all([...seen].map(fetch));
    },
    draw,
    close() {
      closed = true;
    },
    total: () => total,
  };
}
