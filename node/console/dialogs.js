// Orders: what would be done is shown first, and only what was shown is done.

import { post } from "./api.js";
import { h, lay, say } from "./dom.js";
import { state } from "./live.js";
import { coded, nodeName } from "./parts.js";
import { brief, bytes, duration, many } from "./words.js";

// Opens a dialog; `show(place, close)` fills it. Escape closes it, and focus goes back to where it was.
function dialog(title, show) {
  const place = h("div", { class: "dialog-body" });
  const box = h("dialog", { "aria-labelledby": "dialog-title", on: { close: () => box.remove() } },
    h("div", { class: "dialog-head" }, h("h2", { id: "dialog-title" }, title),
      h("button", { class: "quiet", "aria-label": "Close", on: { click: () => box.close() } }, "✕")),
    place);
  document.body.append(box);
  show(place, () => box.close());
  box.showModal();
}

const refusal = (error) => h("p", { class: "banner bad", role: "alert" }, coded(error.message));

function buttons(close, word, act, kind = "primary") {
  return h("div", { class: "buttons" },
    h("button", { on: { click: close } }, "Not now"),
    h("button", { class: kind, id: "confirm", on: { click: act } }, word));
}

// Runs an order; while it is under way nothing else can be asked, and what is refused is said in place.
async function carry(place, work) {
  const all = [...place.querySelectorAll("button, select, input")];
  all.forEach((one) => (one.disabled = true));
  place.querySelector(".banner")?.remove();
  try {
    await work();
  } catch (error) {
    all.forEach((one) => (one.disabled = false));
    place.append(refusal(error));
  }
}

const nodeWords = (node) => `${nodeName(node.node)} · ${node.address}${node.state === "live" ? "" : ` · ${node.state}`}`;

// A replica of a predicate goes from one node to another; `members` are the nodes that hold one.
export function startMove(predicate, members = null, from = 0) {
  dialog("Move a replica", (place, close) => {
    const order = { predicate, from, to: 0, learner: false };
    const nodes = (state.nodes ?? []).filter((node) => node.state !== "removed");
    const select = (id, label, empty, fits) => h("label", { for: id }, label,
      h("select", { id, name: id, on: { change: (event) => (order[id] = Number(event.target.value)) } },
        h("option", { value: "0" }, empty),
        nodes.filter(fits).map((node) => h("option", { value: String(node.node), selected: node.node === order[id] }, nodeWords(node)))));
    const holds = (node) => members === null || members.includes(node.node);
    const form = () => lay(place,
      h("form", { class: "fields", on: { submit: (event) => { event.preventDefault(); look(); } } },
        h("label", { for: "predicate" }, "Predicate",
          h("input", { id: "predicate", name: "predicate", value: order.predicate, required: true, autocomplete: "off",
            on: { input: (event) => (order.predicate = event.target.value.trim()) } })),
        select("from", "From", "No node: add a replica", holds),
        select("to", "To", "No node: remove the replica", (node) => members === null || !members.includes(node.node)),
        h("label", { class: "check", for: "learner" }, h("input", { id: "learner", type: "checkbox", on: { change: (event) => (order.learner = event.target.checked) } }),
          "What is added follows without a vote, for reads"),
        h("p", { class: "muted" }, "Reads and writes go on meanwhile. Nothing begins before you have seen what would be done."),
        h("div", { class: "buttons" },
          h("button", { type: "button", on: { click: close } }, "Not now"),
          h("button", { type: "submit", class: "primary", id: "look" }, "Show what would be done"))));
    const look = () => carry(place, async () => preview(await post("/api/move/start", { ...order, dry_run: true })));
    const preview = (plan) => {
      place.replaceChildren(
        h("p", { class: "big" }, h("strong", {}, plan.predicate), ` ${bytes(plan.bytes)}, nodes ${plan.before.map(nodeName).join(" ")} → ${plan.after.map(nodeName).join(" ")}`),
        h("ul", { class: "checks" }, plan.checks.map((check) => h("li", { class: check.ok ? "good" : "bad" },
          h("span", { class: "mark", "aria-hidden": "true" }, check.ok ? "✓" : "✕"), check.ok ? "" : "Not well: ", check.text))),
        h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Configurations on the way" }, h("table", {},
          h("caption", {}, "Configurations on the way"),
          h("thead", {}, h("tr", {}, ["Configuration", "Voters", "Learners", "Majority", "May fail"].map((word) => h("th", { scope: "col" }, word)))),
          h("tbody", {}, plan.steps.map((step) => h("tr", {},
            h("th", { scope: "row" }, step.name),
            h("td", {}, [step.outgoing, step.voters].filter((half) => half.length).map((half) => half.map(nodeName).join(" ")).join(" and ")),
            h("td", {}, step.learners.map(nodeName).join(" ") || "–"),
            h("td", { class: "num" }, String(step.quorum)),
            h("td", { class: `num ${step.may_fail === 0 ? "warn-text" : ""}` }, String(step.may_fail))))))),
        ...plan.steps.filter((step) => step.text).map((step) => h("p", { class: "muted" }, `${step.name}: ${step.text}`)),
        h("p", { class: "muted" }, `About ${duration(plan.estimate_ms)} while nothing holds it up. It can be cancelled until its joint configuration is committed.`),
        buttons(close, "Start the move", () => carry(place, async () => {
          const done = await post("/api/move/start", { predicate: plan.predicate, from: plan.from, to: plan.to, learner: plan.kind === "add-learner", revision: plan.revision });
          close();
          say(`Move ${done.id} of ${done.predicate} has begun.`);
          location.hash = "#/moves";
        })));
      place.querySelector("#confirm").focus();
    };
    form();
  });
}

