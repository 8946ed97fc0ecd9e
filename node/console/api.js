// The node's answers. An error carries the node's own words, which name the next step.

const PATIENCE_MS = 20_000;

export class Refusal extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

export function get(path, query = {}) {
  const set = Object.entries(query).filter(([, value]) => value !== "" && value !== undefined && value !== null);
  const search = new URLSearchParams(set).toString();
  return ask(search ? `${path}?${search}` : path, {});
}

export function post(path, order) {
  return ask(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(order),
  });
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { ...options, signal: AbortSignal.timeout(PATIENCE_MS) });
  } catch (error) {
    throw new Refusal(0, "The node does not answer. It may have stopped: try another node's address.", { cause: error });
  }
  const text = await answer.text();
  if (answer.ok) return JSON.parse(text);
  let words = text.trim();
  try {
    words = JSON.parse(text).error ?? words;
  } catch {
    // Plain words, as they are.
  }
  throw new Refusal(answer.status, words || `The node answered ${answer.status}.`);
}
