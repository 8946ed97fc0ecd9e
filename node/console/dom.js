// Elements from plain calls, and the one way in which a page changes: what is new is laid over what is there, so that focus,
// selection and scrolling stay where they are. Nothing is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

export function h(name, props, ...children) {
  return fill(document.createElement(name), props, children);
}

export function svg(name, props, ...children) {
  return fill(document.createElementNS(SVG, name), props, children);
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") listen(node, value);
    else if (name === "key") node.key = value;
    else if (name === "style") Object.entries(value).forEach(([at, to]) => node.style.setProperty(at, to));
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...flat(children));
  return node;
}

function flat(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}

function listen(node, handlers) {
  node.handlers = handlers;
  for (const type of Object.keys(handlers)) node.addEventListener(type, heard);
}

function heard(event) {
  return event.currentTarget.handlers?.[event.type]?.(event);
}

// Lays these children over those of a place.
export function lay(place, ...children) {
  const fresh = flat(children).map((child) => (child instanceof Node ? child : document.createTextNode(child)));
  const keyed = new Map();
  for (const child of place.childNodes) if (child.key !== undefined) keyed.set(child.key, child);
  let at = place.firstChild;
  for (const node of fresh) {
    let match = null;
    if (node.key !== undefined) match = keyed.get(node.key) ?? null;
    else if (same(at, node)) match = at;
    else if (same(at?.nextSibling, node)) {
      const gone = at;
      at = match = at.nextSibling;
      gone.remove();
    }
    if (match && same(match, node)) {
      if (match === at) at = at.nextSibling;
      else place.insertBefore(match, at);
      patch(match, node);
    } else {
      place.insertBefore(node, at);
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function same(old, fresh) {
  return Boolean(old) && old.nodeName === fresh.nodeName && old.key === fresh.key;
}

function patch(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) {
    // A dialog's or a fold's state is whoever opened it.
    if (name !== "style" && name !== "open" && !fresh.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (name !== "style" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (old.style.cssText !== fresh.style.cssText) old.style.cssText = fresh.style.cssText;
  if (fresh.handlers) {
    for (const type of Object.keys(fresh.handlers)) {
      if (!old.handlers?.[type]) old.addEventListener(type, heard);
    }
  }
  old.handlers = fresh.handlers;
  // What is being typed or chosen is the reader's.
  if ("value" in fresh && old !== document.activeElement && old.value !== fresh.value) old.value = fresh.value;
  lay(old, ...fresh.childNodes);
}

// Says something once to whoever does not see the screen, and shows it for a while.
export function say(text, kind = "good") {
  const place = document.getElementById("said");
  const note = h("p", { class: kind }, text);
  place.replaceChildren(note);
  setTimeout(() => note.remove(), 8000);
}
