/* What is shown: the view as it stands in the address, the controls that change it, and the rows it selects. */

import { SHAPES, SIZES } from "scaling/constants.js";
import { $, OWN_MASKS, XS, brief, natural, node, plain, unit } from "scaling/format.js";
import { docs, known } from "scaling/api.js";

const DEFAULTS = { view: "scatter", sweeps: "", y: "", x: "flops_total", color: "", shape: "auto", facet: "", setting: "",
  logx: "1", logy: "1", curves: "1", law: "1", beyond: "0", frontier: "1", reference: "0" };
export const FLAGS = ["logx", "logy", "curves", "law", "beyond", "frontier", "reference"];
export const CHOICES = ["view", "y", "x", "color", "shape", "facet", "setting"];
export const state = { ...DEFAULTS };

export function readAddress() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  Object.assign(state, DEFAULTS, Object.fromEntries(Object.entries(given).filter(([k]) => k in DEFAULTS)));
}

export function writeAddress() {
  const different = Object.entries(state).filter(([k, v]) => v !== DEFAULTS[k]);
  history.replaceState(null, "", `#${new URLSearchParams(different)}`);
}

export const on = (flag) => state[flag] === "1";
export function chosen() {
  return (state.sweeps ? state.sweeps.split(",") : known.slice(0, 1).map((k) => k.name)).filter((s) => known.some((k) => k.name === s));
}
export function allRows() { return chosen().flatMap((s) => (docs.get(s)?.trials || []).map((r) => ({ ...r, sweep: s }))); }
export const swept = () => [...new Set(chosen().flatMap((s) => docs.get(s)?.axes || []))];
export const findings = (sweep) => docs.get(sweep)?.laws?.[`${state.y}|${state.x}`];

/* Rows to draw, and what to say of those left out. Losses under each trial's own masks are refused across settings. */
export function visible() {
  const rows = allRows().filter((r) => !state.setting || r.setting === state.setting);
  const settings = new Set(rows.map((r) => r.setting));
  if (OWN_MASKS.includes(state.y) && settings.size > 1)
    return { rows: [], note: `${unit(state.y)} is shown within one setting only: the target moves with the encoder and the loss's scale depends on the masks, so losses of ${settings.size} settings do not compare. Pick a setting, or validation loss under the shared masks.` };
  const withBoth = rows.filter((r) => r[state.x] > 0 && Number.isFinite(r[state.y]));
  const without = rows.length - withBoth.length;
  return { rows: withBoth, note: without ? `${without} of ${rows.length} trials without ${unit(state.y)} yet.` : "" };
}

export function fillControls() {
  const rows = allRows(), keys = new Set();
  for (const r of rows) for (const k of Object.keys(r)) keys.add(k);
  const shown = (k) => (k.startsWith("probe/") && !k.endsWith("_top1")) || k.startsWith("val/") || k === "loss";
  const ys = [...keys].filter(shown).sort((a, b) => (b.endsWith("_error") - a.endsWith("_error")) || natural(a, b));
  if (!state.y) state.y = chosen().map((s) => docs.get(s)?.error).find((e) => ys.includes(e)) || ys[0] || "";
  options("y", ys);
  options("x", XS.filter((x) => keys.has(x)));
  const groups = [...new Set(["model", ...swept(), "setting", "seed", "sweep"])];
  const names = Object.fromEntries(groups.map((g) => [g, plain(g)]));
  const [size, setting] = told(rows);
  if (!groups.includes(state.color)) state.color = size || setting || "model";
  if (state.shape && !groups.includes(state.shape)) state.shape = [setting, size].find((a) => a !== state.color) || "";
  options("color", groups, names);
  options("shape", ["", ...groups], { ...names, "": "none" });
  options("facet", ["", ...groups], { ...names, "": "none" });
  options("setting", ["", ...[...new Set(rows.map((r) => r.setting))].sort(natural)], { "": "all" });
  for (const f of FLAGS) $(f).checked = on(f);
  $("view").value = state.view;
  fillSweeps();
}

/* What colour and shape tell unless asked otherwise: the model where there are several, and the first other axis that
   is no horizon, a mask's before others, with no more values than there are shapes. */
function told(rows) {
  const values = (a) => new Set(rows.map((r) => r[a])).size;
  const settings = swept().filter((a) => !SIZES.includes(a)).sort((a, b) => b.startsWith("mask.") - a.startsWith("mask."));
  return [values("model") > 1 ? "model" : "", settings.find((a) => values(a) > 1 && values(a) <= SHAPES.length) || ""];
}

function options(id, values, names = {}) {
  const select = $(id);
  select.replaceChildren(...values.map((v) => Object.assign(node("option", names[v] || brief(v)), { value: v, title: unit(v) })));
  if (!values.includes(state[id])) state[id] = values[0] || "";
  select.value = state[id];
}

function fillSweeps() {
  const box = $("sweeps");
  if (box.querySelectorAll("input").length !== known.length)
    box.append(...known.map((k) => {
      const label = node("label");
      label.append(Object.assign(node("input"), { type: "checkbox", value: k.name }), k.name);
      return label;
    }));
  for (const input of box.querySelectorAll("input")) input.checked = chosen().includes(input.value);
}
