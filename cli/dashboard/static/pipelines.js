// All pipelines in a list, where there are several, and the chosen one in full.

import { attribute, command, h, keyed, text } from "./dom.js";
import { count, goodPart, grade, join, percent, time } from "./format.js";
import { Panel } from "./panel.js";

const MOST_ROWS = 200;

export class Pipelines {
  #view = null;
  #search = "";
  #chosen = null;

  /** `onStage(pipeline, stage)` when somebody wants to know more of one. */
  constructor(section, onStage) {
    this.search = h("input", {
      type: "search", placeholder: "Find a pipeline", "aria-label": "Find a pipeline",
      oninput: (event) => { this.#search = event.target.value.toLowerCase(); this.draw(this.#view); },
    });
    this.amount = h("span", { class: "note" });
    this.rows = h("tbody");
    const heads = ["", "offered", "goodput", "good", "p99 / SLO", "in flight"];
    this.list = h("div", { class: "card list", hidden: true },
      h("div", { class: "head" }, h("h2", {}, "Pipelines"), this.amount, this.search),
      h("div", { class: "rows" }, h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "pipeline"), ...heads.map((head) => h("th", { scope: "col" }, head)))), this.rows)));
    this.panel = new Panel(onStage);
    this.empty = h("div", { class: "card empty", hidden: true }, h("strong", {}, "No pipeline is applied"), "What is to be served is told by a file, or taken from those that are shipped.", h("br"));
    section.append(this.list, this.empty, this.panel.element);
    window.addEventListener("hashchange", () => this.#view && this.draw(this.#view));
  }

  draw(view) {
    this.#view = view;
    const { pipelines } = view;
    this.list.hidden = pipelines.length < 2;
    this.empty.hidden = pipelines.length > 0;
    if (!pipelines.length && !this.empty.querySelector("button")) this.empty.append(command(`laxity pipeline apply ocr${cluster(view)}`));
    const asked = decodeURIComponent(location.hash.slice(1));
    this.#chosen = pipelines.find((one) => one.name === asked) ?? busiest(pipelines, this.#chosen);
    if (!this.list.hidden) this.#drawList(pipelines);
    this.panel.element.hidden = !this.#chosen;
    if (this.#chosen) this.panel.draw(this.#chosen, view);
  }

  #drawList(pipelines) {
    this.search.hidden = pipelines.length <= 8;
    const found = pipelines.filter((one) => one.name.toLowerCase().includes(this.#search));
    const shown = found.length > MOST_ROWS ? [...found].sort((a, b) => b.offered - a.offered).slice(0, MOST_ROWS) : found;
    text(this.amount, shown.length < pipelines.length ? `${count(shown.length)} of ${count(pipelines.length)}` : count(pipelines.length));
    keyed(this.rows, shown, (one) => one.name, (one) => this.#row(one), (row, one) => this.#update(row, one));
  }

  #row({ name }) {
    const choose = () => { location.hash = encodeURIComponent(name); };
    return h("tr", { onclick: choose },
      h("th", { scope: "row" }, h("button", { class: "link", type: "button" }, name)),
      h("td", {}, h("canvas", { class: "spark", width: 160, height: 40, "aria-hidden": "true" })),
      ...Array.from({ length: 5 }, () => h("td")));
  }

  #update(row, one) {
    attribute(row, "aria-current", one.name === this.#chosen?.name ? "true" : null);
    const part = goodPart(one.outcomes);
    const [, spark, offered, good, share, latency, flight] = row.cells;
    drawSpark(spark.firstChild, one);
    text(offered, `${count(one.offered)}/s`);
    text(good, one.waits_for && !one.offered ? "waits" : `${count(one.good)}/s`);
    attribute(good, "title", one.waits_for || null);
    text(share, join(percent(part)));
    attribute(share, "class", grade(part));
    text(latency, one.latency ? `${join(time(one.latency[1]))} / ${join(time(one.slo))}` : "–");
    text(flight, count(one.in_flight));
  }
}

function busiest(pipelines, before) {
  const same = before && pipelines.find((one) => one.name === before.name);
  return same ?? pipelines.reduce((most, one) => (!most || one.offered > most.offered ? one : most), null);
}

function cluster(view) {
  return view.cluster === "local" ? "" : ` --cluster ${view.cluster}`;
}

/** The last minute, in small: offered as a line, good filled. */
function drawSpark(canvas, { history }) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  const style = getComputedStyle(canvas);
  context.clearRect(0, 0, width, height);
  const points = history.slice(-60);
  const most = Math.max(1e-9, ...points.map(([, offered, good]) => Math.max(offered, good)));
  if (points.length < 2 || most < 1e-6) return;
  const last = points.at(-1)[0];
  const x = (at) => width - ((last - at) / 59) * width;
  const y = (value) => height - 2 - (value / most) * (height - 5);
  const line = (index) => {
    context.beginPath();
    for (const point of points) context.lineTo(x(point[0]), y(point[index]));
  };
  line(2);
  context.lineTo(width, height);
  context.lineTo(x(points[0][0]), height);
  context.fillStyle = style.getPropertyValue("accent-color");
  context.globalAlpha = 0.25;
  context.fill();
  context.globalAlpha = 1;
  context.lineWidth = 2;
  context.strokeStyle = style.color;
  line(1);
  context.stroke();
}
