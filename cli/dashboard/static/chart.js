// The last minutes of one pipeline: what was offered as a line, what was good filled, what was lost on top of it.

import { attribute, h, s, text } from "./dom.js";
import { clock, count, join, time } from "./format.js";

const SPANS = [60, 120, 300]; // seconds that are shown: the fewest that have all there is
const LEFT = 46, RIGHT = 10, TOP = 10, BOTTOM = 22;
const GAP = 3; // seconds without a point that end a line

export class Chart {
  #points = [];
  #scale = null;
  #height = 168;
  #span = SPANS[0];
  #at = null; // the second that is read out

  constructor() {
    this.grid = s("g", { class: "grid" });
    this.lost = s("path", { class: "lost" });
    this.good = s("path", { class: "good-area" });
    this.goodLine = s("path", { class: "good-line" });
    this.offered = s("path", { class: "offered" });
    this.cursor = s("g", { class: "cursor", visibility: "hidden" }, s("line", { y1: TOP }), s("circle", { r: 3.5 }));
    this.svg = s("svg", { role: "img", tabindex: 0 }, this.grid, this.good, this.lost, this.goodLine, this.offered, this.cursor);
    this.readout = h("div", { class: "readout", hidden: true });
    this.legend = h("p", { class: "legend" },
      h("span", { class: "key offered" }, "offered"), h("span", { class: "key good" }, "good"), h("span", { class: "key lost" }, "dropped, expired or failed"));
    this.nothing = h("p", { class: "nothing" }, "No request in the last five minutes");
    this.element = h("figure", { class: "chart" }, h("div", { class: "plot" }, this.svg, this.readout, this.nothing), this.legend);
    this.svg.addEventListener("pointermove", (event) => this.#read(this.#second(event.offsetX)));
    this.svg.addEventListener("pointerleave", () => this.#read(null));
    this.svg.addEventListener("blur", () => this.#read(null));
    this.svg.addEventListener("keydown", (event) => this.#step(event));
  }

  draw({ name, history }, at) {
    const width = this.element.clientWidth - 8;
    if (width <= 0) return;
    const height = (this.#height = Math.round(Math.min(Math.max(150, innerHeight * 0.23), 280)));
    const end = Math.floor(at);
    this.#points = history.filter(([second]) => second > end - SPANS.at(-1));
    const oldest = this.#points[0]?.[0] ?? end;
    const span = (this.#span = SPANS.find((seconds) => oldest > end - seconds) ?? SPANS.at(-1));
    const most = nice(Math.max(1, ...this.#points.map(([, offered, good, lost]) => Math.max(offered, good + lost))));
    const x = (second) => LEFT + ((second - (end - span)) / span) * (width - LEFT - RIGHT);
    const y = (value) => TOP + (1 - value / most) * (height - TOP - BOTTOM);
    this.#scale = { x, y, width, end };
    attribute(this.svg, "width", width);
    attribute(this.svg, "height", height);
    attribute(this.svg, "viewBox", `0 0 ${width} ${height}`);
    attribute(this.cursor.firstChild, "y2", height - BOTTOM);
    this.#drawGrid(most);
    const runs = split(this.#points);
    const path = (make) => runs.map(make).join("");
    const line = (value) => (run) => `M${run.map((point) => `${x(point[0]).toFixed(1)},${y(value(point)).toFixed(1)}`).join("L")}`;
    const band = (upper, lower) => (run) => `${line(upper)(run)}L${run.toReversed().map((point) => `${x(point[0]).toFixed(1)},${y(lower(point)).toFixed(1)}`).join("L")}Z`;
    attribute(this.good, "d", path(band((p) => p[2], () => 0)));
    attribute(this.lost, "d", path(band((p) => p[2] + p[3], (p) => p[2])));
    attribute(this.goodLine, "d", path(line((p) => p[2])));
    attribute(this.offered, "d", path(line((p) => p[1])));
    this.nothing.hidden = this.#points.length > 0;
    const last = this.#points.at(-1);
    attribute(this.svg, "aria-label", last
      ? `${name} over the last minutes: now ${count(last[1])} offered, ${count(last[2])} good and ${count(last[3])} lost per second. Arrow keys read out other times.`
      : `${name}: no request in the last five minutes`);
    if (this.#at != null) this.#read(this.#at);
  }

  #drawGrid(most) {
    const { x, y, width, end } = this.#scale;
    const lines = [];
    for (const value of [0, most / 2, most]) {
      lines.push(s("line", { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), class: value ? "" : "base" }));
      lines.push(s("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, count(value)));
    }
    const ticks = this.#span === 300 && width > 480 ? 5 : 2;
    for (let tick = 0; tick <= ticks; tick += 1) {
      const ago = (tick * this.#span) / ticks;
      const anchor = tick === 0 ? "end" : tick === ticks ? "start" : "middle";
      lines.push(s("text", { x: x(end - ago), y: this.#height - 5, "text-anchor": anchor }, ago ? `−${join(time(ago))}` : "now"));
    }
    this.grid.replaceChildren(...lines);
  }

  #second(offset) {
    const { width, end } = this.#scale;
    return end - this.#span + ((offset - LEFT) / (width - LEFT - RIGHT)) * this.#span;
  }

  #step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -30, PageDown: 30, Home: -SPANS.at(-1), End: SPANS.at(-1) }[event.key];
    if (!by || !this.#points.length) return;
    event.preventDefault();
    this.#read((this.#at ?? this.#points.at(-1)[0]) + by);
  }

  #read(second) {
    const near = second == null ? null : this.#points.reduce((best, point) => (!best || Math.abs(point[0] - second) < Math.abs(best[0] - second) ? point : best), null);
    this.#at = near ? near[0] : null;
    this.readout.hidden = !near;
    attribute(this.cursor, "visibility", near ? "visible" : "hidden");
    if (!near) return;
    const { x, y, width } = this.#scale;
    const [at, offered, good, lost] = near;
    attribute(this.cursor.firstChild, "x1", x(at));
    attribute(this.cursor.firstChild, "x2", x(at));
    attribute(this.cursor.lastChild, "cx", x(at));
    attribute(this.cursor.lastChild, "cy", y(good));
    text(this.readout, `${clock(at)}   ${count(offered)}/s offered   ${count(good)}/s good   ${count(lost)}/s lost`);
    const half = this.readout.offsetWidth / 2;
    this.readout.style.setProperty("left", `${Math.min(Math.max(x(at), half), width - half)}px`);
  }
}

/** The smallest of a few round numbers times a power of ten that is not below a value. */
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value * 1.04) * power || 10 * power;
}

function split(points) {
  const runs = [];
  for (const point of points) {
    const run = runs.at(-1);
    if (run && point[0] - run.at(-1)[0] <= GAP) run.push(point);
    else runs.push([point]);
  }
  return runs;
}
