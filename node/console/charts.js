// Pictures of numbers, as SVG. Each says in words what it shows.

import { svg } from "./dom.js";
import { brief, clock } from "./words.js";

const HIGH = 150;
const LEFT = 38;
const BOTTOM = 20;

// The next round number at or above one.
function round(most) {
  const power = 10 ** Math.floor(Math.log10(Math.max(most, 1)));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= most) ?? most;
}

// Series over time, so many units wide: `points` are [seconds, value …], one value for each of `names`.
export function lines(points, names, label, wide) {
  const [from, to] = [points[0]?.[0] ?? 0, points.at(-1)?.[0] ?? 1];
  const most = round(Math.max(10, ...points.flatMap((point) => point.slice(1))));
  const x = (second) => LEFT + ((wide - LEFT - 4) * (second - from)) / Math.max(1, to - from);
  const y = (value) => 6 + (HIGH - BOTTOM - 6) * (1 - value / most);
  const path = (at) => points.map((point, place) => `${place ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[at]).toFixed(1)}`).join("");
  const marks = [0, most / 2, most];
  const last = points.at(-1) ?? [];
  const words = names.map((name, at) => `${name} ${brief(last[at + 1] ?? 0)} per second`).join(", ");
  return svg("svg", { class: "lines", viewBox: `0 0 ${wide} ${HIGH}`, role: "img", "aria-label": `${label}. Now: ${words}.` },
    marks.map((mark) => [
      svg("line", { class: "rule", x1: LEFT, x2: wide - 4, y1: y(mark), y2: y(mark) }),
      svg("text", { class: "axis end", x: LEFT - 6, y: y(mark) + 4 }, brief(mark)),
    ]),
    names.map((_, at) => points.length > 1 ? [
      at === 0 ? svg("path", { class: `area s${at}`, d: `${path(at + 1)}L${x(to)} ${y(0)}L${x(from)} ${y(0)}Z` }) : null,
      svg("path", { class: `line s${at}`, d: path(at + 1) }),
    ] : null),
    points.length > 1 ? [
      svg("text", { class: "axis", x: LEFT, y: HIGH - 4 }, clock(from * 1000)),
      svg("text", { class: "axis end", x: wide - 4, y: HIGH - 4 }, clock(to * 1000)),
    ] : null);
}

export const STEPS = 7;

// How hot a value is, from 0 for nothing to STEPS for the most: by orders of magnitude, since few are busy and many are not.
export function warmth(value, most) {
  if (value <= 0) return 0;
  return Math.max(1, Math.ceil((STEPS * Math.log1p(value)) / Math.log1p(most)));
}
