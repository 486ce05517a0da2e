/* What is shown: the view in the page's address, the controls that change it, and the rows that
   it selects. */

import { SHAPES, SIZE_AXES } from "scaling/constants.js";
import {
  $,
  axisName,
  axisTitle,
  element,
  isError,
  LABEL_FREE,
  naturalOrder,
  OWN_MASK_LOSSES,
  shortTitle,
  X_METRICS,
} from "scaling/format.js";
import { documents, sweeps } from "scaling/api.js";

const DEFAULTS = {
  view: "",
  sweeps: "",
  y: "",
  x: "flops_total",
  color: "",
  shape: "auto",
  facet: "",
  setting: "",
  levels: "",
  logx: "1",
  logy: "1",
  curves: "1",
  law: "1",
  beyond: "0",
  frontier: "1",
  reference: "0",
};
const VIEWS = ["effect", "scatter", "iso", "heat"];
export const FLAGS = ["logx", "logy", "curves", "law", "beyond", "frontier", "reference"];
export const CHOICES = ["view", "y", "x", "color", "shape", "facet", "setting", "levels"];
export const state = { ...DEFAULTS };

export function readAddress() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  Object.assign(
    state,
    DEFAULTS,
    Object.fromEntries(Object.entries(given).filter(([k]) => k in DEFAULTS)),
  );
}

export function writeAddress() {
  const different = Object.entries(state).filter(([k, v]) => v !== DEFAULTS[k]);
  history.replaceState(null, "", `#${new URLSearchParams(different)}`);
}

/* Gains and R2 can be negative, so they have no logarithmic axis. */
export const hasLogY = () => !/^gain\/|_r2$/.test(state.y);
export const isOn = (flag) => state[flag] === "1" && (flag !== "logy" || hasLogY());
export function chosenSweeps() {
  return (state.sweeps ? state.sweeps.split(",") : sweeps.slice(0, 1).map((k) => k.name)).filter((
    s,
  ) => sweeps.some((k) => k.name === s));
}
export function allRows() {
  return chosenSweeps().flatMap((s) =>
    (documents.get(s)?.trials || []).map((r) => ({ ...r, sweep: s }))
  );
}
export const sweptAxes =
  () => [...new Set(chosenSweeps().flatMap((s) => documents.get(s)?.axes || []))];
export const findings = (sweep) => documents.get(sweep)?.laws?.[`${state.y}|${state.x}`];

/* Returns the rows to draw and a note about those left out. Losses under own masks are not
   compared across settings. */
export function visibleRows() {
  const rows = allRows().filter((r) => !state.setting || r.setting === state.setting);
  const settings = new Set(rows.map((r) => r.setting));
  if (OWN_MASK_LOSSES.includes(state.y) && settings.size > 1) {
    const note = `${axisTitle(state.y)} is shown within one setting only: the target moves with ` +
      "the encoder and the loss's scale depends on the masks, so losses of " +
      `${settings.size} settings do not compare. ` +
      "Pick a setting, or validation loss under the shared masks.";
    return { rows: [], note };
  }
  const withBoth = rows.filter((r) => r[state.x] > 0 && Number.isFinite(r[state.y]));
  const without = rows.length - withBoth.length, notes = [];
  if (without) notes.push(`${without} of ${rows.length} trials without ${axisTitle(state.y)} yet.`);
  if (LABEL_FREE.includes(state.y) && settings.size > 1) {
    notes.push(`${axisTitle(state.y)} does not compare settings.`);
  }
  return { rows: withBoth, note: notes.join(" ") };
}

export function fillControls() {
  const rows = allRows(), keys = new Set();
  for (const r of rows) for (const k of Object.keys(r)) keys.add(k);
  const shown = (k) =>
    (k.startsWith("probe/") && !k.endsWith("_top1")) || /^(gain|val)\//.test(k) ||
    k === "loss" || k.startsWith("loss/");
  const ys = [...keys].filter(shown).sort((a, b) =>
    (isError(b) - isError(a)) || naturalOrder(a, b)
  );
  if (!state.y) {
    state.y = chosenSweeps().map((s) => documents.get(s)?.error).find((e) => ys.includes(e)) ||
      ys[0] || "";
  }
  fillSelect("y", ys);
  fillSelect("x", X_METRICS.filter((x) => keys.has(x)));
  const groups = [...new Set(["model", ...sweptAxes(), "setting", "seed", "sweep"])];
  const names = Object.fromEntries(groups.map((g) => [g, axisName(g)]));
  const [size, setting] = defaultAxes(rows);
  if (!groups.includes(state.color)) state.color = size || setting || "model";
  if (state.shape && !groups.includes(state.shape)) {
    state.shape = [setting, size].find((a) => a !== state.color) || "";
  }
  fillSelect("color", groups, names);
  fillSelect("shape", ["", ...groups], { ...names, "": "none" });
  fillSelect("facet", ["", ...groups], { ...names, "": "none" });
  fillSelect("levels", ["", ...X_METRICS.filter((x) => /_fraction$/.test(x) && keys.has(x))], {
    "": "value of the setting",
  });
  fillSelect("setting", ["", ...[...new Set(rows.map((r) => r.setting))].sort(naturalOrder)], {
    "": "all",
  });
  if (!VIEWS.includes(state.view)) state.view = showsEffects() ? "effect" : "scatter";
  for (const f of FLAGS) $(f).checked = isOn(f);
  $("logy").disabled = !hasLogY();
  $("view").value = state.view;
  fillSweeps();
}

/* Masks are compared, or settings without a law. */
const showsEffects = () =>
  chosenSweeps().some((s) => {
    const effects = documents.get(s)?.effects?.[state.y] || [];
    const hasLaw = findings(s)?.fits?.some((fit) => fit.c);
    return effects.some((e) => e.axis.startsWith("mask") || !hasLaw);
  });

/* Default axes of colour and shape: the model where there are several, and the first axis that
   is neither size nor horizon, masks first, with no more values than there are shapes. */
function defaultAxes(rows) {
  const values = (a) => new Set(rows.map((r) => r[a])).size;
  const settings = sweptAxes().filter((a) => !SIZE_AXES.includes(a)).sort((a, b) =>
    b.startsWith("mask.") - a.startsWith("mask.")
  );
  return [
    values("model") > 1 ? "model" : "",
    settings.find((a) => values(a) > 1 && values(a) <= SHAPES.length) || "",
  ];
}

function fillSelect(id, values, names = {}) {
  const select = $(id);
  select.replaceChildren(
    ...values.map((v) =>
      Object.assign(element("option", names[v] || shortTitle(v)), { value: v, title: axisTitle(v) })
    ),
  );
  if (!values.includes(state[id])) state[id] = values[0] || "";
  select.value = state[id];
}

function fillSweeps() {
  const box = $("sweeps");
  if (box.querySelectorAll("input").length !== sweeps.length) {
    box.append(...sweeps.map((k) => {
      const label = element("label");
      label.append(Object.assign(element("input"), { type: "checkbox", value: k.name }), k.name);
      return label;
    }));
  }
  for (const input of box.querySelectorAll("input")) {
    input.checked = chosenSweeps().includes(input.value);
  }
}
