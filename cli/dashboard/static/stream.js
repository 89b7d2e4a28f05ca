// The live views: connects, connects again, and keeps each pipeline's history together.

const QUIET = 6000; // ms without a view after which the connection counts as gone
const HISTORY = 300; // seconds

export class Stream {
  #source = null;
  #timer = 0;
  #watchdog = 0;
  #delay = 500;
  #history = new Map();

  /** `onView(view)` for each one; `onState("connecting" | "live" | "lost")`. */
  constructor(onView, onState) {
    this.onView = onView;
    this.onState = onState;
    document.addEventListener("visibilitychange", () => document.hidden || this.#source || this.connect());
    window.addEventListener("online", () => this.connect());
    this.connect();
  }

  /** At once, rather than when it would be tried again. */
  connect() {
    clearTimeout(this.#timer);
    this.#source?.close();
    const source = (this.#source = new EventSource("api/events"));
    source.addEventListener("full", (event) => this.#take(event));
    source.addEventListener("next", (event) => this.#take(event));
    source.onerror = () => source === this.#source && this.#lost();
    this.#watch();
  }

  #lost() {
    this.#source?.close();
    this.#source = null;
    clearTimeout(this.#watchdog);
    clearTimeout(this.#timer);
    this.onState("lost");
    this.#timer = setTimeout(() => this.connect(), this.#delay);
    this.#delay = Math.min(this.#delay * 1.6, 5000);
  }

  #watch() {
    clearTimeout(this.#watchdog);
    this.#watchdog = setTimeout(() => this.#lost(), QUIET);
  }

  #take(event) {
    const view = JSON.parse(event.data);
    this.#delay = 500;
    this.#watch();
    this.#join(view);
    this.onState("live");
    this.onView(view);
  }

  // After a gap in the connection the server may have begun a new history: what was seen before it stays.
  #join(view) {
    const oldest = view.at - HISTORY;
    const joined = new Map();
    for (const pipeline of view.pipelines) {
      const points = new Map((this.#history.get(pipeline.name) ?? []).map((point) => [point[0], point]));
      for (const point of pipeline.history) points.set(point[0], point);
      pipeline.history = [...points.values()].filter(([at]) => at > oldest && at <= view.at + 1).sort((a, b) => a[0] - b[0]);
      joined.set(pipeline.name, pipeline.history);
    }
    this.#history = joined;
  }
}
