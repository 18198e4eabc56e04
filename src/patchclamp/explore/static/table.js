// The table of neurons. What it shows stands in the address, so that a view can be kept and sent.

import { ask, pageOf } from "./api.js";
import { element, loneToken, notice, plain } from "./dom.js";
import { recordingFacts } from "./recording.js";
import { number, plural, written } from "./words.js";

const ROWS = 50;
const FIRST_COLUMNS = [
  "neuron", "family", "score", "purity", "coverage", "firing_rate", "strong_rate", "label_value", "label_contrast", "max",
];
const TOKENS = new Set(["family", "top_token"]);
const BARS = new Set(["score", "purity", "coverage", "top_token_purity", "top_token_coverage"]);

export async function showTable(main, about) {
  document.title = plain(`${about.model.name} · patchclamp`);
  const view = fromAddress(about);
  const parts = {
    head: element("thead"),
    body: element("tbody"),
    count: element("p", { class: "count", role: "status" }),
    pages: element("nav", { class: "pages", "aria-label": "Pages of the table" }),
    message: element("div"),
  };
  const table = element(
    "table", { class: "neurons" }, element("caption", { class: "unseen" }, "Neurons"), parts.head, parts.body,
  );
  let running = new AbortController();

  async function draw() {
    running.abort();
    running = new AbortController();
    toAddress(view);
    table.setAttribute("aria-busy", "true");
    try {
      const page = await ask(`/api/neurons?${query(view, ROWS)}`, running.signal);
      if (page.total && page.offset >= page.total) return change({ page: Math.ceil(page.total / ROWS) });
      drawHead(parts.head, about, view, change);
      drawBody(parts.body, about, view, page.neurons);
      drawPages(parts, page, view, change);
      parts.message.replaceChildren();
    } catch (error) {
      if (error.name === "AbortError") return;
      parts.message.replaceChildren(notice(error.message));
    }
    table.removeAttribute("aria-busy");
  }

  function change(news) {
    Object.assign(view, { page: 1 }, news);
    return draw();
  }

  main.replaceChildren(
    element("div", { class: "intro" }, ...recordingFacts(about)),
    controls(about, view, change),
    parts.message,
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of neurons" }, table),
    element("div", { class: "under" }, parts.count, parts.pages),
  );
  await draw();
}

function controls(about, view, change) {
  let waiting;
  const search = element("input", {
    type: "search", id: "search", value: view.search, placeholder: "return, mlp.1, …", autocomplete: "off", spellcheck: "false",
    oninput: (event) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => change({ search: event.target.value }), 150);
    },
  });
  const site = element(
    "select", { id: "site", onchange: (event) => change({ site: event.target.value }) },
    element("option", { value: "" }, "all sites"),
    about.sites.map((each) => element("option", { value: each.name, selected: each.name === view.site }, each.name)),
  );
  const striking = element("input", {
    type: "checkbox", id: "striking", checked: view.striking, onchange: (event) => change({ striking: event.target.checked }),
  });
  const all = element("input", {
    type: "checkbox", id: "all-columns", checked: view.all,
    onchange: (event) => change({ all: event.target.checked, page: view.page }),
  });
  return element(
    "form", { class: "controls", role: "search", onsubmit: (event) => event.preventDefault() },
    element("label", { for: "search", class: "grow" }, element("span", {}, "Word, token or name"), search),
    element("label", { for: "site" }, element("span", {}, "Site"), site),
    element("label", { for: "striking", class: "tick" }, striking, "striking only"),
    element("label", { for: "all-columns", class: "tick" }, all, "all columns"),
  );
}

function drawHead(head, about, view, change) {
  const focused = document.activeElement?.dataset?.column;
  const cells = columnsOf(about, view).map((column) => {
    const sorted = view.sort === column.name;
    const button = element(
      "button", {
        type: "button", "data-column": column.name, title: column.meaning,
        // Numbers are looked at from the largest, names from the first.
        onclick: () => change({ sort: column.name, descending: sorted ? !view.descending : column.kind !== "text" }),
      },
      column.title,
      element("span", { class: "arrow", "aria-hidden": "true" }, sorted ? (view.descending ? "▼" : "▲") : ""),
    );
    const order = sorted ? (view.descending ? "descending" : "ascending") : "none";
    return element("th", { scope: "col", "aria-sort": order, class: kindClass(column) }, button);
  });
  head.replaceChildren(element("tr", {}, cells));
  if (focused) head.querySelector(`[data-column="${CSS.escape(focused)}"]`)?.focus();
}

