// One pipeline in full: its numbers, its last five minutes, its graph.

import { Chart } from "./chart.js";
import { attribute, h, text, withCode } from "./dom.js";
import { count, goodPart, grade, join, percent, rate, time } from "./format.js";
import { Graph } from "./graph.js";

export class Panel {
  constructor(onStage) {
    this.name = h("h2", { class: "name" });
    this.about = h("span", { class: "note" });
    this.waits = h("p", { class: "waits", role: "status", hidden: true });
    this.offered = tile("Offered", "Requests that came, per second");
    this.good = tile("Goodput", "Requests answered within the SLO, per second", "main");
    this.part = tile("Good", "Of the requests that ended, the part that was answered within the SLO");
    this.median = tile("p50", "The median latency of those that were answered");
    this.tail = tile("p99", "The 99th percentile of the latency of those that were answered");
    this.meter = h("i", { class: "meter", "aria-hidden": "true" }, h("b"));
    this.tail.element.append(this.meter);
    this.flight = tile("In flight", "Requests that came and have not ended");
    this.tuning = h("div", { class: "tile tuning" });
    this.chart = new Chart();
    this.graph = new Graph(onStage);
    const tiles = [this.offered, this.good, this.part, this.median, this.tail, this.flight];
    this.element = h("article", { class: "card panel" },
      h("div", { class: "head" }, this.name, this.about),
      this.waits,
      h("div", { class: "tiles" }, ...tiles.map((one) => one.element), this.tuning),
      this.chart.element,
      this.graph.element);
  }

  draw(pipeline, view) {
    const part = goodPart(pipeline.outcomes);
    attribute(this.element, "aria-label", `Pipeline ${pipeline.name}`);
    text(this.name, pipeline.name);
    text(this.about, `SLO ${join(time(pipeline.slo))} · policy ${pipeline.policy} · version ${pipeline.version}`);
    const waits = pipeline.waits_for ? `Waiting: ${pipeline.waits_for}` : "";
    if (this.waits.dataset.said !== waits) this.waits.replaceChildren(...withCode(waits));
    this.waits.dataset.said = waits;
    this.waits.hidden = !pipeline.waits_for;
    const admission = pipeline.admission ?? 1;
    this.offered.set(...rate(pipeline.offered), "", admission < 1 ? `${join(percent(admission))} let in` : "");
    this.good.set(...rate(pipeline.good));
    this.part.set(...percent(part), grade(part), why(pipeline.outcomes));
    this.median.set(...time(pipeline.latency?.[0]));
    const tail = pipeline.latency?.[1];
    const late = tail > pipeline.slo;
    this.tail.set(...time(tail), late ? "bad" : "", `of ${join(time(pipeline.slo))}`);
    this.meter.firstChild.style.setProperty("--part", Math.min(1, (tail ?? 0) / (pipeline.slo || 1)));
    attribute(this.meter, "data-grade", late ? "bad" : null);
    const waiting = pipeline.stages.reduce((sum, stage) => sum + stage.waiting, 0);
    this.flight.set(count(pipeline.in_flight), "", "", `${count(waiting)} queued`);
    this.#drawTuning(pipeline);
    this.chart.draw(pipeline, view.at);
    this.graph.draw(pipeline);
  }

  #drawTuning({ quantile, window, admission }) {
    const known = [
      ["λ", quantile == null ? "–" : quantile.toFixed(2), "The quantile of batch waits that the drop reckons with"],
      ["window", join(time(window)), "The time over which queueing delays are averaged"],
      ["admission", join(percent(admission)), "The part of the requests that is let in"],
    ];
    this.tuning.replaceChildren(...known.map(([name, value, title]) => h("div", { title }, h("span", {}, name), h("b", { class: name === "admission" && admission < 1 ? "warn" : "" }, value))));
  }
}

function tile(name, title, kind = "") {
  const value = h("b");
  const unit = h("small");
  const more = h("em");
  const element = h("div", { class: `tile ${kind}`, title }, h("span", {}, name), h("p", {}, value, unit), more);
  element.dataset.tile = name;
  return {
    element,
    set(number, its, mark = "", note = "") {
      text(value, number);
      text(unit, its);
      text(more, note);
      attribute(element, "data-grade", mark || null);
    },
  };
}

/** The largest of what went wrong: "12/s dropped". */
function why(outcomes) {
  const [outcome, most] = Object.entries(outcomes)
    .filter(([name, value]) => name !== "ok" && name !== "cancelled" && value > 0)
    .reduce((largest, one) => (one[1] > largest[1] ? one : largest), ["", 0]);
  return outcome ? `${count(most)}/s ${outcome}` : "";
}
