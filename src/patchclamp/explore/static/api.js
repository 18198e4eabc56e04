// Ask the server; a refusal becomes an Error with the server's own sentence.

export async function ask(path, signal) {
  let response;
  try {
    response = await fetch(path, { signal, headers: { Accept: "application/json" } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The explorer does not answer. Is “patchclamp explore” still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(sentence(answer.detail) ?? `The explorer answered ${response.status}.`);
  return answer;
}

function sentence(detail) {
  if (typeof detail === "string") return detail;
  if (Array.isArray(detail)) return detail.map((each) => `${each.loc?.at(-1)}: ${each.msg}`).join("; ");
  return undefined;
}

export const pageOf = (neuron) => `/neuron/${encodeURIComponent(neuron).replaceAll("%3A", ":")}`;
