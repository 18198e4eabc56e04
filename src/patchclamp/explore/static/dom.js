// Making elements. Text only ever enters through text nodes: whatever a corpus holds, it stays text.

export function element(tag, attributes = {}, ...children) {
  const made = fill(document.createElement(tag), attributes);
  made.append(...children.flat().filter(given).flatMap((child) => (typeof child === "string" ? spelled(child) : [child])));
  return made;
}

export function drawing(tag, attributes = {}, ...children) {
  const made = fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);
  made.append(...children.flat().filter(given).map((child) => (typeof child === "string" ? plain(child) : child)));
  return made;
}

const given = (child) => child !== undefined && child !== null && child !== "";

function fill(made, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) made.style.setProperty(name, value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  return made;
}

export const notice = (text) => element("p", { class: "notice", role: "alert" }, text);

export function section(title, ...children) {
  return element("section", {}, element("h2", {}, title), ...children);
}

// A small table in a box that scrolls. The first cell of a row names it; a cell is a text, an element to
// put into one, or a cell already. `kinds` are the classes of the columns.
export function smallTable(name, heads, rows, kinds = heads.map((_, place) => (place ? "figure" : "words"))) {
  const row = (cells) => cells.map((cell, place) => {
    if (cell instanceof HTMLTableCellElement) return cell;
    return element(place ? "td" : "th", { class: kinds[place], scope: place ? null : "row" }, cell);
  });
  const head = heads.map((title, place) => element("th", { class: kinds[place], scope: "col" }, title));
  return element("div", { class: "scroll" }, element(
    "table", { class: `small ${name}` },
    element("thead", {}, element("tr", {}, head)),
    element("tbody", {}, rows.map((cells) => element("tr", {}, row(cells)))),
  ));
}

// Characters without a shape of their own, and marks that turn or hide the text around them. They are
// written out (\x1b, \u202e), as the terminal card does, so that what one reads is what is there.
// Spaces, line breaks and tabs stay; so do joiners, which emoji and several scripts are written with.
const STEERING = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u200b\\u200e\\u200f" +
    "\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]",
);

function code(character) {
  const number = character.codePointAt(0);
  return number < 0x100 ? `\\x${number.toString(16).padStart(2, "0")}` : `\\u${number.toString(16).padStart(4, "0")}`;
}

// The text with its steering characters written out, as a string.
export const plain = (text) => [...text].map((character) => (STEERING.test(character) ? code(character) : character)).join("");

// The same as pieces of a page, where what is written out looks different from what was there.
function spelled(text) {
  if (!STEERING.test(text)) return [text];
  return text.split(new RegExp(`(${STEERING.source})`)).filter(Boolean).map((piece) => {
    if (!STEERING.test(piece)) return piece;
    const written = fill(document.createElement("span"), { class: "code" });
    written.textContent = code(piece);
    return written;
  });
}

// A token on its own, in a list. The space before a word is part of its token, and tells " back" from the
// "back" in "feedback": it is drawn, as is any other space at the edges.
const SPACES = { " ": "␣", "\n": "⏎", "\t": "⇥" };

export function loneToken(text) {
  const [, before, word, after] = text.match(/^([ \n\t]*)([^]*?)([ \n\t]*)$/);
  const drawn = (spaces) => spaces && element("span", { class: "code" }, [...spaces].map((each) => SPACES[each]).join(""));
  return element("bdi", { class: "token" }, text ? [drawn(before), word, drawn(after)] : "(empty)");
}
