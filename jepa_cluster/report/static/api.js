/* Where the numbers come from: MLflow's REST API with the visitor's own rights, or the document inside a page that
   stands alone. Fits and frontiers were computed by `jepa scaling` and stand in scaling.json on the parent run, with all
   trials as they were; runs.json beside it names their runs. Both are shown at once, and brought up to date by the few
   runs that moved since. MLflow takes seconds to tell of a thousand runs, so they are asked for only without these files. */

import { SIZES } from "scaling/constants.js";
import { $, push } from "scaling/format.js";

export const docs = new Map();      // sweep -> document (trials, laws, masks, ...)
export const histories = new Map(); // "trial metric" -> [[step, value], ...]
export let known = [];              // [{name, id}] of sweeps that can be picked
export const EMBEDDED = $("jepa-data");
const API = new URL("../ajax-api/2.0/mlflow/", location.href.split("#")[0]);
const BULK = 100; // runs a request for histories
const SLACK = 60_000; // ms by which clocks and the collector may be behind

async function ask(path, body) {
  const answer = await fetch(new URL(path, API), body && {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  if (!answer.ok) throw new Error(`MLflow answered ${answer.status} to ${path.split("?")[0]}`);
  return answer.json();
}

export async function listSweeps() {
  if (EMBEDDED) {
    const doc = JSON.parse(EMBEDDED.textContent);
    docs.set(doc.sweep, doc);
    for (const [trial, rows] of Object.entries(doc.curves || {}))
      for (const row of rows)
        for (const [key, value] of Object.entries(row))
          if (key !== "step") push(histories, `${trial} ${key}`, [row.step, value]);
    known = [{ name: doc.sweep }];
  } else {
    const found = await ask("experiments/search", { max_results: 1000, filter: "tags.`jepa.kind` = 'sweep'" });
    known = (found.experiments || []).map((e) => ({ name: e.name, id: e.experiment_id, parent: tag(e, "jepa.parent") }));
  }
  return known;
}

/* The document of a sweep, its trials as they stood when it was written; -> whether MLflow may know more. */
export async function loadSweep(name) {
  if (docs.has(name)) return false;
  const { id, parent } = known.find((k) => k.name === name);
  const files = (run) => Promise.all(["scaling.json", "runs.json"].map((file) => artifact(run, file)));
  let [doc, ids] = parent ? await files(parent) : [];
  if (!doc) {
    const [run] = await runs(id, "tags.`jepa.kind` = 'sweep'");
    const axes = JSON.parse((run && tag(run, "jepa.axes")) || "[]");
    if (run && !parent) [doc, ids] = await files(run.info.run_id);
    doc ||= { question: run && tag(run, "jepa.question"), expect: run && tag(run, "jepa.expect"), axes,
      settings: axes.filter((a) => !SIZES.includes(a)), trials: [], laws: {}, masks: {} };
  }
  for (const t of doc.trials) Object.assign(t, { run: ids?.[t.trial], experiment: id });
  doc = { ...doc, sweep: name, id, ids };
  docs.set(name, doc);
  if (!doc.trials.length) return void await refresh(name);
  return !knowsAll(doc) || doc.trials.some((t) => t.state !== "done");
}

function knowsAll({ ids, read, trials }) {
  const names = new Set(trials.map((t) => t.trial));
  return Boolean(ids && read) && Object.keys(ids).every((name) => names.has(name));
}

/* Trials as MLflow has them now, over what the document said of them: all of them where it does not know all, else
   those at work and those that ended since it was written; -> whether there were any. */
export async function refresh(name) {
  const doc = docs.get(name), trials = new Map(doc.trials.map((t) => [t.trial, t]));
  const told = async (more) => (await runs(doc.id, `tags.\`jepa.kind\` = 'trial'${more}`)).map((r) => asRow(r, doc.id));
  let found;
  if (knowsAll(doc)) {
    found = await told(" and tags.`jepa.state` != 'done' and tags.`jepa.state` != 'queued'");
    const moving = new Set(found.map((r) => r.trial));
    if (doc.trials.some((t) => t.state !== "done" && !moving.has(t.trial)))
      found.push(...await told(` and attributes.end_time > ${doc.read - SLACK}`));
  } else found = await told("");
  const rows = found.filter((r) => !doc.ids || doc.ids[r.trial]);
  for (const row of rows) {
    const joined = { ...trials.get(row.trial), ...row };
    joined.gpu_hours_alone = Math.max(joined.gpu_hours_alone || 0, joined.gpu_hours || 0);
    joined.setting = doc.settings.map((a) => `${a.split(".").pop()}=${joined[a] ?? ""}`).join(" ") || "all";
    trials.set(row.trial, joined);
  }
  doc.trials = [...trials.values()];
  return rows.length > 0;
}

async function runs(experiment, filter) {
  const found = [];
  let token;
  do {
    const answer = await ask("runs/search", { experiment_ids: [experiment], max_results: 1000, page_token: token, filter });
    found.push(...(answer.runs || []));
    token = answer.next_page_token;
  } while (token);
  return found;
}

async function artifact(run, path) {
  try {
    const answer = await fetch(new URL(`../../../get-artifact?run_uuid=${run}&path=${path}`, API));
    return answer.ok ? await answer.json() : null;
  } catch { return null; }
}

function tag(holder, key) { return ((holder.data || holder).tags || []).find((t) => t.key === key)?.value; }

function asRow(run, experiment) {
  const tags = Object.fromEntries((run.data.tags || []).map((t) => [t.key, t.value]));
  const row = { trial: tags["jepa.trial"], label: run.info.run_name, state: tags["jepa.state"], run: run.info.run_id,
    experiment, attempts: +tags["jepa.attempts"] || 0, gpu_hours: +tags["jepa.gpu_hours"] || 0, cause: tags["jepa.cause"],
    steps: +tags["jepa.horizon"] || null };
  for (const [k, v] of Object.entries(tags)) if (k.startsWith("axis.")) row[k.slice(5)] = v;
  for (const p of run.data.params || []) {
    if (p.key === "model.name") row.model = p.value;
    if (p.key === "parameters" || p.key === "seed") row[p.key] = +p.value;
  }
  for (const m of run.data.metrics || []) row[m.key] = m.value;
  return row;
}

export function lacksCurves(rows, keys) {
  return !EMBEDDED && keys.some((key) => rows.some((r) => r.run && !histories.has(`${r.trial} ${key}`)));
}

/* Histories of what is drawn, many runs a request; -> true, they are to be drawn. */
export async function loadCurves(rows, keys) {
  const parts = keys.flatMap((key) => {
    const missing = rows.filter((r) => r.run && !histories.has(`${r.trial} ${key}`));
    return Array.from({ length: Math.ceil(missing.length / BULK) }, (_, i) => [key, missing.slice(i * BULK, (i + 1) * BULK)]);
  });
  await Promise.all(parts.map(async ([key, part]) => {
    const query = part.map((r) => `run_id=${r.run}`).join("&") + `&metric_key=${encodeURIComponent(key)}&max_results=25000`;
    const found = await ask(`metrics/get-history-bulk?${query}`);
    const names = new Map(part.map((r) => [r.run, r.trial]));
    for (const r of part) histories.set(`${r.trial} ${key}`, []);
    for (const m of found.metrics || []) histories.get(`${names.get(m.run_id)} ${key}`).push([m.step, m.value]);
  }));
  return true;
}

export const runLink = (r) => `../#/experiments/${r.experiment}/runs/${r.run}`;
