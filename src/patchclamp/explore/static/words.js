// How values are written: the same rules as `patchclamp.atlas.words`.

// 4 significant digits, thousands grouped, "" for none.
export function number(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "string") return value === "Infinity" ? "∞" : value === "-Infinity" ? "-∞" : value;
  const size = Math.abs(value);
  if ((Number.isInteger(value) || size >= 999.95) && size < 1e15) return grouped(value);
  const rounded = Number(value.toPrecision(4));
  if (rounded === 0) return "0";
  if (Math.abs(rounded) >= 0.0001 && Math.abs(rounded) < 1000) return shorn(plain(rounded));
  const [digits, exponent] = value.toExponential(3).split("e");
  return `${shorn(digits)}e${Number(exponent)}`;
}

// Percent with 3 significant digits, "" for none.
export function share(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "string") return number(value);
  const percent = Number((value * 100).toPrecision(3));
  return `${percent === 0 ? "0" : shorn(plain(percent))}%`;
}

// A value of the table, as its column is written.
export function written(column, value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (column.kind === "text") return String(value);
  return column.kind === "share" ? share(value) : number(value);
}

export const plural = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;

// Halves go away from zero, as in the Python rules.
function grouped(value) {
  return new Intl.NumberFormat("en-US", { maximumFractionDigits: 0, roundingMode: "halfExpand" }).format(value + 0);
}

// Without an exponent, however small.
function plain(value) {
  return Math.abs(value) >= 1e-6 ? String(value) : value.toFixed(20);
}

const shorn = (digits) => (digits.includes(".") && !digits.includes("e") ? digits.replace(/\.?0+$/, "") : digits);
