// Who was dropped lately, where and why.

import { copy, h, keyed, text } from "./dom.js";
import { clock, plural } from "./format.js";

export class Drops {
  #view = null;

  constructor(section) {
    const redraw = () => this.draw(this.#view);
    this.pipeline = h("select", { "aria-label": "Pipeline", onchange: redraw }, h("option", { value: "" }, "all pipelines"));
    this.outcome = h("select", { "aria-label": "Outcome", onchange: redraw }, h("option", { value: "" }, "all outcomes"));
    this.amount = h("span", { class: "note" });
    this.rows = h("ol", { class: "drops", tabindex: 0, "aria-label": "The newest first" });
    this.empty = h("p", { class: "empty" });
    section.append(h("div", { class: "head" }, h("h2", {}, "Recent drops"), this.amount, h("span", { class: "filters" }, this.pipeline, this.outcome)), this.rows, this.empty);
  }

  draw(view) {
    this.#view = view;
    options(this.pipeline, view.drops.map((drop) => drop.pipeline));
    options(this.outcome, view.drops.map((drop) => drop.outcome));
    const shown = view.drops.filter((drop) => (!this.pipeline.value || drop.pipeline === this.pipeline.value) && (!this.outcome.value || drop.outcome === this.outcome.value));
    text(this.amount, view.drops.length ? plural(shown.length, "request") : "");
    this.rows.hidden = !shown.length;
    this.empty.hidden = shown.length > 0;
    text(this.empty, view.drops.length ? "None like that." : "None. Requests that are dropped, expire or fail are listed here, and why.");
    keyed(this.rows, shown, (drop) => `${drop.at} ${drop.shard} ${drop.request}`, (drop) => this.#row(drop), () => {});
  }

  #row(drop) {
    const line = `laxity trace ${drop.request}${this.#view.cluster === "local" ? "" : ` --cluster ${this.#view.cluster}`}`;
    const why = drop.detail.replace(` at stage '${drop.stage}'`, ""); // which is told before it
    return h("li", {},
      h("time", { datetime: new Date(drop.at * 1e3).toISOString() }, clock(drop.at)),
      h("span", { class: "where" }, drop.pipeline, drop.stage ? h("i", {}, " / ") : null, drop.stage),
      h("span", { class: "outcome", "data-outcome": drop.outcome }, drop.outcome),
      h("span", { class: "why", title: drop.detail }, why),
      h("button", { class: "link id mono", type: "button", title: `Copy: ${line}`, "aria-label": `Copy ${line}`, onclick: () => copy(line) }, drop.request));
  }
}

/** The choices of a filter: what there is, and what is chosen. */
function options(select, values) {
  const wanted = [...new Set([...values, select.value])].filter(Boolean).sort();
  const known = [...select.options].slice(1).map((option) => option.value);
  if (wanted.join("\n") === known.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(select.options[0], ...wanted.map((value) => h("option", { value }, value)));
  select.value = chosen;
}
