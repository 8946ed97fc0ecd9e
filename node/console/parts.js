// What several pages show in the same way.

import { h } from "./dom.js";
import { bytes, duration, many, moment } from "./words.js";

export const PHASES = [
  ["planned", "Planned"], ["reserved", "Reserved"], ["learner", "Learner"], ["snapshot", "Snapshot"],
  ["catch-up", "Catch up"], ["verify", "Verify"], ["pre-switch", "Pre-switch"], ["joint", "Joint"],
  ["remove-old", "Remove old"], ["fence", "Fence"], ["cleanup", "Clean up"], ["done", "Done"],
];
const JOINT = PHASES.findIndex(([name]) => name === "joint");
const GRAVE = new Set([
  "silent", "unavailable", "dead", "lost", "full", "disk-full", "disk-stalled", "log-failed", "engine-failed", "meta-lost",
  "dead-replicas", "stuck",
]);

export const isGrave = (problem) => GRAVE.has(problem.code);

export function head(title, lead, ...actions) {
  return h("div", { class: "head" },
    h("div", {}, h("h1", { id: "title", tabindex: "-1" }, title), lead ? h("p", { class: "lead" }, lead) : null),
    actions.length ? h("div", { class: "actions" }, ...actions) : null);
}

export function panel(title, ...content) {
  return h("section", { class: "panel", key: title }, h("h2", {}, title), ...content);
}

export function empty(title, text) {
  return h("div", { class: "empty" }, h("p", { class: "strong" }, title), text ? h("p", {}, text) : null);
}

export function failed(error) {
  return h("div", { class: "empty bad", role: "alert" }, h("p", { class: "strong" }, "This could not be shown"), h("p", {}, error.message));
}

export function loading(text = "Asking the node…") {
  return h("p", { class: "loading" }, text);
}

export function tag(text, kind = "") {
  return h("span", { class: `tag ${kind}` }, text);
}

export const nodeName = (id) => (id ? `n${id}` : "–");

export function predicateLink(name) {
  return h("a", { class: "name", href: `#/predicate/${encodeURIComponent(name)}` }, name);
}

export function meter(done, all, label) {
  const part = all > 0 ? Math.min(1, done / all) : 0;
  return h("div", {
    class: "meter", role: "progressbar", "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "100",
    "aria-valuenow": String(Math.round(part * 100)),
  }, h("span", { style: { width: `${(part * 100).toFixed(1)}%` } }));
}

export function problemList(problems) {
  return h("ul", { class: "problems" }, problems.map((problem) => h("li", { class: isGrave(problem) ? "grave" : "mild" },
    h("div", { class: "row" },
      tag(problem.code, isGrave(problem) ? "bad" : "warn"),
      h("span", { class: "strong" }, problem.predicate
        ? [predicateLink(problem.predicate), ` · group ${problem.group}`]
        : problem.node ? h("a", { href: "#/nodes" }, problem.where) : problem.where),
      problem.since_ms ? h("span", { class: "muted" }, `since ${moment(problem.since_ms)}`) : null),
    h("p", {}, coded(problem.text)))));
}

// Words in backquotes are commands.
export function coded(text) {
  return text.split("`").map((part, at) => (at % 2 ? h("code", {}, part) : part));
}

export const isEnded = (move) => move.phase === "done" || move.phase === "aborted";
export const mayCancel = (move) => !isEnded(move) && !move.cancel_requested && move.phase !== "aborting" && at(move) < JOINT;
const at = (move) => PHASES.findIndex(([name]) => name === move.phase);

// Each phase with how long it took, the present one marked.
export function timeline(move, now) {
  const ended = isEnded(move);
  const entered = move.entered_ms ?? {};
  const back = move.phase === "aborting" || move.phase === "aborted";
  const phases = back
    ? [...PHASES.filter(([name]) => entered[name] !== undefined), ["aborting", "Going back"], ["aborted", "Gone back"]]
    : PHASES;
  const times = phases.map(([name]) => entered[name]);
  const present = phases.findIndex(([name]) => name === move.phase);
  return h("ol", { class: "phases", "aria-label": `Phases of move ${move.id}` }, phases.map(([name, word], place) => {
    const next = times.slice(place + 1).find((time) => time !== undefined) ?? (ended ? move.finished_ms : now);
    const took = times[place] === undefined || place === phases.length - 1 ? null : Math.max(0, next - times[place]);
    const kind = place < present ? "past" : place > present ? "ahead" : ended ? (back ? "back" : "past") : move.stuck ? "stuck" : "present";
    return h("li", { class: kind, "data-phase": name, "aria-current": kind === "present" ? "step" : null },
      h("span", { class: "phase" }, word), h("span", { class: "took" }, took === null || place > present ? "" : duration(took)));
  }));
}

export function moveCard(move, now, ...actions) {
  const what = { replace: "moves", add: "gets a replica", remove: "gives a replica up", "add-learner": "gets a learner" }[move.kind] ?? move.kind;
  const way = [move.from ? nodeName(move.from) : null, move.to ? nodeName(move.to) : null].filter(Boolean).join(" → ");
  const facts = [];
  if (move.bytes_total > 0) facts.push(`${bytes(move.bytes_done)} of ${bytes(move.bytes_total)}`);
  if (move.rate > 0) facts.push(`${bytes(move.rate)}/s`);
  if (move.eta_ms > 0) facts.push(`about ${duration(move.eta_ms)} left`);
  if (move.lag > 0) facts.push(`${many(move.lag, "entry", "entries")} behind`);
  const since = isEnded(move) ? move.finished_ms - move.started_ms : now - move.started_ms;
  return h("article", { class: `move ${move.stuck ? "stuck" : ""}`, key: `move-${move.id}`, "data-move": move.id, "data-phase": move.phase },
    h("div", { class: "row" },
      h("h3", {}, predicateLink(move.predicate)), h("span", { class: "muted" }, what), h("span", { class: "way" }, way),
      h("span", { class: "spacer" }), h("span", { class: "muted num" }, `move ${move.id} · ${duration(Math.max(0, since))}`), ...actions),
    timeline(move, now),
    !isEnded(move) && move.bytes_total > 0 ? meter(move.bytes_done, move.bytes_total, `Move ${move.id}`) : null,
    h("p", { class: "facts num" }, facts.join(" · ") || (isEnded(move) ? moment(move.finished_ms) : " ")),
    move.blocked ? h("p", { class: move.stuck ? "bad-text" : "muted" }, move.stuck ? "Stuck: " : "Waits: ", coded(move.blocked)) : null);
}
