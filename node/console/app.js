// The frame around the pages: where one is, how things stand, and which page the address names.

import { h, lay } from "./dom.js";
import { begin, listen, lost, state } from "./live.js";
import { isGrave, loading } from "./parts.js";
import * as events from "./pages/events.js";
import * as heat from "./pages/heat.js";
import * as matrix from "./pages/matrix.js";
import * as moves from "./pages/moves.js";
import * as nodes from "./pages/nodes.js";
import * as overview from "./pages/overview.js";
import * as predicate from "./pages/predicate.js";
import * as problems from "./pages/problems.js";

const PAGES = [
  ["", "Overview", overview],
  ["matrix", "Matrix", matrix],
  ["moves", "Moves", moves],
  ["problems", "Problems", problems],
  ["nodes", "Nodes", nodes],
  ["heat", "Heat map", heat],
  ["events", "Events", events],
];

const main = document.getElementById("main");
const menu = document.getElementById("menu");
let open = null;

// `#/matrix?sort=size` and `#/predicate/NAME`.
function address() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/");
  return { name, rest: decodeURIComponent(rest.join("/")), query: new URLSearchParams(query ?? "") };
}

function go(event) {
  const { name, rest, query } = address();
  const [, title, page] = name === "predicate" ? ["", rest, predicate] : PAGES.find(([path]) => path === name) ?? PAGES[0];
  open?.close?.();
  document.title = `${title} · Pontoon`;
  fold(false);
  main.replaceChildren(loading());
  open = page.open(main, rest, query);
  if (state.overview) open.update?.(state);
  frame();
  if (event) {
    scrollTo(0, 0);
    (document.getElementById("title") ?? main).focus({ preventScroll: true });
  }
}

function badge(path) {
  const number = { moves: state.moves?.length, problems: state.problems?.length }[path] ?? 0;
  if (!number) return null;
  const bad = path === "problems" && state.problems.some(isGrave);
  return h("span", { class: `badge ${path === "problems" ? (bad ? "bad" : "warn") : ""}` }, String(number));
}

function frame() {
  const { name } = address();
  lay(document.getElementById("nav"), h("ul", {}, PAGES.map(([path, title]) => h("li", {}, h("a", {
    href: `#/${path}`,
    "aria-current": path === name || (name === "predicate" && path === "matrix") ? "page" : null,
  }, title, " ", badge(path))))));
  const way = lost() ? "lost" : state.way;
  const words = { live: "Live", asks: "Asks every 3 s", lost: "No answer", begins: "Connecting" }[way];
  const now = state.overview;
  lay(document.getElementById("here"),
    h("p", { class: `pulse ${way}` }, h("span", { class: "dot", "aria-hidden": "true" }), words),
    now ? h("p", {}, `n${now.node} at ${now.address}`) : null,
    state.you ? h("p", {}, `${state.you.name} · ${state.you.acts ? "may act" : "read-only"}`) : null,
    now ? h("p", { class: "cluster", title: now.cluster }, `Pontoon ${now.version}`) : null);
  lay(document.getElementById("trouble"),
    lost() || (!state.heard && state.why)
      ? h("p", { class: "banner bad" }, "The node does not answer. What is shown is from ",
        state.heard ? `${Math.round((Date.now() - state.heard) / 1000)} s ago` : "before", ". If it has stopped, open the console of another node.")
      : now && !now.meta_answers
        ? h("p", { class: "banner warn" }, "The meta group does not answer: data is served, nothing is moved or made until it has a leader again.")
        : null);
}

function fold(unfold) {
  menu.setAttribute("aria-expanded", String(unfold));
  document.body.classList.toggle("unfolded", unfold);
}

menu.addEventListener("click", () => fold(menu.getAttribute("aria-expanded") !== "true"));
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && document.body.classList.contains("unfolded")) {
    fold(false);
    menu.focus();
  }
  const typing = event.target.closest?.("input, select, textarea, dialog");
  if (event.key === "/" && !typing) {
    const filter = document.querySelector("input[type=search]");
    if (filter) {
      event.preventDefault();
      filter.focus();
    }
  }
});
addEventListener("hashchange", go);
listen(() => {
  frame();
  if (state.overview) open?.update?.(state);
});
go();
begin();
