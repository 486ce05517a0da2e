/* What is shown: the view in the page's address, the controls that change it, and the rows that
   it selects. A change by the user is a step of the browser's history; a default that the page
   fills in is not. */

import { SHAPES, SIZE_AXES } from "scaling/constants.js";
import {
  $,
  axisName,
  axisTitle,
  element,
  groupBy,
  isError,
  LABEL_FREE,
  naturalOrder,
  OWN_MASK_LOSSES,
  shortTitle,
  X_METRICS,
} from "scaling/format.js";
import { documents, sweeps } from "scaling/api.js";
import { axisWord, nearest, select } from "scaling/selection.js";

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
  filter: "", // words that select trials
  sort: "", // column of the table, with - when it falls
  trial: "", // ids of the trials of the pinned card
};
const VIEWS = ["effect", "scatter", "iso", "heat"];
export const FLAGS = ["logx", "logy", "curves", "law", "beyond", "frontier", "reference"];
export const CHOICES = ["view", "y", "x", "color", "shape", "facet", "setting", "levels"];
export const state = { ...DEFAULTS };

/* What the address asks for and the data do not have, one sentence each; until the next change. */
export const corrections = new Set();
let isUnchecked = false;

export function readAddress() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const known = Object.entries(given).filter(([k]) => k in DEFAULTS);
  Object.assign(state, DEFAULTS, Object.fromEntries(known));
  corrections.clear();
  isUnchecked = true;
  for (const key of Object.keys(given)) {
    if (!(key in DEFAULTS)) correct("the part", key, Object.keys(DEFAULTS));
  }
  for (const flag of FLAGS.filter((f) => !["0", "1"].includes(state[f]))) {
    correct(flag, state[flag], []);
    state[flag] = DEFAULTS[flag];
  }
}

/* The address is checked when there are rows to check it with. */
export const endCheck = () => {
  isUnchecked = false;
};

/* step: a new entry of the history; else the present one is replaced. */
export function writeAddress(step = false) {
  const different = Object.entries(state).filter(([k, v]) => v !== DEFAULTS[k]);
  const address = `#${new URLSearchParams(different)}`;
  if (address === location.hash) return;
  try {
    history[step ? "pushState" : "replaceState"](null, "", address);
  } catch { /* a sandboxed frame, as of MLflow's artifact viewer, has no history */ }
}

/* The user changes the view: {name: value}. `app.js` draws it. step: see `writeAddress`. */
export function change(values, step = true) {
  Object.assign(state, values);
  corrections.clear();
  writeAddress(step);
  dispatchEvent(new CustomEvent("view", { detail: values }));
}

/* Gains and R2 can be negative, so they have no logarithmic axis. */
export const hasLogY = () => !/^gain\/|_r2$/.test(state.y);
export const isOn = (flag) => state[flag] === "1" && (flag !== "logy" || hasLogY());
export const chosenSweeps = () =>
  state.sweeps ? state.sweeps.split(",") : sweeps.slice(0, 1).map((k) => k.name);

/* Leave out sweeps of the address that are not here. */
export function checkSweeps() {
  const names = sweeps.map((k) => k.name);
  const given = state.sweeps.split(",").filter(Boolean);
  const found = given.map((s) => sweeps.find((k) => k.experiment === s)?.name || s);
  for (const s of found.filter((s) => !names.includes(s))) correct("the sweep", s, names);
  state.sweeps = found.filter((s) => names.includes(s)).join(",");
}
const chosenDocuments = () => chosenSweeps().map((s) => documents.get(s)).filter(Boolean);
export const loadedRows = () => chosenDocuments().flatMap((doc) => doc.trials);
export const sweptAxes = () => [...new Set(chosenDocuments().flatMap((doc) => doc.axes || []))];

let filtered = {}; // of the last selection: rows before it and its words, rows after it, a sentence

/* Returns {rows, problem}: the rows that the words of the filter select; all of them, with a
   sentence, when the words are wrong. */
export function filteredRows() {
  const loaded = loadedRows(), words = state.filter.split(/\s+/).filter(Boolean);
  const { from, by } = filtered;
  if (
    by === state.filter && from.length === loaded.length && loaded.every((r, i) => r === from[i])
  ) {
    return filtered;
  }
  let rows = loaded, problem = "";
  try {
    if (words.length) rows = select(selectable(), words).map(({ row }) => row);
  } catch (e) {
    problem = `${e.message} All trials are shown.`;
  }
  filtered = { from: loaded, by: state.filter, rows, problem };
  return filtered;
}
export const selectedRows = () => filteredRows().rows;

