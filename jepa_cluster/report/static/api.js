/* The page's data: MLflow's REST API with the user's own rights, or the document inside a
   self-contained page. `jepa scaling` computed fits and frontiers; they are in scaling.json on
   the parent run, with all trials at that time. runs.json beside it holds their run ids. Both
   are shown first, then updated with the runs that changed since. MLflow takes seconds to return
   a thousand runs, so all runs are requested only when these files are missing. */

import { DOCUMENT_VERSION } from "scaling/constants.js";
import { $, appendTo } from "scaling/format.js";

export const documents = new Map(); // sweep -> document (trials, laws, masks, ...)
export const histories = new Map(); // "trial metric" -> [[step, value], ...]
export let sweeps = []; // [{name, sweep, id}] that can be chosen: of the experiment, of the sweep
export const EMBEDDED = $("jepa-data");
// a file in MLflow's artifact viewer has a blob: address, to which nothing is relative
const WITHOUT_FINDINGS = { laws: {}, effects: {}, heat: {}, importance: {}, isOlder: true };
const API = EMBEDDED ? null : new URL("../ajax-api/2.0/mlflow/", location.href.split("#")[0]);
const RUNS_PER_REQUEST = 100; // per request for histories
const CLOCK_SLACK = 60_000; // ms by which clocks and the collector may be behind

async function request(path, body) {
  const answer = await fetch(
    new URL(path, API),
    body && {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    },
  ).catch(() => {
    throw new Error("MLflow does not answer");
  });
  if (!answer.ok) throw new Error(`MLflow answered ${answer.status} to ${path.split("?")[0]}`);
  return answer.json();
}

export async function listSweeps() {
  if (EMBEDDED) {
    const doc = JSON.parse(EMBEDDED.textContent);
    documents.set(doc.sweep, doc);
    for (const [trial, rows] of Object.entries(doc.curves || {})) {
      for (const row of rows) {
        for (const [key, value] of Object.entries(row)) {
          if (key !== "step") appendTo(histories, `${trial} ${key}`, [row.step, value]);
        }
      }
    }
    sweeps = [{ name: doc.sweep, sweep: doc.sweep }];
  } else {
    const found = await request("experiments/search", {
      max_results: 1000,
      filter: "tags.`jepa.kind` = 'sweep'",
    });
    const made = found.experiments || [], sweepOf = (e) => tagOf(e, "jepa.sweep") || e.name;
    const isAlone = (e) => made.filter((other) => sweepOf(other) === sweepOf(e)).length < 2;
    sweeps = made.map((e) => ({
      // the name in addresses; a user may have renamed the experiment
      name: (isAlone(e) ? sweepOf(e) : e.name).replaceAll(",", " "),
      experiment: e.name,
      sweep: sweepOf(e),
      id: e.experiment_id,
      parent: tagOf(e, "jepa.parent"),
    }));
  }
  return sweeps;
}

/* Load the document of a sweep, with its trials at that time. Returns whether MLflow may have
   newer ones. */
export async function loadSweep(name) {
  if (documents.has(name)) return false;
  const { id, parent } = sweeps.find((k) => k.name === name);
  const files = (run) =>
    Promise.all(["scaling.json", "runs.json"].map((file) => readArtifact(run, file)));
  let [doc, ids] = parent ? await files(parent) : [];
  if (!doc) {
    const [run] = await searchRuns(id, "tags.`jepa.kind` = 'sweep'");
    const axes = JSON.parse((run && tagOf(run, "jepa.axes")) || "[]");
    const planned = +((run && tagOf(run, "jepa.trials")) || 0);
    if (run && !parent) [doc, ids] = await files(run.info.run_id);
    doc ||= {
      question: run && tagOf(run, "jepa.question"),
      expect: run && tagOf(run, "jepa.expect"),
      axes,
      planned,
      trials: [],
      masks: {},
      ...WITHOUT_FINDINGS,
      isOlder: false,
    };
  }
  if (doc.version && doc.version !== DOCUMENT_VERSION) doc = { ...doc, ...WITHOUT_FINDINGS };
  doc.trials.forEach((t, index) =>
    Object.assign(t, { index, ...t, run: ids?.[t.trial], experiment: id, sweep: name })
  );
  doc = { ...doc, sweep: name, id, ids, isListed: Boolean(ids) };
  documents.set(name, doc);
  if (!doc.trials.length) return void await refresh(name);
  return !isComplete(doc) || doc.trials.some((t) => t.state !== "done");
}

function isComplete({ ids, read, trials }) {
  const names = new Set(trials.map((t) => t.trial));
  return Boolean(ids && read) && Object.keys(ids).every((name) => names.has(name));
}

/* Update trials from MLflow: all of them where the document lacks some, else those that run and
   those that ended since it was written. Returns whether there were any. */
