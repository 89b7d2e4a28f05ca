// Numbers for people, in as few characters as tell them apart.

/** 0.42, 7.5, 412, 12.3k */
export function count(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return `${short(value / 1e9)}G`;
  if (size >= 1e6) return `${short(value / 1e6)}M`;
  if (size >= 1e4) return `${short(value / 1e3)}k`;
  if (Number.isInteger(value) || size >= 100) return Math.round(value).toLocaleString("en");
  return size >= 10 ? trim(value.toFixed(1)) : trim(value.toFixed(size >= 1 ? 1 : 2));
}

/** As count, where there is little room: 412, 1.6k, 12k */
export function tight(value) {
  return Math.abs(value) >= 1e3 && Math.abs(value) < 1e4 ? `${short(value / 1e3)}k` : count(value);
}

function short(value) {
  return Math.abs(value) >= 100 ? Math.round(value).toString() : trim(value.toFixed(1));
}

function trim(digits) {
  return digits.includes(".") ? digits.replace(/\.?0+$/, "") : digits;
}

/** [number, unit] of a rate. */
export function rate(value) {
  return [count(value), "/s"];
}

/** [number, unit] of seconds. */
export function time(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return ["–", ""];
  const size = Math.abs(seconds);
  if (size >= 60) return [trim((seconds / 60).toFixed(1)), " min"];
  if (size >= 1) return [trim(seconds.toFixed(2)), " s"];
  const ms = seconds * 1e3;
  return [Math.abs(ms) >= 10 ? Math.round(ms).toString() : trim(ms.toFixed(1)), " ms"];
}

/** [number, unit] of a part (0 to 1). Never says 100 where it is less. */
export function percent(part) {
  if (part == null || !Number.isFinite(part)) return ["–", ""];
  const value = part * 100;
  if (value >= 99.95) return [value >= 100 ? "100" : "99.9", "%"];
  return [value >= 10 ? trim((Math.floor(value * 10) / 10).toFixed(1)) : trim(value.toFixed(1)), "%"];
}

export const join = ([number, unit]) => number + unit;

/** A time of day from Unix seconds. */
export function clock(unix) {
  return new Date(unix * 1e3).toLocaleTimeString("en-GB");
}

/** "1 device", "3 devices" */
export function plural(number, one, several = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : several}`;
}

/** The part of a pipeline's ended requests that were answered in time; null where none ended. */
export function goodPart(outcomes) {
  let ended = 0;
  for (const [outcome, value] of Object.entries(outcomes)) if (outcome !== "cancelled") ended += value;
  return ended > 0 ? (outcomes.ok ?? 0) / ended : null;
}

/** Whether a part of good requests is fine, worrying or bad. */
export function grade(part) {
  if (part == null) return "";
  return part >= 0.99 ? "good" : part >= 0.9 ? "warn" : "bad";
}
