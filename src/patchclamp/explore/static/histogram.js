// The histogram of a neuron's activations, drawn as SVG.
//
// Every bin is as wide as every other: the bins themselves grow by octaves away from zero, so the axis
// is logarithmic on both sides of it. Heights are logarithmic too, or the few strong firings that
// matter would not show beside the many weak ones.

import { drawing, element, smallTable } from "./dom.js";
import { number, plural } from "./words.js";

const WIDTH = 520, HEIGHT = 210, LEFT = 44, RIGHT = 8, TOP = 22, BOTTOM = 26;

export function histogram(bins, facts) {
  if (!bins.length) return element("p", { class: "quiet" }, "No activation was counted.");
  const known = bins.map((bin) => ({ low: Number(bin.low), high: Number(bin.high), count: bin.count }));
  const tallest = Math.max(...known.map((bin) => bin.count), 1);
  const step = (WIDTH - LEFT - RIGHT) / known.length;
  const x = (place) => LEFT + place * step;
  const y = (count) => HEIGHT - BOTTOM - (Math.log1p(count) / Math.log1p(tallest)) * (HEIGHT - TOP - BOTTOM);
  const threshold = facts.threshold;
  const words = `Histogram of ${plural(facts.count, "activation")} from ${number(facts.min)} to ${number(facts.max)}` +
    (typeof threshold === "number" ? `, strong above ${number(threshold)}.` : ".");
  const chart = drawing(
    "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": words, class: "histogram" },
    heightLines(tallest, y),
    known.map((bin, place) => bar(bin, place, x, y, step, threshold)),
    ticks(known, x),
    mark(known, threshold, x),
  );
  return element(
    "figure", {}, chart,
    element(
      "figcaption", { class: "quiet" }, "Both axes are logarithmic.",
      element("span", { class: "legend" }, element("span", { class: "key strong" }), " strong"),
      element("span", { class: "legend" }, element("span", { class: "key" }), " weaker"),
    ),
    element("details", { class: "tall" }, element("summary", {}, "The counts as numbers"), numbers(known)),
  );
}

function bar(bin, place, x, y, step, threshold) {
  const isStrong = typeof threshold === "number" && bin.low >= threshold;
  const top = bin.count ? Math.min(y(bin.count), HEIGHT - BOTTOM - 1.5) : HEIGHT - BOTTOM;
  const gap = step > 4 ? 1 : 0;
  return drawing(
    "g", { class: "bin", "data-count": bin.count },
    drawing("title", {}, `${range(bin)}: ${plural(bin.count, "token")}`),
    // The whole height answers to the pointer, else a low bar could not be hit.
    drawing("rect", { class: "reach", x: x(place), y: TOP, width: step, height: HEIGHT - TOP - BOTTOM }),
    drawing("rect", {
      class: isStrong ? "column strong" : "column",
      x: x(place) + gap / 2, y: top, width: step - gap, height: HEIGHT - BOTTOM - top,
    }),
  );
}

function heightLines(tallest, y) {
  const lines = [];
  for (let count = 1; count <= tallest; count *= 10) {
    lines.push(drawing("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(count), y2: y(count) }));
    lines.push(drawing("text", { class: "tick", x: LEFT - 6, y: y(count) + 4, "text-anchor": "end" }, short(count)));
  }
  return lines;
}

function ticks(bins, x) {
  const values = [0];
  for (let exponent = 3; exponent >= -4; exponent -= 1) values.push(10 ** exponent, -(10 ** exponent));
  // The rounder and larger come first; one that would run into a neighbour is left out.
  const taken = [];
  return values.flatMap((value) => {
    const place = placeOf(bins, value);
    if (place === null || taken.some((other) => Math.abs(other - x(place)) < 40)) return [];
    taken.push(x(place));
    return [
      drawing("line", { class: "axis", x1: x(place), x2: x(place), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4 }),
      drawing("text", { class: "tick", x: x(place), y: HEIGHT - BOTTOM + 17, "text-anchor": "middle" }, number(value)),
    ];
  });
}

function mark(bins, threshold, x) {
  const place = typeof threshold === "number" ? placeOf(bins, threshold) : null;
  if (place === null) return null;
  const [side, anchor] = x(place) > WIDTH * 0.6 ? [-6, "end"] : [6, "start"];
  return drawing(
    "g", { class: "threshold", "data-threshold": threshold },
    drawing("line", { x1: x(place), x2: x(place), y1: TOP - 6, y2: HEIGHT - BOTTOM }),
    drawing("text", { x: x(place) + side, y: TOP - 8, "text-anchor": anchor }, `strong above ${number(threshold)}`),
  );
}

// Where a value lies, in bins from the left; null outside.
function placeOf(bins, value) {
  const place = bins.findIndex((bin) => bin.low <= value && value < bin.high);
  if (place < 0) return null;
  const { low, high } = bins[place];
  return place + (Number.isFinite(high - low) ? (value - low) / (high - low) : 0.5);
}

function numbers(bins) {
  const filled = bins.filter((bin) => bin.count);
  const rows = filled.map((bin) => [number(written(bin.low)), number(written(bin.high)), number(bin.count)]);
  return smallTable("", ["From", "To below", "Tokens"], rows, ["figure", "figure", "figure"]);
}

const written = (value) => (Number.isFinite(value) ? value : String(value));
const range = (bin) => `${number(written(bin.low))} to ${number(written(bin.high))}`;
const short = (count) => (count >= 1e6 ? `${count / 1e6}M` : count >= 1e3 ? `${count / 1e3}k` : String(count));
