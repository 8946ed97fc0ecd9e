// The nodes: how they are, what they hold, how much room they have; and emptying one.

import { drain, rebalance } from "../dialogs.js";
import { h, lay } from "../dom.js";
import { coded, empty, head, meter, nodeName, tag } from "../parts.js";
import { brief, bytes, count, duration, millis } from "../words.js";

const EXPIRES_SOON_S = 14 * 86_400;

export function open(place) {
  return { update: (now) => lay(place, show(now)) };
}

function show({ nodes = [], overview, you }) {
  return [
    head("Nodes", `${overview.nodes_answering} of ${overview.nodes} answer.`,
      ...(you?.acts ? [h("button", { class: "primary", id: "rebalance", on: { click: rebalance } }, "Plan a rebalance")] : [])),
    nodes.length ? h("div", { class: "cards" }, nodes.map((node) => card(node, overview, you))) : empty("No nodes are known"),
  ];
}

function status(node) {
  if (!node.reachable) return tag("does not answer", "bad");
  if (node.room !== "ample") return tag("disk nearly full", "bad");
  return node.state === "draining" ? tag("draining", "warn") : tag(node.state, "good");
}

function card(node, overview, you) {
  const used = node.disk_total_bytes - node.disk_free_bytes;
  const labels = Object.entries(node.labels ?? {});
  const left = node.certificate_expires ? node.certificate_expires - overview.time_ms / 1000 : null;
  const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", { class: "num" }, value));
  const drains = node.state === "draining";
  return h("article", { class: `panel node-card ${node.reachable ? "" : "gone"}`, key: `node-${node.node}`, "data-node": node.node, "data-state": node.state },
    h("div", { class: "row" }, h("h2", {}, nodeName(node.node)), status(node),
      node.node === overview.meta_leader ? tag("leads the meta group", "accent") : null,
      node.node === overview.node ? tag("you are here") : null,
      h("span", { class: "spacer" }),
      you?.acts && (node.reachable || drains)
        ? h("button", { class: "quiet", on: { click: () => drain(node, drains) } }, drains ? `Use ${nodeName(node.node)} again` : `Drain ${nodeName(node.node)}`) : null),
    h("p", { class: "muted num" }, node.address, ` · ${node.engine}`, labels.length ? ` · ${labels.map(([name, value]) => `${name}=${value}`).join(", ")}` : ""),
    node.reachable ? [
      h("div", { class: "room" }, meter(used, node.disk_total_bytes, `Disk of ${nodeName(node.node)}`),
        h("p", { class: "muted num" }, `${bytes(node.disk_free_bytes)} of ${bytes(node.disk_total_bytes)} free`, node.capacity_bytes ? ` · may hold ${bytes(node.capacity_bytes)}` : "")),
      h("dl", { class: "facts-grid" },
        fact("Replicas", count(node.replicas)), fact("Leads", count(node.leaders)),
        fact("Rows", bytes(node.engine_bytes)), fact("Log", bytes(node.wal_bytes)),
        fact("Writes/s", brief(node.writes_per_s)), fact("Reads/s", brief(node.reads_per_s)), fact("Slowest 1 %", millis(node.write_p99_ms))),
      drains ? h("p", {}, node.replicas === 0 ? "It is empty: stop it at will, or use it again." : `${count(node.replicas)} replicas are still here.`) : null,
    ] : h("p", {}, "It does not answer: start it, or if it is lost for good ", coded(`run \`pontoon decommission n${node.node}\`.`)),
    node.problems?.map((problem) => h("p", { class: "bad-text" }, h("strong", {}, problem.code), ": ", coded(problem.text))),
    left !== null && left < EXPIRES_SOON_S ? h("p", { class: "warn-text" }, `Its certificate is valid for ${duration(Math.max(0, left * 1000))} more.`) : null);
}