function drawBody(body, about, view, neurons) {
  const columns = columnsOf(about, view);
  body.replaceChildren(...neurons.map((row) => element("tr", {}, columns.map((column) => cell(column, row)))));
  if (!neurons.length) {
    body.append(element("tr", {}, element("td", { colspan: columns.length, class: "none" }, "No neuron is like that.")));
  }
}

function cell(column, row) {
  const value = row[column.name];
  const attributes = { class: kindClass(column), "data-column": column.name };
  if (column.name === "neuron") {
    const star = row.striking ? element("span", { class: "star", title: "striking" }, "★") : null;
    return element("th", { scope: "row", ...attributes }, element("a", { href: pageOf(value) }, value), star);
  }
  if (TOKENS.has(column.name)) return element("td", attributes, value ? loneToken(value) : null);
  if (column.kind === "text") return element("td", attributes, element("bdi", {}, written(column, value)));
  const isBar = BARS.has(column.name) && typeof value === "number";
  const bar = isBar ? { class: `${attributes.class} bar`, "--part": `${Math.min(Math.max(value, 0), 1) * 100}%` } : {};
  const exact = typeof value === "number" ? String(value) : null;
  return element("td", { ...attributes, ...bar, title: exact }, written(column, value));
}

function drawPages(parts, page, view, change) {
  const last = Math.max(Math.ceil(page.total / page.limit), 1);
  const first = page.total ? page.offset + 1 : 0;
  parts.count.textContent = page.total
    ? `${number(first)}–${number(page.offset + page.neurons.length)} of ${plural(page.total, "neuron")}`
    : "0 neurons";
  const go = (to, title, words) => {
    const disabled = to < 1 || to > last || to === view.page;
    return element("button", { type: "button", disabled, "aria-label": title, onclick: () => change({ page: to }) }, words);
  };
  parts.pages.replaceChildren(
    go(1, "First page", "« First"), go(view.page - 1, "Previous page", "‹ Previous"),
    element("span", {}, `page ${number(view.page)} of ${number(last)}`),
    go(view.page + 1, "Next page", "Next ›"), go(last, "Last page", "Last »"),
  );
}

function columnsOf(about, view) {
  if (view.all) return about.columns;
  return FIRST_COLUMNS.map((name) => about.columns.find((column) => column.name === name)).filter(Boolean);
}

const kindClass = (column) => (column.kind === "text" ? "words" : column.kind === "flag" ? "flag" : "figure");

function query(view, rows) {
  const { sort, descending } = view;
  const asked = new URLSearchParams({ sort, descending, offset: (view.page - 1) * rows, limit: rows });
  if (view.search.trim()) asked.set("search", view.search.trim());
  if (view.site) asked.set("site", view.site);
  if (view.striking) asked.set("striking", "true");
  return asked;
}

function fromAddress(about) {
  const asked = new URLSearchParams(location.search);
  const page = Number(asked.get("page"));
  return {
    sort: asked.get("sort") ?? "score",
    descending: asked.get("descending") !== "false",
    search: asked.get("search") ?? "",
    site: about.sites.some((site) => site.name === asked.get("site")) ? asked.get("site") : "",
    striking: asked.get("striking") === "true",
    all: asked.get("all") === "true",
    page: Number.isInteger(page) && page > 0 ? Math.min(page, 1e6) : 1,
  };
}

function toAddress(view) {
  const said = new URLSearchParams();
  if (view.sort !== "score") said.set("sort", view.sort);
  if (!view.descending) said.set("descending", "false");
  if (view.search) said.set("search", view.search);
  if (view.site) said.set("site", view.site);
  if (view.striking) said.set("striking", "true");
  if (view.all) said.set("all", "true");
  if (view.page > 1) said.set("page", view.page);
  history.replaceState(null, "", said.size ? `/?${said}` : "/");
  sessionStorage.setItem("table", location.search);
}
