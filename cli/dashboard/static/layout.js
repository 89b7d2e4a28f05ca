// Where a graph's boxes and edges go: columns by depth where there is room, else rows.

const GAP = 14; // between boxes of one depth
const END = 30; // what the ends "in" and "out" take along the flow
const CLOSEST = 18; // between two columns
const FARTHEST = 64;

/** The depth of each stage, and the stages by depth. */
export function layers(stages) {
  const known = new Map(stages.map((stage) => [stage.name, stage]));
  const depth = new Map();
  const visit = (name, above) => {
    if (depth.has(name)) return depth.get(name);
    if (above.has(name)) return 0; // no graph at all; it is drawn somehow
    above.add(name);
    const sources = known.get(name).inputs.filter((input) => known.has(input));
    depth.set(name, sources.length ? 1 + Math.max(...sources.map((source) => visit(source, above))) : 0);
    above.delete(name);
    return depth.get(name);
  };
  const found = [];
  for (const { name } of stages) (found[visit(name, new Set())] ??= []).push(name);
  return [...found].map((layer) => layer ?? []);
}

/** {width, height, vertical, boxes: Map name → {x, y, w, h}, ends: {request, answer}} within `room` px. `box` has the
 * height of a box, and the widths between which it may be. */
export function place(stages, room, box) {
  const columns = layers(stages);
  const widest = (room - 2 * END - (columns.length + 1) * CLOSEST) / columns.length;
  if (widest < box.least && room <= 700) return down(columns, room, box);
  const w = Math.min(Math.max(widest, box.least), box.most);
  const between = (room - 2 * END - columns.length * w) / (columns.length + 1);
  return across(columns, room, { w, h: box.h }, Math.min(Math.max(between, CLOSEST), FARTHEST));
}

function across(columns, room, box, between) {
  const boxes = new Map();
  const tallest = Math.max(...columns.map((column) => column.length), 1);
  const height = tallest * (box.h + GAP) - GAP;
  const width = 2 * END + columns.length * box.w + (columns.length + 1) * between;
  const left = Math.max(0, (room - width) / 2);
  columns.forEach((column, depth) => {
    const top = (height - (column.length * (box.h + GAP) - GAP)) / 2;
    column.forEach((name, at) => boxes.set(name, { x: left + END + between + depth * (box.w + between), y: top + at * (box.h + GAP), ...box }));
  });
  const ends = { request: { x: left, y: height / 2 - 12, w: END, h: 24 }, answer: { x: left + width - END, y: height / 2 - 12, w: END, h: 24 } };
  return { width: left + width, height, vertical: false, boxes, ends };
}

function down(columns, room, box) {
  const boxes = new Map();
  const row = Math.max(1, Math.floor((room + GAP) / (150 + GAP)));
  const between = 30;
  let y = 24 + between;
  for (const column of columns) {
    for (let first = 0; first < column.length; first += row) {
      const part = column.slice(first, first + row);
      const w = Math.min(box.most, (room - (part.length - 1) * GAP) / part.length);
      const left = (room - part.length * (w + GAP) + GAP) / 2;
      part.forEach((name, at) => boxes.set(name, { x: left + at * (w + GAP), y, w, h: box.h }));
      y += box.h + (first + row < column.length ? GAP : between);
    }
  }
  const middle = (room - END) / 2;
  return { width: room, height: y + 24, vertical: true, boxes, ends: { request: { x: middle, y: 0, w: END, h: 24 }, answer: { x: middle, y, w: END, h: 24 } } };
}

/** A curve from one box to another. */
export function curve(from, to, vertical) {
  if (vertical) {
    const [x1, y1, x2, y2] = [from.x + from.w / 2, from.y + from.h, to.x + to.w / 2, to.y];
    const bend = Math.max(14, (y2 - y1) / 2);
    return `M${x1},${y1}C${x1},${y1 + bend} ${x2},${y2 - bend} ${x2},${y2}`;
  }
  const [x1, y1, x2, y2] = [from.x + from.w, from.y + from.h / 2, to.x, to.y + to.h / 2];
  const bend = Math.max(18, (x2 - x1) / 2);
  return `M${x1},${y1}C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`;
}
