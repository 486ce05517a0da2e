/* Where the numbers come from: MLflow's REST API with the visitor's own rights, or the document inside a page that
   stands alone. Fits, intervals and frontiers were computed by `jepa scaling` and stand in scaling.json on the parent
   run; its trials are shown at once, and brought up to date by what MLflow knows of the runs. */

import { $, SIZES, push } from "scaling/words.js";

export const docs = new Map();      // sweep -> document (trials, laws, masks, ...)
export const histories = new Map(); // "trial metric" -> [[step, value], ...]
export let known = [];              // [{name, id}] of sweeps that can be picked
export const EMBEDDED = $("jepa-data");
const API = new URL("../ajax-api/2.0/mlflow/", location.href.split("#")[0]);
const BULK = 100; // runs a request for histories

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
    known = (found.experiments || []).map((e) => ({ name: e.name, id: e.experiment_id }));
  }
  return known;
}

/* The document of a sweep, its trials as they stood when it was written; -> whether MLflow may know more. */
export async function loadSweep(name) {
  if (docs.has(name)) return false;
  const id = known.find((k) => k.name === name).id;
  const [parent] = await runs(id, "sweep", 1);
  const doc = (parent && await artifact(parent.info.run_id)) || { trials: [], laws: {}, masks: {} };
  const axes = JSON.parse((parent && tag(parent, "jepa.axes")) || "[]");
  const settings = axes.filter((a) => !SIZES.includes(a));
  const words = { question: parent ? tag(parent, "jepa.question") : "", expect: parent ? tag(parent, "jepa.expect") : "" };
  docs.set(name, { ...doc, ...words, sweep: name, id, axes, settings });
  if (!doc.trials.length) await refresh(name);
  return doc.trials.length > 0;
}

/* Trials as MLflow has them now, over what the document said of them. */
export async function refresh(name) {
  const doc = docs.get(name), old = new Map(doc.trials.map((t) => [t.trial, t]));
  const found = (await runs(doc.id, "trial", 1000)).map((r) => asRow(r, doc.id));
  doc.trials = found.map((row) => {
    const joined = { ...old.get(row.trial), ...row };
    joined.gpu_hours_alone = Math.max(joined.gpu_hours_alone || 0, joined.gpu_hours || 0);
    joined.setting = doc.settings.map((a) => `${a.split(".").pop()}=${joined[a] ?? ""}`).join(" ") || "all";
    return joined;
  });
}

async function runs(experiment, kind, page) {
  const found = [];
  let token;
  do {
    const answer = await ask("runs/search", { experiment_ids: [experiment], max_results: page, page_token: token,
      filter: `tags.\`jepa.kind\` = '${kind}'` });
    found.push(...(answer.runs || []));
    token = kind === "trial" ? answer.next_page_token : undefined;
  } while (token);
  return found;
}

async function artifact(run) {
  try {
    const answer = await fetch(new URL(`../../../get-artifact?run_uuid=${run}&path=scaling.json`, API));
    return answer.ok ? answer.json() : null;
  } catch { return null; }
}

function tag(run, key) { return (run.data.tags || []).find((t) => t.key === key)?.value; }

function asRow(run, experiment) {
  const tags = Object.fromEntries((run.data.tags || []).map((t) => [t.key, t.value]));
  const row = { trial: tags["jepa.trial"], label: run.info.run_name, state: tags["jepa.state"], run: run.info.run_id,
    experiment, attempts: +tags["jepa.attempts"] || 0, gpu_hours: +tags["jepa.gpu_hours"] || 0, cause: tags["jepa.cause"],
    rollbacks: +tags["jepa.rollbacks"] || 0, steps: +tags["jepa.horizon"] || null };
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

/* Histories of what is drawn, many runs a request. */
export async function loadCurves(rows, keys) {
  for (const key of keys) {
    const missing = rows.filter((r) => r.run && !histories.has(`${r.trial} ${key}`));
    for (let i = 0; i < missing.length; i += BULK) {
      const part = missing.slice(i, i + BULK);
      const query = part.map((r) => `run_id=${r.run}`).join("&") + `&metric_key=${encodeURIComponent(key)}&max_results=25000`;
      const found = await ask(`metrics/get-history-bulk?${query}`);
      const names = new Map(part.map((r) => [r.run, r.trial]));
      for (const r of part) histories.set(`${r.trial} ${key}`, []);
      for (const m of found.metrics || []) histories.get(`${names.get(m.run_id)} ${key}`).push([m.step, m.value]);
    }
  }
}

export const runLink = (r) => `../#/experiments/${r.experiment}/runs/${r.run}`;
