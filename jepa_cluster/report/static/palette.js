/* Colours: one ordered set for model sizes, by parameters, and another one for all else. */

import { OTHER_COLORS, SIZE_COLORS } from "scaling/constants.js";
import { naturalOrder } from "scaling/format.js";
import { loadedRows } from "scaling/state.js";

/* Parameters are rounded in the document and whole in MLflow. */
const sameSize = (a, b) =>
  a.model === b.model &&
  (a.parameters === b.parameters || Math.abs(a.parameters / b.parameters - 1) < 1e-4);

const pick = (palettes, i, n) => {
  const palette = palettes[Math.min(n, palettes.length) - 1];
  return palette[i % palette.length];
};

/* The sizes of the chosen sweeps, small to large: [{model, parameters, label, color}]. */
export function sizes() {
  const found = [];
  for (const { model_name: model, parameters, model: label } of loadedRows()) {
    const size = { model, parameters: parameters || 0, label };
    if (!found.some((s) => sameSize(s, size))) found.push(size);
  }
  found.sort((a, b) => a.parameters - b.parameters || naturalOrder(a.model, b.model));
  return found.map((s, i) => ({ ...s, color: pick(SIZE_COLORS, i, found.length) }));
}

export const sizeOf = (known, model, parameters) =>
  known.find((s) => sameSize(s, { model, parameters: parameters || 0 }));

export const otherColor = (i, n) => pick(OTHER_COLORS, i, n);

/* Groups of rows by an axis, in their order: {of: row -> name, names, colors: name -> colour}. */
export function groupsBy(axis) {
  if (axis === "model") {
    const known = sizes(), of = (r) => sizeOf(known, r.model_name, r.parameters).label;
    const names = known.map((s) => s.label);
    return { of, names, colors: new Map(known.map((s) => [s.label, s.color])) };
  }
  const of = (r) => String(r[axis] ?? "?");
  const names = [...new Set(loadedRows().map(of))].sort(naturalOrder);
  return { of, names, colors: new Map(names.map((v, i) => [v, otherColor(i, names.length)])) };
}
