// What goes on, kept up to date: by one stream while the page is seen, by asking where there is no stream, and not at all while
// nobody looks.

import { get } from "./api.js";

const PARTS = ["you", "overview", "nodes", "problems", "moves", "ended", "events"];
const ASK_MS = 3000;
const LOST_MS = 6000;
const ASKED_BEFORE_STREAM = 10;

export const state = { way: "begins", heard: 0 };
const listeners = new Set();
let source = null;
let asking = null;

export function listen(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function take(name, part) {
  state[name] = part;
  state.heard = Date.now();
  tell();
}

let told = false;
function tell() {
  // Parts of one look come together: once for all of them.
  if (told) return;
  told = true;
  queueMicrotask(() => {
    told = false;
    listeners.forEach((listener) => listener(state));
  });
}

function stream() {
  stop();
  source = new EventSource("/api/live");
  for (const name of PARTS) {
    source.addEventListener(name, (event) => {
      state.way = "live";
      take(name, JSON.parse(event.data));
    });
  }
  source.addEventListener("error", () => {
    // An ended stream is opened anew by the browser; a refused one is not.
    if (source?.readyState === EventSource.CLOSED) ask();
  });
}

function ask() {
  stop();
  let times = 0;
  const once = async () => {
    try {
      const parts = await get("/api/now");
      state.way = "asks";
      for (const name of PARTS) state[name] = parts[name];
      state.heard = Date.now();
    } catch (error) {
      state.why = error.message;
    }
    tell();
    times += 1;
    if (asking !== null && times >= ASKED_BEFORE_STREAM) stream();
  };
  asking = setInterval(once, ASK_MS);
  once();
}

function stop() {
  source?.close();
  clearInterval(asking);
  source = asking = null;
}

export function lost() {
  return state.heard > 0 && Date.now() - state.heard > LOST_MS && !document.hidden;
}

export function begin() {
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return stop();
    state.heard = Date.now();
    stream();
  });
  setInterval(tell, 1000);
  state.begun = Date.now();
  stream();
}
