// What is wrong, why, and what to do about it.

import { h, lay } from "../dom.js";
import { empty, head, isGrave, panel, problemList } from "../parts.js";
import { many } from "../words.js";

export function open(place) {
  return { update: (now) => lay(place, show(now)) };
}

function show({ problems = [], nodes = [], overview }) {
  const [grave, mild] = [problems.filter(isGrave), problems.filter((problem) => !isGrave(problem))];
  const port = nodes.filter((node) => node.audit_problem);
  return [
    head("Problems", problems.length ? `${many(problems.length, "problem")}, each with the next step.` : null),
    problems.length + port.length === 0
      ? h("div", { class: "verdict good" }, h("span", { class: "mark", "aria-hidden": "true" }, "✓"), h("p", { class: "strong" }, "Nothing is wrong"),
        h("p", { class: "muted" }, `${many(overview.nodes, "node")} and ${many(overview.predicates, "predicate")} were looked at a moment ago.`))
      : null,
    grave.length ? panel("At once", problemList(grave)) : null,
    mild.length ? panel("To keep an eye on", problemList(mild)) : null,
    port.length ? panel("Audit", h("ul", { class: "plain" }, port.map((node) => h("li", {}, `n${node.node} does not write down who changes what: ${node.audit_problem}`)))) : null,
    problems.length ? null : empty("Problems come and go by themselves here", "The same is told by `pontoon status --problems`, and by metrics and alerts.".replaceAll("`", "")),
  ];
}
