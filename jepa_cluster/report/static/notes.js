/* The sentences above the figure that say in which state the page is: what is missing, what has
   not arrived yet, and what the address asks for in vain. */

import { STATES } from "scaling/constants.js";
import { axisTitle } from "scaling/format.js";
import { documents, EMBEDDED } from "scaling/api.js";
import {
  chosenSweeps,
  corrections,
  filteredRows,
  loadedRows,
  state,
  trialId,
} from "scaling/state.js";

/* Returns {notes, isEmpty}. isEmpty: there is nothing to draw, and no other sentence helps. */
export function pageState() {
  const notes = [...corrections, ...chosenSweeps().flatMap(collecting)];
  notes.push(...chosenSweeps().filter((s) => documents.get(s)?.isOlder).map(older));
  const rows = loadedRows();
  if (!chosenSweeps().length) return { notes, isEmpty: true };
  if (!rows.length) {
    return { notes: notes.length ? notes : ["No trial is here yet."], isEmpty: true };
  }
  if (!rows.some((r) => Number.isFinite(r[state.y]))) {
    return { notes: [...notes, noResult(rows)], isEmpty: true };
  }
  if (!rows.some((r) => r.state === "done")) {
    notes.push(`No trial has finished yet: ${states(rows)}.`);
  }
  return {
    notes: [...notes, ...unknownTrials(rows), ...filter(rows), ...otherData()],
    isEmpty: false,
  };
}

const older = (s) => `The findings of ${s} are of another version: run jepa scaling ${s}.`;

function collecting(sweep) {
  const doc = documents.get(sweep);
  if (EMBEDDED || !doc?.isListed) return [];
  const arrived = doc.trials.filter((r) => r.run).length;
  const planned = Math.max(doc.planned || 0, doc.trials.length);
  return arrived < planned
    ? [
      `Still collecting ${sweep}: ${arrived} of ${planned} trials have arrived. Reload to see more.`,
    ]
    : [];
}

function noResult(rows) {
  const what = state.y ? `a value of ${axisTitle(state.y)}` : "a result to draw";
  return rows.some((r) => r.state === "done")
    ? `No trial has ${what}: ${states(rows)}.`
    : `No trial has finished or has ${what} yet: ${states(rows)}.`;
}

function states(rows) {
  const counts = STATES.map((s) => [rows.filter((r) => r.state === s).length, s]);
  return counts.filter(([n]) => n).map(([n, s]) => `${n} ${s}`).join(", ");
}

function unknownTrials(rows) {
  const known = new Set(rows.map(trialId));
  return state.trial.split(",").filter((id) => id && !known.has(id)).map((id) =>
    `No trial of ${chosenSweeps().join(", ")} has the id '${id}'.`
  );
}

function filter(rows) {
  const { rows: selected, problem } = filteredRows();
  if (problem || selected.length === rows.length) return [];
  return [
    `${selected.length} of ${rows.length} trials are selected; laws, effects and findings are of all.`,
  ];
}

/* Errors of two data sets do not compare. */
function otherData() {
  const docs = chosenSweeps().map((s) => documents.get(s)).filter((doc) => doc?.fixed);
  const sets = { "data.digest": "training set", "data.val_digest": "validation set" };
  return Object.entries(sets).flatMap(([key, name]) => {
    const digests = docs.map((doc) => doc.fixed[key]).filter((d) => d && d !== "null");
    if (new Set(digests).size < 2) return [];
    const of = docs.map((doc) => `${doc.sweep} ${doc.fixed[key] || "several"}`).join(", ");
    return [
      `Warning: the sweeps have another ${name} each, so their errors do not compare (${of}).`,
    ];
  });
}
