// One predicate: its replicas, and of each node why it holds one, could take one, or cannot.

import { get } from "../api.js";
import { startMove } from "../dialogs.js";
import { h, lay } from "../dom.js";
import { state } from "../live.js";
import { coded, empty, failed, head, moveCard, nodeName, panel, tag } from "../parts.js";
import { brief, bytes, count, many, moment } from "../words.js";

const REFRESH_MS = 3000;
const STANDING = { votes: ["holds a voter", "good"], learns: ["holds a learner", "accent"], misplaced: ["should not hold one", "warn"], could: ["could take one", ""], cannot: ["cannot take one", "muted"] };

export function open(place, name) {
  let [seen, error, closed] = [null, null, false];
  const ask = async () => {
    try {
      [seen, error] = [await get("/api/predicate", { name }), null];
    } catch (refused) {
      error = refused;
    }
    if (!closed) draw();
  };
  const draw = () => lay(place, error && !seen ? [head(name), failed(error)] : seen ? show(name, seen) : [head(name), h("p", { class: "loading" }, "Asking the node…")]);
  const timer = setInterval(() => document.hidden || ask(), REFRESH_MS);
  draw();
  ask();
  return { update: () => seen && draw(), close() { closed = true; clearInterval(timer); } };
}

function table(caption, columns, rows) {
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, h("table", {}, h("caption", { class: "unseen" }, caption),
    h("thead", {}, h("tr", {}, columns.map(([word, kind]) => h("th", { scope: "col", class: kind }, word)))), h("tbody", {}, rows)));
}

function show(name, seen) {
  const moves = [...(state.moves ?? []), ...(state.ended ?? [])].filter((move) => move.predicate === name);
  const members = [...seen.voters, ...seen.learners];
  const commit = Math.max(0, ...seen.replicas.filter((replica) => replica.role === "leader").map((replica) => replica.commit));
  const facts = [`${seen.kind} · group ${seen.group}`, `${seen.voters.length} of ${many(seen.wanted, "replica")}`, seen.leader ? `led by ${nodeName(seen.leader)}` : "nobody leads",
    seen.writes_per_s === null ? null : `${brief(seen.writes_per_s)} writes/s, ${brief(seen.reads_per_s)} reads/s`];
  return [
    head(name, facts.filter(Boolean).join(" · "),
      ...(state.you?.acts && seen.kind !== "meta" ? [h("button", { class: "primary", id: "start-move", on: { click: () => startMove(name, members) } }, "Move a replica")] : [])),
    seen.problems.length ? h("div", { class: "banner warn" }, seen.problems.map((problem) => h("p", {}, coded(problem)))) : null,
    moves.length ? panel("Moves", moves.slice(0, 3).map((move) => moveCard(move, state.overview?.time_ms ?? Date.now()))) : null,
    panel("Replicas", seen.replicas.length ? table("Replicas",
      [["Node", ""], ["Role", ""], ["Size", "num"], ["Behind", "num"], ["Applied", "num"], ["Log", "num"], ["Term", "num"]],
      seen.replicas.map((replica) => h("tr", { key: replica.node }, h("th", { scope: "row" }, nodeName(replica.node)),
        h("td", {}, tag(replica.role, { leader: "accent", dead: "bad" }[replica.role] ?? ""), replica.dead ? ` ${replica.dead}` : "", replica.receives ? ` receives ${bytes(replica.receives[0])} of ${bytes(replica.receives[1])}` : ""),
        h("td", { class: "num" }, bytes(replica.bytes)), h("td", { class: "num" }, count(Math.max(0, commit - replica.applied))), h("td", { class: "num" }, count(replica.applied)),
        h("td", { class: "num" }, `${count(replica.first_index)} … ${count(replica.last_index)}`), h("td", { class: "num" }, count(replica.term))))) : empty("No replica answers")),
    panel("Why here", seen.explanation.error ? h("p", { class: "muted" }, seen.explanation.error) : h("ul", { class: "explain" }, seen.explanation.nodes.map((node) => {
      const [word, kind] = STANDING[node.standing] ?? [node.standing, ""];
      return h("li", { key: node.node }, h("div", { class: "row" }, h("span", { class: "strong" }, nodeName(node.node)), tag(word, kind)),
        h("ul", {}, node.verdicts.map((verdict) => h("li", { class: verdict.ok ? "good" : verdict.hard ? "bad" : "warn" },
          h("span", { class: "mark", "aria-hidden": "true" }, verdict.ok ? "✓" : verdict.hard ? "✕" : "!"),
          h("span", {}, verdict.ok ? "" : verdict.hard ? "No: " : "But: ", verdict.text, verdict.fix ? h("span", { class: "muted" }, " ", coded(verdict.fix)) : null)))));
    }))),
    h("p", { class: "muted" }, `Made ${moment(seen.created_ms)}, epoch ${seen.epoch}, ${seen.state}.`),
  ];
}