function selectable() {
  const axes = sweptAxes(), valueOf = (r, a) => (a === "model" ? r.model_name : r[a]);
  return chosenDocuments().flatMap((doc) =>
    doc.trials.map((row) => ({
      row,
      index: row.index,
      class: row.class,
      id: trialId(row),
      name: row.trial,
      label: row.label,
      seed: row.seed,
      state: row.state,
      point: Object.fromEntries(axes.filter((a) => row[a]).map((a) => [a, valueOf(row, a)])),
    }))
  );
}
export const trialId = (row) => row.trial.split("-").pop();

/* Make the rows of several sweeps comparable: settings that a sweep did not vary come from its
   `fixed`, and models of one name and several sizes get their parameters into the name. */
export function alignRows() {
  const axes = sweptAxes(), rows = loadedRows();
  for (const { trials, fixed } of chosenDocuments()) {
    for (const r of trials) for (const a of axes) r[a] ||= fixed?.[a] ?? "";
  }
  for (const r of rows) {
    r.model_name ??= r.model;
    r.own_setting ??= r.setting;
    r.setting = chosenSweeps().length > 1 ? settingLabel(r, axes) : r.own_setting;
  }
  const several = new Set();
  for (const [name, alike] of groupBy(rows, (r) => r.model_name)) {
    if (new Set(alike.map((r) => r.parameters).filter(Boolean)).size > 1) several.add(name);
  }
  const named = (name, parameters) =>
    several.has(name) && parameters ? `${name} ${+(parameters / 1e6).toPrecision(3)}M` : name;
  for (const r of rows) r.model = named(r.model_name, r.parameters);
}

export const findings = (sweep) => documents.get(sweep)?.laws?.[`${state.y}|${state.x}`];

/* Returns the rows to draw and a note about those left out. Losses under own masks are not
   compared across settings. */
export function visibleRows() {
  const rows = selectedRows().filter((r) => !state.setting || r.setting === state.setting);
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
  if (without && state.y) {
    notes.push(`${without} of ${rows.length} trials without ${axisTitle(state.y)} yet.`);
  }
  if (LABEL_FREE.includes(state.y) && settings.size > 1) {
    notes.push(`${axisTitle(state.y)} does not compare settings.`);
  }
  return { rows: withBoth, note: notes.join(" ") };
}

export function fillControls() {
  alignRows();
  state.sweeps ||= chosenSweeps().join(",");
  fillSweeps();
  const rows = loadedRows(), keys = new Set();
  if (!rows.length) return; // nothing is known yet that a default could follow
  for (const r of rows) for (const k of Object.keys(r)) keys.add(k);
  const shown = (k) =>
    (k.startsWith("probe/") && !k.endsWith("_top1")) || /^(gain|val)\//.test(k) ||
    k === "loss" || k.startsWith("loss/");
  const ys = [...keys].filter(shown).sort((a, b) =>
    (isError(b) - isError(a)) || naturalOrder(a, b)
  );
  if (!ys.includes(state.y) && ys.length) {
    correct("Y", state.y, ys);
    state.y = chosenSweeps().map((s) => documents.get(s)?.error).find((e) => ys.includes(e)) ||
      ys[0] || "";
  }
  fillSelect("y", ys);
  fillSelect("x", X_METRICS.filter((x) => keys.has(x)));
  const groups = [...new Set(["model", ...sweptAxes(), "setting", "seed", "sweep"])];
  const names = Object.fromEntries(groups.map((g) => [g, axisName(g)]));
  const [size, setting] = defaultAxes(rows);
  if (!groups.includes(state.color)) {
    correct("colour", state.color, groups);
    state.color = haveOtherAxes() ? "sweep" : size || setting || "model";
  }
  if (state.shape && !groups.includes(state.shape)) {
    if (state.shape !== "auto") correct("shape", state.shape, groups);
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
  if (!VIEWS.includes(state.view)) {
    correct("view", state.view, VIEWS);
    state.view = showsEffects() ? "effect" : "scatter";
  }
  for (const f of FLAGS) $(f).checked = isOn(f);
  $("logy").disabled = !hasLogY();
  $("view").value = state.view;
}

function settingLabel(row, axes) {
  const settings = axes.filter((a) => row[a] && !SIZE_AXES.includes(a));
  return settings.map((a) => axisWord(a, row[a], axes)).join(" ") || "all";
}

/* A sentence for a value of the address that is not among the known ones. */
export function correct(what, value, known) {
  if (!value || !isUnchecked) return;
  const [close] = nearest(value, known);
  corrections.add(
    `The address has ${what} '${value}', which is not known here` +
      (close === undefined ? "." : `: did you mean '${close}'?`),
  );
}

function haveOtherAxes() {
  const axes = chosenDocuments().map((doc) => [...(doc.axes || [])].sort().join(" "));
  return new Set(axes).size > 1;
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
  if (values.length && !values.includes(state[id])) {
    correct(select.labels[0].firstChild.textContent.trim(), state[id], values);
    state[id] = values[0];
  }
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
