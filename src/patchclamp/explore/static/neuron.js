// The page of one neuron.

import { ask, pageOf } from "./api.js";
import { element, loneToken, notice, plain, section, smallTable } from "./dom.js";
import { histogram } from "./histogram.js";
import { number, plural, share, written } from "./words.js";

const PLACE = ["neuron", "site", "kind", "layer", "index"];

export async function showNeuron(main, about, name) {
  document.title = plain(`${name} · patchclamp`);
  const back = element("a", { href: `/${sessionStorage.getItem("table") ?? ""}`, class: "back" }, "‹ All neurons");
  let neuron;
  try {
    neuron = await ask(`/api/neurons/${encodeURIComponent(name)}`);
  } catch (error) {
    main.replaceChildren(element("nav", { class: "steps" }, back), notice(error.message));
    return;
  }
  document.title = plain(`${neuron.neuron} · ${about.model.name} · patchclamp`);
  main.replaceChildren(
    element(
      "nav", { class: "steps", "aria-label": "Neurons" },
      back, step(neuron.previous, "previous"), step(neuron.next, "next"),
    ),
    ...heading(neuron, about),
    element(
      "div", { class: "columns" },
      element("div", {}, examples(neuron)),
      element("div", {}, triggers(neuron), activations(neuron), byLabel(neuron), nearest(neuron), facts(neuron, about)),
    ),
  );
}

function step(neuron, which) {
  if (!neuron) return null;
  const title = `The ${which} neuron of this site`;
  return element("a", { href: pageOf(neuron), class: which, title }, which === "previous" ? `‹ ${neuron}` : `${neuron} ›`);
}

function heading(neuron, about) {
  const { facts } = neuron;
  const site = about.sites.find((each) => each.name === facts.site);
  const where = [
    facts.layer === null ? facts.kind : `${facts.kind} of layer ${facts.layer}`,
    site?.activation, `fires on ${share(facts.firing_rate) || "none"} of ${plural(facts.count, "token")}`,
    `strong above ${number(facts.threshold)}`,
  ];
  return [
    element("h1", {}, neuron.neuron, facts.striking ? element("span", { class: "badge" }, "★ striking") : null),
    element("p", { class: "lead", id: "headline" }, element("bdi", {}, neuron.headline)),
    element("p", { class: "quiet" }, where.filter(Boolean).join(" · ")),
  ];
}

function examples(neuron) {
  if (!neuron.examples.length) return section("Strongest examples", element("p", { class: "quiet" }, "None."));
  return section(
    "Strongest examples",
    element(
      "p", { class: "quiet" }, "The deeper the colour, the higher its activation; the peak is underlined. ",
      "Rest the pointer on a token to see its value. ",
      element("span", { class: "scale", "aria-hidden": "true" }, "0", element("i"), "peak"),
    ),
    element("ol", { class: "examples" }, neuron.examples.map(example)),
  );
}

function example(row) {
  const labels = Object.entries(row.labels).map(([label, value]) => `${label}: ${value}`);
  const where = [`example ${row.example}`, `position ${row.position}`, ...labels].join(" · ");
  const strongest = Math.max(...row.values.filter((value) => typeof value === "number"), 0);
  const peak = row.position - row.start;
  const text = row.tokens.flatMap((token, place) => shaded(token, row.values[place], strongest, place === peak, !place));
  return element(
    "li", { "data-rank": row.rank },
    element("span", { class: "value", title: String(row.value) }, number(row.value)),
    element("div", {},
      text.length ? element("div", { class: "text", dir: "auto" }, text) : null,
      element("div", { class: "where" }, element("bdi", {}, where))),
  );
}

// The space before a word stays outside its shade.
function shaded(token, value, strongest, isPeak, isFirst) {
  const known = typeof value === "number";
  const strength = known && strongest > 0 ? Math.min(Math.max(value / strongest, 0), 1) : 0;
  const fires = strength >= 0.03;
  const word = token.trimStart() || token;
  const attributes = {
    title: known ? number(value) : "not counted",
    class: [fires && "fires", isPeak && "peak", !known && "uncounted"].filter(Boolean).join(" ") || null,
    "--strength": fires ? strength.toFixed(3) : null,
  };
  const space = isFirst ? "" : token.slice(0, token.length - word.length);
  return [space, element(isPeak ? "mark" : "span", attributes, word)];
}

function triggers(neuron) {
  const title = "Tokens that trigger it";
  if (!neuron.tokens.length) return section(title, element("p", { class: "quiet" }, "None."));
  const heads = ["Token", "of its strong firings", "of the token’s occurrences", "fired"];
  const rows = neuron.tokens.map((row) => [
    loneToken(row.token), meter(row.share_of_firings), meter(row.share_of_token),
    `${number(row.fired)} of ${number(row.occurrences)}`,
  ]);
  return section(title, smallTable("triggers", heads, rows));
}

function meter(part) {
  const width = typeof part === "number" ? Math.min(Math.max(part, 0), 1) : 0;
  return element("td", { class: "figure bar", "--part": `${width * 100}%`, title: String(part ?? "") }, share(part));
}

function activations(neuron) {
  return section("Its activations", histogram(neuron.histogram, neuron.facts));
}

function byLabel(neuron) {
  const labels = [...new Set(neuron.labels.map((row) => row.label))];
  return labels.map((label) => {
    const rows = neuron.labels.filter((row) => row.label === label).map((row) => [
      element("bdi", {}, row.value), number(row.mean), share(row.firing_rate), share(row.strong_rate), number(row.count),
    ]);
    return section(`By ${label}`, smallTable("labels", ["", "Mean", "Fires on", "Strongly on", "Tokens"], rows));
  });
}

function nearest(neuron) {
  if (!neuron.neighbors.length) return section("Nearest neurons", element("p", { class: "quiet" }, "None."));
  const relations = [["layer", "In its own layer"], ["next", "In the next layer"]];
  return section(
    "Nearest neurons",
    element("p", { class: "quiet" }, "Those whose activations go most with its own, or most against it (below 0): correlations."),
    relations.map(([relation, words]) => {
      const rows = neuron.neighbors.filter((row) => row.relation === relation);
      return rows.length ? element("div", { class: "near", "data-relation": relation }, element("h3", {}, words),
        element("ul", {}, rows.map((row) => element("li", {}, element("a", { href: pageOf(row.neuron) }, row.neuron),
          element("span", { class: "figure", title: String(row.correlation) }, number(row.correlation)))))) : null;
    }),
  );
}

function facts(neuron, about) {
  const shown = about.columns.filter((column) => !PLACE.includes(column.name) && column.name in neuron.facts);
  return section(
    "All its numbers",
    element("dl", { class: "facts" }, shown.flatMap((column) => {
      const value = neuron.facts[column.name];
      return [
        element("dt", { title: column.meaning }, column.title),
        element("dd", { "data-column": column.name, title: typeof value === "number" ? String(value) : null },
          element("bdi", {}, written(column, value) || "–")),
      ];
    })),
  );
}
