// All devices, a cell each, by node: which work, which are free, which are gone. Told by colour and by letter.

import { attribute, command, h, keyed, text } from "./dom.js";
import { count, join, percent, plural } from "./format.js";

/** State by state: its letter in a cell, and what it means. */
export const STATES = {
  busy: ["", "executing"],
  idle: ["·", "holds models, nothing to do"],
  loading: ["L", "a model is being brought in"],
  draining: ["D", "being emptied"],
  lost: ["×", "its agent is gone"],
  standby: ["–", "free: holds nothing"],
};

export class Fleet {
  #asked = "";

  constructor(section, onDevice) {
    this.onDevice = onDevice;
    this.counts = h("p", { class: "counts" });
    this.nodes = h("div", { class: "nodes" });
    this.empty = h("div", { class: "empty", hidden: true }, h("strong", {}, "No node is registered"), "An agent makes a node of a host with GPUs.", h("br"));
    section.append(h("div", { class: "head" }, h("h2", {}, "Devices"), this.counts), this.nodes, this.empty);
  }

  draw(view) {
    this.empty.hidden = view.nodes.length > 0;
    this.nodes.hidden = !this.empty.hidden;
    if (!view.nodes.length && !this.empty.querySelector("button")) {
      this.empty.append(command(`laxity node run --store ${view.store} --cluster ${view.cluster} --agent gpu-host-1 --devices cuda`));
    }
    const totals = new Map(Object.keys(STATES).map((state) => [state, 0]));
    for (const node of view.nodes) for (const device of node.devices) totals.set(device.state, totals.get(device.state) + 1);
    const shown = [...totals].filter(([state, total]) => total || state === "busy");
    keyed(this.counts, view.nodes.length ? shown : [], ([state]) => state,
      ([state]) => h("span", { class: "key cell", "data-state": state, title: STATES[state][1] }, h("i", { "aria-hidden": "true" }, STATES[state][0]), h("b"), ` ${state}`),
      (element, [, total]) => text(element.children[1], count(total)));
    keyed(this.nodes, view.nodes, (node) => node.name, (node) => this.#node(node), (element, node) => this.#update(element, node));
  }

  #node({ name }) {
    return h("div", { class: "node" },
      h("button", { class: "link name", type: "button", onclick: () => this.onDevice(name) }, h("b"), h("small")),
      h("div", { class: "cells" }));
  }

  #update(element, node) {
    const [name, cells] = element.children;
    const devices = plural(node.devices.length, "device");
    text(name.firstChild, node.name);
    text(name.lastChild, node.state === "lost" || node.state === "draining" ? node.state : "");
    attribute(element, "data-state", node.state);
    attribute(name, "aria-label", `Node ${node.name}, ${node.state}, ${devices}`);
    attribute(name, "title", [node.host, devices, node.why].filter(Boolean).join(" · "));
    element.style.setProperty("--cells", Math.min(16, Math.max(2, node.devices.length)));
    keyed(cells, node.devices, (device) => device.number, (device) => this.#cell(node.name, device.number), (cell, device) => {
      attribute(cell, "data-state", device.state);
      text(cell.firstChild, STATES[device.state][0]);
      cell.style.setProperty("--part", device.state === "busy" ? Math.max(0.12, device.utilization) : 0);
      attribute(cell, "aria-label", `${node.name} device ${device.number}: ${device.state}`);
      attribute(cell, "title", about(node, device));
    });
  }

  #cell(node, number) {
    return h("button", { class: "cell", type: "button", onclick: () => this.onDevice(node, number) }, h("i", { "aria-hidden": "true" }));
  }
}

function about(node, device) {
  const lines = [`${node.name} · device ${device.number}${device.type ? ` · ${device.type}` : ""}`, `${device.state}: ${STATES[device.state][1]}`];
  if (device.state === "busy") lines.push(`executing ${join(percent(device.utilization))} of the time`);
  if (device.models.length) lines.push(device.models.slice(0, 8).join(", ") + (device.models.length > 8 ? ` and ${device.models.length - 8} more` : ""));
  return lines.join("\n");
}
