// What was recorded, in words, above the table.

import { element, smallTable } from "./dom.js";
import { number, plural } from "./words.js";

export function recordingFacts(about) {
  const { model, data } = about;
  return [
    element("h1", {}, element("bdi", {}, model.name)),
    element(
      "p", { class: "lead" },
      `${plural(about.neurons, "neuron")} at ${plural(about.sites.length, "site")}, recorded on `,
      `${plural(data.tokens, "token")} of ${plural(data.examples, "example")} of `, element("bdi", {}, data.name), ".",
    ),
    element("p", {}, strikingWords(about.striking)),
    element("details", {}, element("summary", {}, "About this recording"), details(about)),
  ];
}

function strikingWords(striking) {
  const what = "strong firings gather on a family of words (purity), and reach many of its occurrences (coverage).";
  if (!striking) return `No neuron is striking: of none the ${what}`;
  return `${number(striking)} of them ${striking === 1 ? "is" : "are"} striking (★): ${striking === 1 ? "its" : "their"} ${what}`;
}

function details(about) {
  const { model, data } = about;
  const facts = [
    ["Model", model.class], ["Weights, SHA-256", model.weights_sha256],
    ["Data", data.name], ["Data, SHA-256", data.sha256],
    ["Recorded", about.created], ["patchclamp", about.patchclamp],
    ...Object.entries(about.labels).map(([label, values]) => [`Label “${label}”`, values.join(", ")]),
  ];
  const told = facts.filter(([, value]) => value !== undefined && value !== null && value !== "");
  const sites = about.sites.map((site) => [
    site.name, site.kind, String(site.layer ?? ""), number(site.size), site.activation ?? "",
  ]);
  const heads = ["Site", "Kind", "Layer", "Neurons", "Nonlinearity"];
  return element(
    "div", { class: "about" },
    element("dl", {}, told.flatMap(([name, value]) => [
      element("dt", {}, name), element("dd", {}, element("bdi", {}, String(value))),
    ])),
    smallTable("sites", heads, sites, ["words", "words", "figure", "figure", "words"]),
  );
}
