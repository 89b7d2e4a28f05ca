// All that is known of one stage, device or node, beside the page; it follows what is live.

import { h } from "./dom.js";
import { count, join, percent, time } from "./format.js";
import { STATES } from "./fleet.js";

export class Detail {
  #shown = null; // view → [title, subtitle, rows, actions] or null once it is gone
  #said = "";
  #asking = false;
  #from = null;

  constructor(element, session) {
    this.element = element;
    this.session = session;
    document.addEventListener("keydown", (event) => event.key === "Escape" && !document.querySelector("dialog[open]") && this.close());
  }

  showStage(pipeline, stage, view) {
    this.#open(view, (now) => {
      const found = now.pipelines.find((one) => one.name === pipeline)?.stages.find((one) => one.name === stage);
      return found && [found.name, `stage of ${pipeline}`, stageRows(found), []];
    });
  }

  showDevice(node, number, view) {
    this.#open(view, (now) => {
      const its = now.nodes.find((one) => one.name === node);
      const device = its?.devices.find((one) => one.number === number);
      return device && [`Device ${number}`, `of ${node}`, deviceRows(device, its), this.#actions(its, now)];
    });
  }

  showNode(node, view) {
    this.#open(view, (now) => {
      const its = now.nodes.find((one) => one.name === node);
      return its && [its.name, "node", nodeRows(its), this.#actions(its, now)];
    });
  }

  draw(view) {
    const found = this.#shown?.(view);
    if (!this.#shown) return;
    if (!found) return this.close();
    const [title, subtitle, rows, actions] = found;
    const said = JSON.stringify([title, subtitle, rows, actions.map((action) => action.textContent), this.session.signedIn]);
    if (said === this.#said) return;
    this.#said = said;
    const focused = this.element.contains(document.activeElement) ? document.activeElement.textContent : null;
    this.element.replaceChildren(
      h("header", {}, h("h2", {}, title, h("small", {}, subtitle)), h("button", { class: "plain", type: "button", "aria-label": "Close the details", onclick: () => this.close() }, "Close")),
      h("dl", {}, ...rows.flatMap(([name, value, mark]) => [h("dt", {}, name), h("dd", { class: mark ?? "" }, value)])),
      actions.length ? h("div", { class: "actions" }, ...actions) : "");
    if (focused != null) [...this.element.querySelectorAll("button")].find((button) => button.textContent === focused)?.focus();
  }

  close() {
    if (this.element.hidden) return;
    this.element.hidden = true;
    this.#shown = null;
    this.#from?.focus();
  }

  #open(view, shown) {
    if (!this.element.contains(document.activeElement)) this.#from = document.activeElement;
    this.#shown = shown;
    this.#said = "";
    this.#asking = false;
    this.element.hidden = false;
    this.draw(view);
    this.element.focus();
  }

  // ---- what may be done with a node -----------------------------------------------------------

  #actions(node, view) {
    if (view.fixed_plan) return [h("p", {}, "The plan of this cluster is fixed: nobody empties nodes. Coordinators do.")];
    if (!this.session.possible) return [];
    const button = (kind, label, onclick) => h("button", { class: kind, type: "button", onclick }, label);
    if (!this.session.signedIn) return [h("p", {}, "Signed in, you can have this node drained."), button("plain", "Sign in", () => this.session.ask())];
    if (node.drained) return [button("primary", "Take it back", () => this.session.resume(node.name))];
    const ask = (asking) => () => { this.#asking = asking; this.draw(view); };
    if (!this.#asking) return [button("danger", "Drain node…", ask(true))];
    const drain = () => { this.#asking = false; this.session.drain(node.name); this.draw(view); };
    return [h("p", {}, `What ${node.name} holds is loaded elsewhere first; no request is lost by it.`), button("danger", "Drain it", drain), button("plain", "Cancel", ask(false))];
  }
}

const perSecond = (value) => `${count(value)}/s`;

function stageRows(stage) {
  const rows = [
    ["gets its input from", stage.inputs.join(", ")],
    ["devices that hold it", count(stage.devices)],
    ["arrivals", perSecond(stage.arrived)],
    ["executed", perSecond(stage.started)],
    ["dropped or expired", perSecond(stage.dropped), stage.dropped > 0 ? "bad" : ""],
    ["waiting", count(stage.waiting)],
    ["batches", perSecond(stage.batches)],
    ["mean batch", stage.batch ? stage.batch.toFixed(1) : "–"],
    ["mean execution of a batch", join(time(stage.batches ? stage.execution : null))],
    ["mean queueing delay", join(time(stage.started ? stage.queued : null))],
    ["slack, median", join(time(stage.slack))],
    ["slack, 10th percentile", join(time(stage.least_slack))],
    ["load factor μ", stage.load_factor.toFixed(2), stage.load_factor > 1 ? "bad" : ""],
    ["order", stage.order || "–"],
  ];
  if (stage.map) rows.splice(1, 0, ["map", "once for each item"]);
  if (stage.failed) rows.push(["failed", stage.failed, "bad"]);
  return rows;
}

function deviceRows(device, node) {
  const memory = device.budget_mb ? `${count(Math.round(device.memory_mb))} of ${count(Math.round(device.budget_mb))} MB` : device.memory_mb ? `${count(Math.round(device.memory_mb))} MB` : "–";
  return [
    ["state", `${device.state}: ${STATES[device.state][1]}`, device.state === "lost" ? "bad" : ""],
    ["type", device.type || "–"],
    ["executing", device.state === "lost" ? "–" : join(percent(device.utilization))],
    ["models", device.models.join(", ") || "none"],
    ["shard", device.shard || "–"],
    ["memory of its models", memory],
    ["node", `${node.name}${node.why ? ` (${node.why})` : ""}`],
  ];
}

function nodeRows(node) {
  const states = {};
  for (const device of node.devices) states[device.state] = (states[device.state] ?? 0) + 1;
  return [
    ["state", node.state, node.state === "lost" ? "bad" : ""],
    ["why", node.why || "–"],
    ["host", node.host || "–"],
    ["agent", node.registered ? "here" : "gone"],
    ["devices", Object.entries(states).map(([state, total]) => `${total} ${state}`).join(", ") || "none"],
    ["types", [...new Set(node.devices.map((device) => device.type).filter(Boolean))].join(", ") || "–"],
  ];
}
