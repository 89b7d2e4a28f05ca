// Elements made by hand: whatever a record says becomes text, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with properties (`class`, `onclick`, `aria-…`, `data-…`) and children (texts or elements). */
export function h(tag, properties = {}, ...children) {
  return build(document.createElement(tag), properties, children);
}

/** The same for SVG. */
export function s(tag, properties = {}, ...children) {
  return build(document.createElementNS(SVG, tag), properties, children);
}

function build(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null && child !== ""));
  return element;
}

/** Set a text where it changed. */
export function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

/** Set an attribute where it changed; null takes it away. */
export function attribute(element, name, value) {
  if (value == null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

/** Have `parent` hold one element per item, in order, each made once and updated from then on. */
export function keyed(parent, items, keyOf, make, update) {
  const known = (parent.known ??= new Map());
  const wanted = new Set();
  let at = parent.firstChild;
  for (const item of items) {
    const key = keyOf(item);
    if (wanted.has(key)) continue;
    wanted.add(key);
    let element = known.get(key);
    if (!element) known.set(key, (element = make(item)));
    update(element, item);
    if (element === at) at = at.nextSibling;
    else parent.insertBefore(element, at);
  }
  for (const [key, element] of known) {
    if (!wanted.has(key)) {
      element.remove();
      known.delete(key);
    }
  }
}

/** A text in which `…` is code, as elements. */
export function withCode(value) {
  return value.split("`").map((part, at) => (at % 2 ? h("code", {}, part) : part));
}

let hiding = 0;

/** Say something for a moment. */
export function toast(message) {
  const element = document.getElementById("toast");
  element.textContent = message;
  element.classList.add("shown");
  clearTimeout(hiding);
  hiding = setTimeout(() => element.classList.remove("shown"), 2600);
}

/** Put a text into the clipboard, and say so; where that is not allowed, show it to be copied by hand. */
export async function copy(value) {
  try {
    await navigator.clipboard.writeText(value);
    toast(`Copied: ${value}`);
  } catch {
    toast(value);
  }
}

/** A command line that is copied when it is clicked. */
export function command(line) {
  return h("button", { class: "command", type: "button", title: "Copy", onclick: () => copy(line) }, line);
}