export function cancelMove(move) {
  dialog(`Cancel move ${move.id}`, (place, close) => {
    lay(place,
      h("p", {}, `Move ${move.id} of ${move.predicate} is in phase ${move.phase}. It goes back: the new replica is removed, and ${move.predicate} is served where it was. Nothing is lost.`),
      h("p", { class: "muted" }, "Once its joint configuration is committed this is refused, and the move goes on to its end."),
      buttons(close, "Let it go back", () => carry(place, async () => {
        await post("/api/move/cancel", { id: move.id });
        close();
        say(`Move ${move.id} is asked to go back.`);
      }), "danger"));
  });
}

export function drain(node, cancel) {
  dialog(cancel ? `Use ${nodeName(node.node)} again` : `Drain ${nodeName(node.node)}`, async (place, close) => {
    lay(place, h("p", { class: "loading" }, "Looking at what it holds…"));
    let seen;
    try {
      seen = await post("/api/drain", { node: node.node, cancel, dry_run: true });
    } catch (error) {
      return lay(place, refusal(error), h("div", { class: "buttons" }, h("button", { on: { click: close } }, "Close")));
    }
    place.replaceChildren(
      cancel
        ? h("p", {}, `${nodeName(node.node)} takes replicas again. Those that have left stay where they are.`)
        : h("p", {}, `${nodeName(node.node)} holds ${many(seen.replicas, "replica")} and leads ${count(seen.leaders)} of them. Leaderships are passed on at once, then each replica moves to where the rules allow.`),
      !cancel && seen.stuck.length
        ? h("div", { class: "banner warn" }, h("p", {}, `${many(seen.stuck.length, "replica")} cannot leave as things are:`),
          h("ul", {}, seen.stuck.slice(0, 8).map((stuck) => h("li", {}, h("strong", {}, stuck.predicate), ": ", coded(stuck.reason)))))
        : "",
      h("p", { class: "muted" }, cancel ? "A drained node that is started again is of no use before." : "It can be called off at any time."),
      buttons(close, cancel ? "Use it again" : "Drain it", () => carry(place, async () => {
        await post("/api/drain", { node: node.node, cancel, shown: seen.shown });
        close();
        say(cancel ? `${nodeName(node.node)} takes replicas again.` : `${nodeName(node.node)} is being drained.`);
      }), cancel ? "primary" : "danger"));
    place.querySelector("#confirm").focus();
  });
}

const count = (number) => number.toLocaleString("en");
const percent = (part) => `${(part * 100).toFixed(1)} %`;

export function rebalance() {
  dialog("Rebalance", async (place, close) => {
    lay(place, h("p", { class: "loading" }, "Making a plan…"));
    let plan;
    try {
      plan = await post("/api/rebalance/plan", {});
    } catch (error) {
      return lay(place, refusal(error), h("div", { class: "buttons" }, h("button", { on: { click: close } }, "Close")));
    }
    const nothing = plan.moves.length + plan.transfers.length === 0;
    const columns = ["Node", "Bytes", "After", "Writes/s", "After", "Leads", "After"];
    place.replaceChildren(
      h("p", { class: "big" }, nothing ? "No move makes the nodes more even." :
        `${many(plan.moves.length, "move")} of ${bytes(plan.bytes)} and ${many(plan.transfers.length, "transfer")} of leadership.`),
      h("p", { class: "muted" }, `Spread ${percent(plan.spread_before)} → ${percent(plan.spread_after)}, of writes ${percent(plan.load_spread_before)} → ${percent(plan.load_spread_after)}. An even use takes at least ${bytes(plan.bound_bytes)}.`),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Nodes before and after" }, h("table", {},
        h("caption", {}, "Nodes before and after"),
        h("thead", {}, h("tr", {}, columns.map((word) => h("th", { scope: "col" }, word)))),
        h("tbody", {}, plan.nodes.map((node) => h("tr", {}, h("th", { scope: "row" }, nodeName(node.node)),
          [bytes(node.used_before), bytes(node.used_after), brief(node.writes_before), brief(node.writes_after), node.leads_before, node.leads_after]
            .map((cell) => h("td", { class: "num" }, String(cell)))))))),
      plan.moves.length ? h("ul", { class: "plain" }, plan.moves.slice(0, 12).map((move) => h("li", {}, h("strong", {}, move.predicate), ` ${nodeName(move.from)} → ${nodeName(move.to)}, ${bytes(move.bytes)}: ${move.reason}`)),
        plan.moves.length > 12 ? h("li", { class: "muted" }, `and ${plan.moves.length - 12} more`) : "") : "",
      plan.running ? h("p", { class: "banner" }, `Plan ${plan.running} is being carried out; this one counts its moves in.`) : "",
      nothing || plan.running
        ? h("div", { class: "buttons" }, h("button", { on: { click: close } }, "Close"))
        : buttons(close, `Apply plan ${plan.plan}`, () => carry(place, async () => {
          const done = await post("/api/rebalance/apply", { plan: plan.plan });
          close();
          say(`Plan ${done.plan} begins: ${many(done.moves.length, "move")}.`);
          location.hash = "#/moves";
        })));
    place.querySelector("button:last-of-type")?.focus();
  });
}
