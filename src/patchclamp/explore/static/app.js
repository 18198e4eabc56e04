// Which page is this? `/` is the table, `/neuron/mlp.3:417` one neuron.

import { ask } from "./api.js";
import { element, notice } from "./dom.js";
import { showNeuron } from "./neuron.js";
import { showTable } from "./table.js";

const main = document.getElementById("main");

async function show() {
  const about = await ask("/api/atlas");
  document.getElementById("model").replaceChildren(element("bdi", {}, about.model.name));
  const path = location.pathname;
  if (path.startsWith("/neuron/")) {
    await showNeuron(main, about, decodeURIComponent(path.slice("/neuron/".length)));
  } else {
    await showTable(main, about);
  }
}

show()
  .catch((error) => main.replaceChildren(notice(error.message)))
  .finally(() => main.removeAttribute("aria-busy"));
