// A pipeline's graph: a box for each stage with how it does, edges as wide as what goes along them.

import { attribute, h, keyed, s, text } from "./dom.js";
import { count, join, tight, time } from "./format.js";
import { curve, place } from "./layout.js";

const BOX = { least: 140, most: 216, h: 122 };

export class Graph {
  #pipeline = "";

  constructor(onStage) {
    this.onStage = onStage;
    this.edges = s("svg", { class: "edges", "aria-hidden": "true" });
    this.request = h("span", { class: "end" }, "in");
    this.answer = h("span", { class: "end" }, "out");
    this.boxes = h("div", { class: "boxes" });
    this.field = h("div", { class: "field" }, this.edges, this.request, this.answer, this.boxes);
    this.element = h("div", { class: "graph", role: "group", "aria-label": "The pipeline's stages", tabindex: -1 }, this.field);
  }

  draw(pipeline) {
    const room = this.element.clientWidth - 32;
    if (room <= 0) return;
    const placed = place(pipeline.stages, room, BOX);
    this.field.style.setProperty("width", `${placed.width}px`);
    this.field.style.setProperty("height", `${placed.height}px`);
    if (this.#pipeline !== pipeline.name) this.boxes.known?.forEach((box) => box.remove()), this.boxes.known?.clear();
    this.#pipeline = pipeline.name;
    keyed(this.boxes, pipeline.stages, (stage) => stage.name, (stage) => this.#box(stage), (box, stage) => {
      put(box, placed.boxes.get(stage.name));
      update(box, stage, pipeline);
    });
    put(this.request, placed.ends.request);
    put(this.answer, placed.ends.answer);
    this.#drawEdges(pipeline, placed);
  }

  #drawEdges({ stages, outputs, offered, good }, { boxes, ends, vertical, width, height }) {
    attribute(this.edges, "viewBox", `0 0 ${width} ${height}`);
    const started = new Map(stages.map((stage) => [stage.name, stage.started]));
    const most = Math.max(offered, ...started.values(), 1e-9);
    const edges = stages.flatMap((stage) => stage.inputs.map((input) => [boxes.get(input) ?? ends.request, boxes.get(stage.name), input === "request" ? offered : (started.get(input) ?? 0), `${input}→${stage.name}`]));
    for (const name of outputs) edges.push([boxes.get(name), ends.answer, good, `${name}→`]);
    keyed(this.edges, edges, (edge) => edge[3], () => s("path"), (path, [from, to, flow]) => {
      attribute(path, "d", curve(from, to, vertical));
      attribute(path, "stroke-width", (1.25 + 3 * Math.sqrt(flow / most)).toFixed(2));
      attribute(path, "class", flow > 0 ? "flows" : null);
    });
  }

  #box({ name }) {
    const part = (kind, ...children) => h("span", { class: kind }, ...children);
    return h("button", { class: "stage", type: "button", onclick: () => this.onStage(this.#pipeline, name) },
      part("title", h("b"), h("small", {}, "map")),
      part("rates", h("strong"), h("em")),
      part("figures", figure("queue"), figure("devices"), figure("batch"), figure("μ")),
      part("slack", h("i", {}, h("b")), h("small")));
  }
}

function figure(name) {
  return h("span", { class: "figure" }, h("small", {}, name), h("b"));
}

function put(element, { x, y, w, h: height }) {
  for (const [name, value] of Object.entries({ left: x, top: y, width: w, height })) element.style.setProperty(name, `${value}px`);
}

function update(box, stage, pipeline) {
  const [title, rates, figures, slack] = box.children;
  text(title.firstChild, stage.name);
  title.lastChild.hidden = !stage.map;
  text(rates.firstChild, `${tight(stage.arrived)}/s`);
  text(rates.lastChild, stage.failed ? "failed to load" : stage.dropped > 0 ? `−${tight(stage.dropped)}/s` : "");
  const values = [count(stage.waiting), count(stage.devices), stage.batch ? stage.batch.toFixed(stage.batch < 10 ? 1 : 0) : "–", stage.load_factor.toFixed(2)];
  values.forEach((value, at) => text(figures.children[at].lastChild, value));
  attribute(figures.children[3], "data-grade", stage.load_factor > 1 ? "bad" : stage.load_factor > 0.9 ? "warn" : null);
  const part = roominess(stage, pipeline.slo);
  slack.firstChild.firstChild.style.setProperty("--part", part ?? 0);
  attribute(slack, "data-grade", part == null ? null : part < 0.15 ? "bad" : part < 0.4 ? "warn" : "good");
  text(slack.lastChild, stage.slack == null ? "no grants" : `${join(time(stage.slack))} slack`);
  attribute(box, "data-grade", stage.failed || stage.dropped > 0.01 * stage.arrived ? "bad" : null);
  attribute(figures.children[1], "data-grade", stage.devices ? null : "bad");
  attribute(box, "aria-label", `Stage ${stage.name}: ${count(stage.arrived)} arrivals and ${count(stage.dropped)} drops per second, ${count(stage.waiting)} waiting, ${stage.devices} devices`);
}

/** The median slack as a part (0 to 1) of what is plenty: as long as two batches take, or a fifth of the SLO. */
export function roominess(stage, slo) {
  if (stage.slack == null) return null;
  return Math.min(1, Math.max(0, stage.slack / Math.max(2 * stage.execution, 0.2 * slo, 1e-6)));
}