export async function refresh(name) {
  const doc = documents.get(name), trials = new Map(doc.trials.map((t) => [t.trial, t]));
  const fetchRows = async (more) =>
    (await searchRuns(doc.id, `tags.\`jepa.kind\` = 'trial'${more}`)).map((r) => toRow(r, doc));
  let found;
  if (isComplete(doc)) {
    found = await fetchRows(" and tags.`jepa.state` != 'done' and tags.`jepa.state` != 'queued'");
    const moving = new Set(found.map((r) => r.trial));
    if (doc.trials.some((t) => t.state !== "done" && !moving.has(t.trial))) {
      found.push(...await fetchRows(` and attributes.end_time > ${doc.read - CLOCK_SLACK}`));
    }
  } else found = await fetchRows("");
  const rows = found.filter((r) => !doc.ids || doc.ids[r.trial]);
  for (const row of rows) {
    const joined = { ...trials.get(row.trial), ...row };
    joined.setting ||= trials.get(row.trial)?.setting || "all";
    joined.gpu_hours_alone = Math.max(joined.gpu_hours_alone || 0, joined.gpu_hours || 0);
    trials.set(row.trial, joined);
  }
  const ids = doc.ids || {}, isKnown = [...trials.keys()].every((trial) => trial in ids);
  const order = isKnown ? Object.keys(ids) : [...trials.keys()]; // of the plan, for indices
  doc.trials = order.map((name, index) => {
    const trial = trials.get(name);
    return trial && Object.assign(trial, { index: isKnown ? index : trial.index ?? index });
  }).filter(Boolean);
  doc.isListed = true;
  return rows.length > 0;
}

async function searchRuns(experiment, filter) {
  const found = [];
  let token;
  do {
    const answer = await request("runs/search", {
      experiment_ids: [experiment],
      max_results: 1000,
      page_token: token,
      filter,
    });
    found.push(...(answer.runs || []));
    token = answer.next_page_token;
  } while (token);
  return found;
}

async function readArtifact(run, path) {
  try {
    const answer = await fetch(new URL(`../../../get-artifact?run_uuid=${run}&path=${path}`, API));
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

function tagOf(holder, key) {
  return ((holder.data || holder).tags || []).find((t) => t.key === key)?.value;
}

function toRow(run, doc) {
  const tags = Object.fromEntries((run.data.tags || []).map((t) => [t.key, t.value]));
  const row = {
    sweep: doc.sweep,
    trial: tags["jepa.trial"],
    label: tags["jepa.label"] || run.info.run_name, // a user may have renamed the run
    setting: tags["jepa.setting"],
    state: tags["jepa.state"],
    run: run.info.run_id,
    experiment: doc.id,
    attempts: +tags["jepa.attempts"] || 0,
    gpu_hours: +tags["jepa.gpu_hours"] || 0,
    cause: tags["jepa.cause"],
    steps: +tags["jepa.horizon"] || null,
  };
  for (const [k, v] of Object.entries(tags)) if (k.startsWith("axis.")) row[k.slice(5)] = v;
  for (const p of run.data.params || []) {
    if (p.key === "model.name") row.model = p.value;
    if (p.key === "parameters" || p.key === "seed") row[p.key] = +p.value;
  }
  for (const m of run.data.metrics || []) row[m.key] = m.value;
  return row;
}

export function needsCurves(rows, keys) {
  return !EMBEDDED &&
    keys.some((key) => rows.some((r) => r.run && !histories.has(`${r.trial} ${key}`)));
}

/* Load the histories of what is drawn, many runs per request. Returns true: draw them. */
export async function loadCurves(rows, keys) {
  const parts = keys.flatMap((key) => {
    const missing = rows.filter((r) => r.run && !histories.has(`${r.trial} ${key}`));
    return Array.from(
      { length: Math.ceil(missing.length / RUNS_PER_REQUEST) },
      (_, i) => [key, missing.slice(i * RUNS_PER_REQUEST, (i + 1) * RUNS_PER_REQUEST)],
    );
  });
  await Promise.all(parts.map(async ([key, part]) => {
    const query = part.map((r) => `run_id=${r.run}`).join("&") +
      `&metric_key=${encodeURIComponent(key)}&max_results=25000`;
    const found = await request(`metrics/get-history-bulk?${query}`);
    const names = new Map(part.map((r) => [r.run, r.trial]));
    for (const r of part) histories.set(`${r.trial} ${key}`, []);
    for (const m of found.metrics || []) {
      histories.get(`${names.get(m.run_id)} ${key}`).push([m.step, m.value]);
    }
  }));
  return true;
}

export const runLink = (r) => `../#/experiments/${r.experiment}/runs/${r.run}`;
