// Numbers and times as people read them.

const SIZES = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

export function bytes(count) {
  let at = 0;
  while (count >= 1024 && at < SIZES.length - 1) [count, at] = [count / 1024, at + 1];
  return `${at === 0 || count >= 100 ? Math.round(count) : count.toFixed(1)} ${SIZES[at]}`;
}

export function count(number) {
  return Math.round(number).toLocaleString("en");
}

// A rate in little room: 950, 1.2k, 34k.
export function brief(number) {
  if (number < 1000) return String(Math.round(number));
  if (number < 1e6) return `${number < 1e4 ? (number / 1e3).toFixed(1) : Math.round(number / 1e3)}k`;
  return `${(number / 1e6).toFixed(1)}M`;
}

export function duration(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 10_000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms < 600_000) return `${Math.round(ms / 1000)} s`;
  if (ms < 36_000_000) return `${Math.round(ms / 60_000)} min`;
  if (ms < 864_000_000) return `${Math.round(ms / 3_600_000)} h`;
  return `${Math.round(ms / 86_400_000)} days`;
}

export function millis(ms) {
  return ms === null || ms === undefined ? "–" : `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

export function clock(ms) {
  return new Date(ms).toLocaleTimeString("en-GB");
}

// The day beside it where it might be another one.
export function moment(ms) {
  const at = new Date(ms);
  const day = Math.abs(Date.now() - ms) < 43_200_000 ? "" : `${at.toLocaleDateString("en-CA")} `;
  return day + at.toLocaleTimeString("en-GB");
}

export function many(number, one, more = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : more}`;
}
