// Moves that go on, with their phases, rates and times, and those that have ended.

import { cancelMove, startMove } from "../dialogs.js";
import { h, lay } from "../dom.js";
import { empty, head, mayCancel, moveCard, panel } from "../parts.js";

export function open(place) {
  return { update: (now) => lay(place, show(now)) };
}

function show({ moves = [], ended = [], overview, you }) {
  const cancel = (move) => you?.acts && mayCancel(move)
    ? [h("button", { class: "quiet", on: { click: () => cancelMove(move) } }, `Cancel move ${move.id}`)] : [];
  return [
    head("Moves", "Each phase is durable before it acts: whoever is killed, a move goes on.",
      ...(you?.acts ? [h("button", { class: "primary", id: "start-move", on: { click: () => startMove("") } }, "Move a replica")] : [])),
    panel("Under way", moves.length ? moves.map((move) => moveCard(move, overview.time_ms, ...cancel(move)))
      : empty("Nothing moves", you?.acts ? "Start a move here, or drain a node; repairs and balancing begin by themselves." : "Repairs, drains and balancing appear here.")),
    panel("Ended", ended.length ? ended.map((move) => moveCard(move, overview.time_ms)) : empty("None has ended yet")),
  ];
}
