// Puts the page's parts together: each view that comes is drawn by all of them.

import { Detail } from "./detail.js";
import { Drops } from "./drops.js";
import { Fleet } from "./fleet.js";
import { Header } from "./header.js";
import { Pipelines } from "./pipelines.js";
import { Session } from "./session.js";
import { Stream } from "./stream.js";
import { startTheme } from "./theme.js";

const element = (id) => document.getElementById(id);
let view = null;
let connection = "";

startTheme(element("theme"));
const session = new Session(element("session"), element("sign-in"), () => {
  parts[0].lock(session.locked);
  if (!session.locked && connection === "lost") stream.connect();
  if (view) detail.draw(view);
});
const detail = new Detail(element("detail"), session);
const parts = [
  new Header(),
  new Pipelines(element("pipelines"), (pipeline, stage) => detail.showStage(pipeline, stage, view)),
  new Fleet(element("fleet"), (node, device) => (device == null ? detail.showNode(node, view) : detail.showDevice(node, device, view))),
  new Drops(element("drops")),
  detail,
];

function draw() {
  for (const part of parts) part.draw(view);
}

const stream = new Stream(
  (next) => {
    view = next;
    draw();
  },
  (state) => {
    if (state !== "live" || connection !== "live") session.refresh();
    connection = state;
    parts[0].connection(state);
  },
);

let resizing = 0;
window.addEventListener("resize", () => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(() => view && draw());
});
