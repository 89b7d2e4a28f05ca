// The cluster at a glance, and whether what is shown is of now.

import { attribute, h, keyed, text, withCode } from "./dom.js";
import { clock, count, join, rate } from "./format.js";

const CONNECTION = { connecting: "connecting", live: "live", lost: "reconnecting…" };

export class Header {
  #state = "connecting";
  #view = null;
  #locked = false;

  constructor() {
    this.cluster = document.getElementById("cluster");
    this.facts = document.getElementById("facts");
    this.live = document.getElementById("live");
    this.banner = document.getElementById("banner");
  }

  connection(state) {
    this.#state = state;
    this.#tell();
  }

  /** Whether nothing is told before somebody signs in. */
  lock(locked) {
    this.#locked = locked;
    this.#tell();
  }

  draw(view) {
    this.#view = view;
    text(this.cluster, view.cluster);
    keyed(this.facts, facts(view), ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd")), (element, [, value, title]) => {
      text(element.lastChild, value);
      attribute(element, "title", title);
    });
    this.#tell();
  }

  #tell() {
    const stale = this.#view?.stale ?? "";
    const state = this.#state === "live" && stale ? "away" : this.#state;
    attribute(this.live, "data-state", state);
    text(this.live.lastChild, state === "away" ? "store away" : state === "lost" && this.#locked ? "signed out" : CONNECTION[state]);
    document.body.classList.toggle("old", state === "away" || state === "lost");
    document.body.classList.toggle("waiting", !this.#view);
    let banner = "";
    if (state === "lost" && this.#locked) {
      banner = "Sign in to see this cluster.";
    } else if (state === "lost") {
      banner = this.#view ? `Nobody answers at this address: shown is what was at ${clock(this.#view.at)}. Trying again…` : "Nobody answers at this address. Trying again…";
    } else if (state === "away") banner = `Requests are served on, but shown is what was known before: ${stale}`;
    else if (this.#view?.missing) banner = `${this.#view.missing[0].toUpperCase()}${this.#view.missing.slice(1)}.`;
    if (this.banner.dataset.said !== banner) this.banner.replaceChildren(...withCode(banner));
    this.banner.dataset.said = banner;
    this.banner.hidden = !banner;
    document.title = title(this.#view, state);
  }
}

function facts(view) {
  const leader = view.leader || (view.fixed_plan ? "the plan is fixed" : "none");
  const others = view.coordinators.filter((name) => name !== view.leader);
  const found = [
    ["leader", leader, others.length ? `standing by: ${others.join(", ")}` : null],
    ["store", view.stale ? "away" : view.store.replace(/^sqlite:\/\/.*\//, "sqlite …/"), view.store],
    ["shards", String(view.shards.length), view.shards.map((shard) => `${shard.name}: ${shard.frontend}, ${join(rate(shard.submitted))}, ${count(shard.in_flight)} in flight`).join("\n") || null],
  ];
  if (view.pipelines.length > 1) {
    const total = (key) => view.pipelines.reduce((sum, pipeline) => sum + pipeline[key], 0);
    found.push(["all pipelines", `${join(rate(total("good")))} good of ${join(rate(total("offered")))}`, null]);
  }
  return found;
}

function title(view, state) {
  if (!view) return "laxity";
  const mark = state === "live" ? "" : "⚠ ";
  const good = view.pipelines.reduce((sum, pipeline) => sum + pipeline.good, 0);
  return `${mark}${count(good)}/s good · ${view.cluster} · laxity`;
}
