/* The table of trials: one line per selected trial, sorted by the column in the address. A line is
   built once and moved afterwards. */

import { STATES } from "scaling/constants.js";
import { $, axisName, element, FITTED, formatNumber, naturalOrder } from "scaling/format.js";
import { documents, runLink } from "scaling/api.js";
import { fillCard } from "scaling/card.js";
import { metricName, stateMark } from "scaling/marks.js";
import {
  change,
  chosenSweeps,
  correct,
  filteredRows,
  loadedRows,
  state,
  sweptAxes,
  trialId,
} from "scaling/state.js";

const MAX_ROWS = 2000;
const lines = new WeakMap(); // row -> {columns, line}
const rowOf = new WeakMap(); // line -> row

/* Returns the columns [{id, head, key, compare}], what the sweeps vary first. */
function columns() {
  const rows = loadedRows(), isSwept = (key) => new Set(rows.map((r) => r[key])).size > 1;
  const found = [];
  const add = (id, head, key, compare) => found.push({ id, head, key, compare });
  if (chosenSweeps().length > 1) add("sweep", "sweep", "sweep", naturalOrder);
  add("index", "#", "index");
  for (const axis of sweptAxes()) {
    if (axis !== "model" && isSwept(axis)) add(axis, axisName(axis), axis, naturalOrder);
  }
  add("model", "model", "model", naturalOrder);
  add("seed", "seed", "seed");
  add("state", "state", "state", (a, b) => STATES.indexOf(a) - STATES.indexOf(b));
  if (rows.some((r) => r.state !== "done" && r.step)) add("step", "step", "step");
  if (state.y) {
    add("error", metricName(state.y), state.y);
    add("untrained", "untrained", `initial/${state.y}`);
  }
  if (state.y !== "loss") add("loss", "loss", "loss");
  add("cost", unit(), "gpu_hours");
  add("attempts", "attempts", "attempts");
  if (rows.some((r) => r.run)) add("run", "run", "run", naturalOrder);
  return found;
}

/* The unit of the cost, as plan.json names it. */
function unit() {
  const units = new Set(chosenSweeps().map((s) => documents.get(s)?.unit || "GPU-h"));
  return units.size === 1 ? [...units][0].replace(/-h$/, "-hours") : "hours";
}

const isNumber = (column) => !column.compare;
const EXACT = ["index", "seed", "attempts"]; // columns of numbers that are shown with all digits
const isMissing = (value) => value === undefined || value === null || value === "";

export function showTable() {
  const shown = columns(), { rows, problem } = filteredRows(), order = state.sort.replace(/^-/, "");
  if (order && loadedRows().length && !shown.some(({ id }) => id === order)) {
    correct("the order", order, shown.map(({ id }) => id));
    state.sort = "";
  }
  const ids = shown.map(({ id, key }) => `${id} ${key}`).join();
  const body = sorted(rows, shown).slice(0, MAX_ROWS).map((row) => lineOf(row, shown, ids));
  const table = $("table"), [head, ...present] = table.rows;
  if (body.length === present.length && body.every((line, i) => line === present[i])) {
    head?.replaceWith(headOf(shown)); // the lines stay, and with them the focus
  } else table.replaceChildren(headOf(shown), ...body);
  $("count").textContent = rows.length === loadedRows().length
    ? `${rows.length}`
    : `${rows.length} of ${loadedRows().length}`;
  $("problem").textContent = problem;
  if ($("filter").value.trim() !== state.filter) $("filter").value = state.filter;
  $("filter").setAttribute("aria-invalid", String(Boolean(problem)));
  const pinned = state.trial.split(",");
  for (const line of body) {
    line.tabIndex = line === body[0] ? 0 : -1;
    line.setAttribute("aria-selected", String(pinned.includes(trialId(rowOf.get(line)))));
  }
}

/* Trials without a value come last in either direction. */
function sorted(rows, shown) {
  const column = shown.find(({ id }) => id === state.sort.replace(/^-/, ""));
  if (!column) return rows;
  const sign = state.sort.startsWith("-") ? -1 : 1, compare = column.compare || ((a, b) => a - b);
  return [...rows].sort((a, b) => {
    const x = a[column.key], y = b[column.key];
    if (isMissing(x) || isMissing(y)) return isMissing(x) - isMissing(y);
    const isModel = column.id === "model";
    return sign * ((isModel && a.parameters - b.parameters) || compare(x, y));
  });
}

function headOf(shown) {
  const head = element("tr");
  for (const column of shown) {
    const cell = element("th"), button = element("button", column.head);
    const order = { [column.id]: "ascending", [`-${column.id}`]: "descending" }[state.sort];
    cell.scope = "col";
    cell.className = isNumber(column) ? "number" : "";
    cell.setAttribute("aria-sort", order || "none");
    button.type = "button";
    button.title = column.key;
    button.onclick = () => {
      change({ sort: state.sort === column.id ? `-${column.id}` : column.id });
      $("table").rows[0].cells[shown.indexOf(column)].firstChild.focus();
    };
    cell.append(button);
    head.append(cell);
  }
  return head;
}

const linkOf = (row) =>
  row.run ? [Object.assign(element("a", "MLflow"), { href: runLink(row) })] : [];

function lineOf(row, shown, ids) {
  const known = lines.get(row);
  if (known?.ids === ids) return known.line;
  const line = element("tr");
  for (const column of shown) {
    const cell = line.insertCell(), value = row[column.key];
    if (column.id === "state") cell.append(stateMark(value));
    else if (column.id === "run") cell.append(...linkOf(row));
    else if (!isNumber(column) || EXACT.includes(column.id)) {
      cell.textContent = isMissing(value) ? "–" : value;
    } else cell.textContent = formatNumber(value, column.id === "cost" ? FITTED : undefined);
    if (isNumber(column)) cell.className = "number";
  }
  line.title = row.label;
  lines.set(row, { ids, line });
  rowOf.set(line, row);
  return line;
}

/* Focus shows a trial, a click or Enter pins it, arrows move. */
export function listenToTable() {
  const lineAt = (e) => (e.target.closest("a, th") ? null : e.target.closest("tr"));
  const pin = (line) => rowOf.has(line) && change({ trial: trialId(rowOf.get(line)) });
  $("table").addEventListener("click", (e) => pin(lineAt(e)));
  $("table").addEventListener("focusin", (e) => {
    const row = rowOf.get(e.target.closest("tr"));
    if (row) fillCard([row.trial]);
  });
  $("table").addEventListener("keydown", (e) => {
    const line = lineAt(e);
    if (!line || !rowOf.has(line)) return;
    if (e.key === "Enter") pin(line);
    const next = { ArrowDown: line.nextSibling, ArrowUp: line.previousSibling }[e.key];
    if (!next) return;
    e.preventDefault();
    (rowOf.has(next) ? next : next.querySelector("button")).focus();
  });
}
