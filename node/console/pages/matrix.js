// Predicates by nodes: who leads, who follows, how large, how far behind. Very many rows are no more than those in view.

import { get } from "../api.js";
import { h, lay } from "../dom.js";
import { grid } from "../grid.js";
import { empty, failed, head, nodeName, predicateLink, tag } from "../parts.js";
import { brief, bytes, count } from "../words.js";

const REFRESH_MS = 3000;
const TYPED_MS = 200;
const SORTS = [["name", "Name"], ["size", "Size"], ["lag", "Lag"], ["load", "Load"], ["problems", "Problems"]];
const LETTERS = { leader: "L", follower: "F", learner: "r", candidate: "C", dead: "✕" };
const BEHIND = 1000;
// More columns than this show roles alone; sizes and lags are in each cell's words.
const MANY = 8;

export function open(place, _, query) {
  const wanted = { name: query.get("name") ?? "", sort: query.get("sort") ?? "name", node: query.get("node") ?? "", problem: query.get("problem") ?? "" };
  let [nodes, unreachable, all] = [[], [], 0];
  const ask = async (offset, limit) => {
    const answer = await get("/api/matrix", { ...wanted, offset, limit });
    [nodes, unreachable, all] = [answer.nodes, answer.unreachable, answer.all];
    about(answer.total);
    return answer;
  };
  const rows = grid({ label: "Predicates by nodes", ask, head: () => columns(nodes, unreachable), show: (row) => cells(row, nodes), failed: (error) => lay(note, failed(error)) });
  const note = h("div", { role: "status" });
  const changed = () => {
    const set = new URLSearchParams(Object.entries(wanted).filter(([name, value]) => value && value !== "name" && name));
    history.replaceState(null, "", `#/matrix${set.size ? `?${set}` : ""}`);
    rows.restart();
  };
  let typed;
  const filters = () => h("form", { class: "filters", role: "search", on: { submit: (event) => event.preventDefault() } },
    h("label", { for: "name" }, "Name has", h("input", { id: "name", type: "search", value: wanted.name, placeholder: "press / to type", autocomplete: "off",
      on: { input: (event) => { wanted.name = event.target.value; clearTimeout(typed); typed = setTimeout(changed, TYPED_MS); } } })),
    h("label", { for: "sort" }, "Sort by", h("select", { id: "sort", on: { change: (event) => { wanted.sort = event.target.value; changed(); } } },
      SORTS.map(([sort, word]) => h("option", { value: sort, selected: sort === wanted.sort }, word)))),
    h("label", { for: "node" }, "On node", h("select", { id: "node", on: { change: (event) => { wanted.node = event.target.value; changed(); } } },
      h("option", { value: "" }, "Any"), nodes.map((node) => h("option", { value: String(node), selected: String(node) === wanted.node }, nodeName(node))))),
    h("label", { class: "check", for: "problem" }, h("input", { id: "problem", type: "checkbox", checked: wanted.problem === "1",
      on: { change: (event) => { wanted.problem = event.target.checked ? "1" : ""; changed(); } } }), "Only with problems"));
  const bar = h("div", {});
  const about = (total) => {
    if (bar.dataset.nodes !== String(nodes)) {
      bar.dataset.nodes = String(nodes);
      lay(bar, filters());
    }
    const filtered = wanted.name || wanted.node || wanted.problem;
    lay(note, total === 0
      ? empty(filtered ? "No predicate fits" : "No predicates yet", filtered ? "Take a filter away." : "The first write to one makes it.")
      : h("p", { class: "muted" }, total === all ? `${count(total)} groups` : `${count(total)} of ${count(all)} groups`, `, ${nodes.length} nodes`));
    rows.place.hidden = total === 0;
    rows.place.classList.toggle("many", nodes.length > MANY);
  };
  lay(bar, filters());
  place.replaceChildren(head("Matrix", "Each row is a predicate's group, each column a node."), bar, note, rows.place,
    h("ul", { class: "key", "aria-label": "Key" },
      [["leader", "leads"], ["follower", "follows"], ["learner", "learns, without a vote"], ["candidate", "asks for votes"], ["dead", "has stopped"], ["absent", "does not answer"]]
        .map(([role, word]) => h("li", {}, h("span", { class: `role ${role}`, "aria-hidden": "true" }, LETTERS[role] ?? "?"), word))));
  rows.restart();
  const timer = setInterval(() => document.hidden || rows.refresh(), REFRESH_MS);
  addEventListener("resize", rows.draw);
  return { close() { clearInterval(timer); clearTimeout(typed); rows.close(); removeEventListener("resize", rows.draw); } };
}

function columns(nodes, unreachable) {
  return h("tr", { "aria-rowindex": "1" }, h("th", { scope: "col", class: "first" }, "Predicate"), h("th", { scope: "col", class: "num" }, "Size"), h("th", { scope: "col", class: "num" }, "Lag"),
    h("th", { scope: "col", class: "num" }, "Writes/s"),
    nodes.map((node) => h("th", { scope: "col", key: `n${node}`, class: `node ${unreachable.includes(node) ? "bad-text" : ""}` }, nodeName(node))));
}

function cells(row, nodes) {
  const held = new Map(row.cells.map(([node, ...cell]) => [node, cell]));
  return [
    h("th", { scope: "row", class: "first" }, predicateLink(row.predicate || `group ${row.group}`), " ",
      row.move ? tag(`move ${row.move}`, "accent") : null, row.problems.length ? tag(row.problems[0].split(":")[0], "warn") : null),
    h("td", { class: "num" }, bytes(row.bytes)),
    h("td", { class: `num ${row.lag >= BEHIND ? "warn-text" : "muted"}` }, count(row.lag)),
    h("td", { class: "num" }, brief(row.writes_per_s)),
    nodes.map((node) => {
      const [role, size, lag] = held.get(node) ?? [];
      if (!role) {
        const silent = row.members?.includes(node);
        return h("td", { class: "node" }, silent ? h("span", { class: "role absent", title: `n${node} does not answer` }, "?") : h("span", { class: "none", "aria-label": "none" }, "·"));
      }
      const words = `${role} on n${node}, ${bytes(size)}${lag ? `, ${count(lag)} entries behind` : ""}`;
      return h("td", { class: "node", title: words }, h("span", { class: `role ${role}`, role: "img", "aria-label": words }, LETTERS[role] ?? "?"),
        lag >= BEHIND ? h("span", { class: "behind num" }, `−${brief(lag)}`) : h("span", { class: "size num", "aria-hidden": "true" }, bytes(size)));
    }),
  ];
}
