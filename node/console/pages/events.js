// What happened in the cluster, the latest first.

import { get } from "../api.js";
import { h, lay } from "../dom.js";
import { empty, failed, head } from "../parts.js";
import { eventList } from "./overview.js";

const KEPT = 1000;

export function open(place) {
  let [all, error, closed, filter] = [null, null, false, ""];
  get("/api/events", { limit: KEPT }).then((answer) => { all = answer.events.reverse(); }, (refused) => { error = refused; }).then(() => closed || draw());
  const draw = () => {
    const shown = (all ?? []).filter((event) => event.text.toLowerCase().includes(filter));
    lay(place, head("Events", "What the cluster has done and decided."),
      h("form", { class: "filters", role: "search", on: { submit: (event) => event.preventDefault() } },
        h("label", { for: "has" }, "Text has", h("input", { id: "has", type: "search", placeholder: "press / to type", autocomplete: "off", on: { input: (event) => { filter = event.target.value.toLowerCase(); draw(); } } }))),
      error ? failed(error) : all === null ? h("p", { class: "loading" }, "Asking the meta group…")
        : shown.length ? h("section", { class: "panel" }, h("h2", { class: "unseen" }, "Events"), eventList(shown)) : empty(filter ? "No event fits" : "Nothing has happened yet"));
  };
  draw();
  return {
    update({ events = [] }) {
      if (all === null) return;
      const last = all[0]?.seq ?? 0;
      const fresh = events.filter((event) => event.seq > last);
      if (fresh.length) {
        all = [...fresh, ...all].slice(0, KEPT);
        draw();
      }
    },
    close() { closed = true; },
  };
}
