// How things stand, at a glance.

import { get } from "../api.js";
import { lines } from "../charts.js";
import { h, lay } from "../dom.js";
import { state } from "../live.js";
import { empty, head, isGrave, moveCard, panel, problemList } from "../parts.js";
import { brief, bytes, count, many, millis, moment } from "../words.js";

const HISTORY_MS = 5000;
const SHOWN = 4;
const NARROW_PX = 760;

export function open(place) {
  let [heat, closed] = [null, false];
  const ask = async () => {
    try {
      heat = await get("/api/heat", { column: 10 });
    } catch {
      // The figures beside it say whether the node answers.
    }
    if (!closed && state.overview) update(state);
  };
  const timer = setInterval(() => document.hidden || ask(), HISTORY_MS);
  ask();
  const update = (now) => lay(place, show(now, heat));
  return { update, close: () => { closed = true; clearInterval(timer); } };
}

function stat(name, value, text, kind = "") {
  return h("div", { class: `stat ${kind}` }, h("dt", {}, name), h("dd", { class: "value num" }, value), h("dd", { class: "muted" }, text));
}

function show({ overview, problems = [], moves = [], events = [] }, heat) {
  const grave = problems.filter(isGrave).length;
  const [kind, verdict] = grave ? ["bad", many(problems.length, "problem")] : problems.length ? ["warn", many(problems.length, "thing wants", "things want") + " a look"] : ["good", "All is well"];
  return [
    head("Overview"),
    h("div", { class: `verdict ${kind}` }, h("span", { class: "mark", "aria-hidden": "true" }, { good: "✓", warn: "!", bad: "!" }[kind]),
      h("p", { class: "strong" }, verdict),
      h("p", { class: "muted" }, overview.meta_leader ? `The meta group is led by n${overview.meta_leader}.` : "Nobody is known to lead the meta group.")),
    h("dl", { class: "stats" },
      stat("Writes", brief(overview.writes_per_s), "per second"),
      stat("Reads", brief(overview.reads_per_s), "per second"),
      stat("Slowest 1 %", millis(overview.write_p99_ms), "of writes, at the slowest node"),
      stat("Nodes", `${overview.nodes_answering} / ${overview.nodes}`, "answer", overview.nodes_answering < overview.nodes ? "bad" : ""),
      stat("Predicates", count(overview.predicates), overview.under_replicated ? `${count(overview.under_replicated)} lack a replica` : "all fully replicated", overview.under_replicated ? "warn" : ""),
      stat("Rows", bytes(overview.bytes), "on all nodes")),
    panel("The last ten minutes", history(heat, overview)),
    h("div", { class: "halves" },
      h("div", {},
        panel("Problems", problems.length ? [problemList(problems.slice(0, SHOWN)), more(problems, "problems")] : empty("Nothing is wrong", "What goes wrong is named here with its reason and the next step.")),
        panel("Moves", moves.length ? [moves.slice(0, SHOWN).map((move) => moveCard(move, overview.time_ms)), more(moves, "moves")] : empty("Nothing moves", "Replicas stay where they are."))),
      h("div", {}, panel("What happened", events.length ? [eventList(events.slice(0, 10)), h("p", {}, h("a", { href: "#/events" }, "All events"))] : empty("Nothing yet")))),
  ];
}

const more = (all, page) => (all.length > SHOWN ? h("p", {}, h("a", { href: `#/${page}` }, `All ${all.length}`)) : null);

export function eventList(events) {
  return h("ol", { class: "events" }, events.map((event) => h("li", { key: event.seq },
    h("time", { class: "num", datetime: new Date(event.time_ms).toISOString() }, moment(event.time_ms)), h("span", {}, event.text))));
}

function history(heat, overview) {
  const now = Math.floor(overview.time_ms / 1000);
  const width = heat?.column_s ?? 10;
  const last = now - (now % width) - width;
  const seen = new Map((heat?.columns ?? []).map((column) => [column.from_s, column.all]));
  const points = [];
  for (let at = last - 59 * width; at <= last; at += width) points.push([at, (seen.get(at)?.[0] ?? 0) / width, (seen.get(at)?.[1] ?? 0) / width]);
  return h("figure", { class: "chart" }, lines(points, ["Writes", "Reads"], "Writes and reads per second in the last ten minutes", innerWidth < NARROW_PX ? 320 : 920),
    h("figcaption", { class: "legend" }, h("span", { class: "s0" }, "Writes per second"), h("span", { class: "s1" }, "Reads per second")));
}
