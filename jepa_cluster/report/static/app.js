/* The Scaling page. In: sweeps, either from MLflow's REST API with the visitor's own rights, or from the document
   embedded in this file when it stands alone. It draws; fits, intervals and frontiers were computed by
   `jepa scaling` and stand in scaling.json. All of what is shown is in the address, so a view can be sent. */
"use strict";

const UNITS = {
  flops_total: "compute, total [FLOP]", flops_encoder: "compute, encoder [FLOP]", images_seen: "images seen",
  gpu_hours: "GPU-hours", parameters: "encoder parameters", context_fraction: "context, share of patches",
  target_fraction: "one target, share of patches", union_fraction: "targets together, share of patches",
  loss: "training loss (one setting only)", "val/loss": "validation loss, shared masks",
  "probe/rankme": "RankMe, effective rank", "probe/lidar": "LiDAR, effective rank",
};
const XS = ["flops_total", "flops_encoder", "images_seen", "parameters", "gpu_hours", "context_fraction",
  "target_fraction", "union_fraction"];
const COLORS = ["#3b6fb6", "#d1495b", "#2f9e6e", "#c98a00", "#8a5fb0", "#2aa5b8", "#8c6d46", "#777"];
/* Linear probe on ImageNet-1k, arXiv 2301.08243 table 1; FLOPs by this project's arithmetic. Another probe than ours. */
const PAPER = [["ViT-B/16, 600 ep", 6.5e19, 0.271], ["ViT-L/16, 600 ep", 2.0e20, 0.225], ["ViT-H/14, 300 ep", 2.5e20, 0.207]];
const DEFAULTS = { view: "scatter", sweeps: "", y: "", x: "flops_total", color: "model", facet: "", setting: "",
  logx: "1", logy: "1", curves: "1", law: "1", frontier: "1", reference: "0" };
const FLAGS = ["logx", "logy", "curves", "law", "frontier", "reference"];

const $ = (id) => document.getElementById(id);
const docs = new Map();      // sweep -> document (trials, laws, masks, ...)
const histories = new Map(); // "trial metric" -> [[step, value], ...]
let known = [];              // [{name, id}] of sweeps that can be picked
let state = { ...DEFAULTS };

/* ---- reading ------------------------------------------------------------------------------------------------- */

const API = new URL("../ajax-api/2.0/mlflow/", location.href.split("#")[0]);
const EMBEDDED = $("jepa-data");

async function ask(path, body) {
  const answer = await fetch(new URL(path, API), body && {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  if (!answer.ok) throw new Error(`MLflow answered ${answer.status} to ${path.split("?")[0]}`);
  return answer.json();
}

async function listSweeps() {
  if (EMBEDDED) {
    const doc = JSON.parse(EMBEDDED.textContent);
    docs.set(doc.sweep, doc);
    for (const [trial, rows] of Object.entries(doc.curves || {}))
      for (const row of rows)
        for (const [key, value] of Object.entries(row))
          if (key !== "step") push(histories, `${trial} ${key}`, [row.step, value]);
    return [{ name: doc.sweep }];
  }
  const found = await ask("experiments/search", { max_results: 1000, filter: "tags.`jepa.kind` = 'sweep'" });
  return (found.experiments || []).map((e) => ({ name: e.name, id: e.experiment_id }));
}

async function loadSweep(name) {
  if (docs.has(name)) return;
  const id = known.find((k) => k.name === name).id;
  const runs = [];
  let token = "";
  do {
    const page = await ask("runs/search", { experiment_ids: [id], max_results: 5000, page_token: token || undefined });
    runs.push(...(page.runs || []));
    token = page.next_page_token;
  } while (token);
  const parent = runs.find((r) => tag(r, "jepa.kind") === "sweep");
  const doc = (parent && await artifact(parent.info.run_id)) || { laws: {}, masks: {}, settings: null };
  const trials = runs.filter((r) => tag(r, "jepa.kind") === "trial").map((r) => asRow(r, id));
  const axes = parent ? JSON.parse(tag(parent, "jepa.axes") || "[]") : doc.axes || [];
  const settings = axes.filter((a) => !["model", "optim.steps", "optim.epochs"].includes(a));
  for (const row of trials) row.setting = settings.map((a) => `${a.split(".").pop()}=${row[a] ?? ""}`).join(" ") || "all";
  docs.set(name, { ...doc, sweep: name, axes, settings, trials, error: doc.error,
    question: parent ? tag(parent, "jepa.question") : "", expect: parent ? tag(parent, "jepa.expect") : "" });
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
    experiment, attempts: +tags["jepa.attempts"] || 0, gpu_hours: +tags["jepa.gpu_hours"] || 0,
    rollbacks: +tags["jepa.rollbacks"] || 0, steps: +tags["jepa.horizon"] || null };
  for (const [k, v] of Object.entries(tags)) if (k.startsWith("axis.")) row[k.slice(5)] = v;
  for (const p of run.data.params || []) {
    if (p.key === "model.name") row.model = p.value;
    if (p.key === "parameters" || p.key === "seed") row[p.key] = +p.value;
  }
  for (const m of run.data.metrics || []) row[m.key] = m.value;
  return row;
}

/* Histories of what is drawn, 100 runs a request; a trial's rows are joined by step. */
async function loadCurves(rows, keys) {
  if (EMBEDDED) return;
  for (const key of keys) {
    const missing = rows.filter((r) => r.run && !histories.has(`${r.trial} ${key}`));
    for (let i = 0; i < missing.length; i += 100) {
      const part = missing.slice(i, i + 100);
      const query = part.map((r) => `run_id=${r.run}`).join("&") + `&metric_key=${encodeURIComponent(key)}&max_results=25000`;
      const found = await ask(`metrics/get-history-bulk?${query}`);
      const names = new Map(part.map((r) => [r.run, r.trial]));
      for (const r of part) histories.set(`${r.trial} ${key}`, []);
      for (const m of found.metrics || []) histories.get(`${names.get(m.run_id)} ${key}`).push([m.step, m.value]);
    }
  }
}

/* ---- small things -------------------------------------------------------------------------------------------- */

function push(map, key, value) { map.has(key) ? map.get(key).push(value) : map.set(key, [value]); }
function group(rows, of) { const out = new Map(); for (const r of rows) push(out, String(of(r) ?? "?"), r); return out; }
const mean = (v) => v.reduce((a, b) => a + b, 0) / v.length;
const unit = (m) => UNITS[m] || (m.endsWith("_error") ? `${m.replace("probe/", "").replace("_error", "")} probe error (1 − top-1)` : m);
const short = (v) => (v === undefined || v === null ? "–" : Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2) : +v.toPrecision(4) + "");
const node = (name, text) => Object.assign(document.createElement(name), text === undefined ? {} : { textContent: text });
const point = (r) => String(r.label || r.trial).replace(/ s\d+$/, "");
const natural = (a, b) => parseFloat(a) - parseFloat(b) || a.localeCompare(b, "en", { numeric: true });

function chosen() { return (state.sweeps ? state.sweeps.split(",") : known.slice(0, 1).map((k) => k.name)).filter((s) => known.some((k) => k.name === s)); }
function allRows() { return chosen().flatMap((s) => (docs.get(s)?.trials || []).map((r) => ({ ...r, sweep: s }))); }

/* Rows to draw; plain loss is refused across settings. */
function visible() {
  const rows = allRows().filter((r) => !state.setting || r.setting === state.setting);
  const settings = new Set(rows.map((r) => r.setting));
  if (state.y === "loss" && settings.size > 1)
    return { rows: [], note: `Training loss is shown within one setting only: the target moves with the encoder and the loss's scale depends on the masks, so losses of ${settings.size} settings do not compare. Pick a setting, or validation loss under the shared masks.` };
  const withBoth = rows.filter((r) => r[state.x] > 0 && Number.isFinite(r[state.y]));
  const without = rows.length - withBoth.length;
  return { rows: withBoth, note: without ? `${without} of ${rows.length} trials have no ${state.y} yet.` : "" };
}

/* ---- state and controls -------------------------------------------------------------------------------------- */

function readAddress() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  state = { ...DEFAULTS, ...Object.fromEntries(Object.entries(given).filter(([k]) => k in DEFAULTS)) };
}

function writeAddress() {
  const different = Object.entries(state).filter(([k, v]) => v !== DEFAULTS[k]);
  history.replaceState(null, "", `#${new URLSearchParams(different)}`);
}

function options(id, values, names = {}) {
  const select = $(id);
  select.replaceChildren(...values.map((v) => Object.assign(node("option", names[v] || unit(v)), { value: v })));
  if (!values.includes(state[id])) state[id] = values[0] || "";
  select.value = state[id];
}

function fillControls() {
  const rows = allRows();
  const keys = new Set(rows.flatMap((r) => Object.keys(r)));
  const ys = [...keys].filter((k) => (k.startsWith("probe/") || k === "val/loss" || k === "loss") && k !== "")
    .sort((a, b) => (b.endsWith("_error") - a.endsWith("_error")) || natural(a, b));
  if (!state.y) state.y = chosen().map((s) => docs.get(s)?.error).find((e) => ys.includes(e)) || ys[0] || "";
  options("y", ys);
  options("x", XS.filter((x) => keys.has(x)));
  const axes = [...new Set(chosen().flatMap((s) => docs.get(s)?.axes || []))];
  const groups = [...new Set(["model", ...axes, "setting", "seed", "sweep"])];
  const plain = Object.fromEntries(groups.map((g) => [g, g.split(".").pop().replaceAll("_", " ")]));
  options("color", groups, plain);
  options("facet", ["", ...groups], { ...plain, "": "none" });
  options("setting", ["", ...[...new Set(rows.map((r) => r.setting))].sort(natural)], { "": "all" });
  for (const f of FLAGS) $(f).checked = state[f] === "1";
  $("view").value = state.view;
  const box = $("sweeps");
  if (box.querySelectorAll("input").length !== known.length)
    box.append(...known.map((k) => {
      const label = node("label");
      label.append(Object.assign(node("input"), { type: "checkbox", value: k.name }), k.name);
      return label;
    }));
  for (const input of box.querySelectorAll("input")) input.checked = chosen().includes(input.value);
}

/* ---- drawing ------------------------------------------------------------------------------------------------- */

function theme() {
  const css = getComputedStyle(document.documentElement);
  const get = (n) => css.getPropertyValue(n).trim();
  return { ink: get("--ink"), line: get("--line"), paper: get("--paper") };
}

function layout(facets, t) {
  const columns = Math.min(facets.length, window.innerWidth < 680 ? 1 : 3), lines = Math.ceil(facets.length / columns);
  const out = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: t.ink, size: 13 },
    margin: { l: 70, r: 15, t: facets.length > 1 ? 30 : 10, b: window.innerWidth < 680 ? 150 : 105 }, hovermode: "closest", annotations: [],
    legend: { orientation: "h", yref: "container", y: 0.01, yanchor: "bottom", x: 0, itemsizing: "constant" }, showlegend: true, shapes: [] };
  facets.forEach((name, i) => {
    const n = i ? i + 1 : "", column = i % columns, line = Math.floor(i / columns);
    const gapX = columns > 1 ? 0.07 : 0, gapY = lines > 1 ? 0.16 : 0;
    const w = (1 - gapX * (columns - 1)) / columns, h = (1 - gapY * (lines - 1)) / lines;
    const x0 = column * (w + gapX), y1 = 1 - line * (h + gapY);
    const common = { gridcolor: t.line, zeroline: false, linecolor: t.line, exponentformat: "power", automargin: true };
    const few = state.logy === "1" ? { dtick: undefined, nticks: 9, tickformat: ".2~g" } : {};
    out[`xaxis${n}`] = { ...common, domain: [x0, x0 + w], anchor: `y${n}`, type: state.logx === "1" ? "log" : "linear",
      title: { text: line === lines - 1 || i + columns >= facets.length ? unit(state.x) : "" }, ...(i ? { matches: "x" } : {}) };
    out[`yaxis${n}`] = { ...common, ...few, domain: [Math.max(0, y1 - h), y1], anchor: `x${n}`,
      type: state.logy === "1" ? "log" : "linear", title: { text: column ? "" : unit(state.y) }, ...(i ? { matches: "y" } : {}) };
    if (facets.length > 1) out.annotations.push({ text: name, xref: "paper", yref: "paper", x: x0 + w / 2, y: y1,
      xanchor: "center", yanchor: "bottom", showarrow: false });
  });
  return out;
}

const axisOf = (i) => ({ xaxis: `x${i ? i + 1 : ""}`, yaxis: `y${i ? i + 1 : ""}` });

/* Points: one mark a point, whiskers over its seeds (lowest to highest), hollow when not finished. */
function marks(rows, name, color, where, legend) {
  const points = [...group(rows, (r) => `${r.sweep} ${point(r)} ${r.state === "done" || r.trial}`).values()];
  const y = points.map((p) => mean(p.map((r) => r[state.y])));
  return { type: "scatter", mode: "markers", name, legendgroup: name, showlegend: legend, ...where,
    x: points.map((p) => mean(p.map((r) => r[state.x]))), y,
    error_y: { type: "data", symmetric: false, thickness: 1.2, width: 3, color,
      array: points.map((p, i) => Math.max(...p.map((r) => r[state.y])) - y[i]),
      arrayminus: points.map((p, i) => y[i] - Math.min(...p.map((r) => r[state.y]))) },
    marker: { color, size: 10, line: { color, width: 1.5 },
      symbol: points.map((p) => (p.some((r) => r.rollbacks > 0) ? "diamond" : "circle") + (p.every((r) => r.state === "done") ? "" : "-open")) },
    customdata: points.map((p) => p.map((r) => r.trial)),
    text: points.map((p) => `<b>${point(p[0])}</b>${p.length > 1 ? ` · ${p.length} seeds` : ""}<br>${[...new Set(p.map((r) => r.state))].join(", ")}`),
    hovertemplate: `%{text}<br>${unit(state.x)}: %{x:.4g}<br>${unit(state.y)}: %{y:.4g}<extra></extra>` };
}

function lines(rows, color, where) {
  const x = [], y = [];
  for (const r of rows) {
    const xs = new Map(histories.get(`${r.trial} ${state.x}`) || []);
    const ys = (histories.get(`${r.trial} ${state.y}`) || []).filter(([step]) => xs.get(step) > 0).sort((a, b) => a[0] - b[0]);
    for (const [step, value] of ys) { x.push(xs.get(step)); y.push(value); }
    x.push(null); y.push(null);
  }
  return { type: "scatter", mode: "lines", x, y, line: { color, width: 1 }, opacity: 0.45, hoverinfo: "skip", showlegend: false, ...where };
}

function lawTraces(t, where, legend) {
  const out = [];
  for (const s of chosen()) {
    const found = docs.get(s)?.laws?.[`${state.y}|${state.x}`];
    if (!found) continue;
    const fit = found.fits.find((f) => f.name === (state.setting || "frontier")) || found.fits[0];
    const rows = docs.get(s).trials.filter((r) => found.frontier.includes(r.trial));
    if (state.frontier === "1" && rows.length > 1) {
      const best = [...group(rows, point).values()].map((p) => [mean(p.map((r) => r[state.x])), mean(p.map((r) => r[state.y]))]).sort((a, b) => a[0] - b[0]);
      out.push({ type: "scatter", mode: "lines", x: best.map((b) => b[0]), y: best.map((b) => b[1]), name: "frontier", legendgroup: "frontier",
        line: { color: t.ink, width: 1, shape: "hv" }, opacity: 0.6, hoverinfo: "skip", showlegend: legend, ...where });
    }
    if (state.law !== "1" || !fit?.c) continue;
    const top = 2 * Math.max(...docs.get(s).trials.map((r) => r[state.y] || 0));
    out.push({ type: "scatter", mode: "lines", fill: "toself", fillcolor: "rgba(128,128,128,.2)", line: { width: 0 }, hoverinfo: "skip",
      name: "90 % band", legendgroup: "law", showlegend: legend, ...where,
      x: [...fit.c, ...[...fit.c].reverse()], y: [...fit.high.map((v) => Math.min(v, top)), ...[...fit.low].reverse()] });
    out.push({ type: "scatter", mode: "lines", x: fit.c, y: fit.e, name: `law: ${fit.name}`, legendgroup: "law", showlegend: legend,
      line: { color: t.ink, dash: "dash", width: 1.6 }, hovertemplate: `${fit.text}<extra></extra>`, ...where });
  }
  return out;
}

async function drawScatter(t) {
  const { rows, note } = visible();
  $("note").textContent = note;
  if (state.curves === "1") await loadCurves(rows, [state.x, state.y]);
  const byFacet = state.facet ? group(rows, (r) => r[state.facet]) : new Map([["", rows]]);
  const facets = [...byFacet.keys()].sort(natural).slice(0, 12);
  const order = new Map([...group(rows, (r) => r[state.color])].sort((a, b) =>
    state.color === "model" ? a[1][0].parameters - b[1][0].parameters : natural(a[0], b[0])).map(([k], i) => [k, i]));
  const shown = new Set(), traces = [];
  facets.forEach((facet, i) => {
    const where = axisOf(i);
    traces.push(...lawTraces(t, where, i === 0));
    const groups = [...group(byFacet.get(facet), (r) => r[state.color])].sort((a, b) => order.get(a[0]) - order.get(b[0]));
    for (const [name, members] of groups) {
      const color = COLORS[order.get(name) % COLORS.length];
      if (state.curves === "1") traces.push(lines(members, color, where));
      traces.push(marks(members, name, color, where, !shown.has(name)));
      shown.add(name);
    }
    if (state.reference === "1" && state.x === "flops_total" && state.y.endsWith("_error"))
      traces.push({ type: "scatter", mode: "markers+text", x: PAPER.map((p) => p[1]), y: PAPER.map((p) => p[2]), text: PAPER.map((p) => p[0]),
        textposition: ["middle left", "top left", "bottom left"], marker: { symbol: "star", size: 12, color: t.ink }, name: "paper: linear probe, ImageNet-1k", showlegend: i === 0,
        hovertemplate: "%{text}: %{y}<extra>arXiv 2301.08243, linear probe</extra>", ...where });
  });
  const plan = layout(facets.length ? facets : [""], t);
  const start = rows.map((r) => r[`initial/${state.y}`]).filter(Number.isFinite);
  if (start.length && !state.facet) {
    plan.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: mean(start), y1: mean(start), line: { dash: "dot", color: t.ink, width: 1 } });
    plan.annotations.push({ text: "randomly initialised encoder", xref: "paper", x: 1, xanchor: "right", yanchor: "bottom", showarrow: false,
      y: state.logy === "1" ? Math.log10(mean(start)) : mean(start), yref: "y" });
  }
  return [traces, plan];
}

function drawIso(t) {
  const traces = [];
  let i = 0;
  for (const s of chosen())
    for (const b of docs.get(s)?.laws?.[`${state.y}|${state.x}`]?.iso || []) {
      const color = COLORS[i++ % COLORS.length], name = `${short(b.compute)} ${unit(state.x).match(/\[(.*)\]/)?.[1] || ""}`;
      traces.push({ type: "scatter", mode: "markers", x: b.n, y: b.e, name, legendgroup: name, marker: { color, size: 9 } });
      traces.push({ type: "scatter", mode: "lines", x: b.curve_n, y: b.curve_e, legendgroup: name, showlegend: false, line: { color, dash: "dot" }, hoverinfo: "skip" });
      if (b.optimum) traces.push({ type: "scatter", mode: "markers", x: [b.optimum], y: [Math.min(...b.curve_e)], showlegend: false, legendgroup: name,
        marker: { symbol: "star", size: 14, color }, hovertemplate: `N_opt = %{x:.3g}<extra>${name}</extra>` });
    }
  $("note").textContent = traces.length ? "" : "No budget is shared by three sizes, so there is no iso-FLOP curve. Give small models longer horizons.";
  const plan = layout([""], t);
  plan.xaxis.title.text = UNITS.parameters;
  plan.xaxis.type = "log";
  return [traces, plan];
}

function drawHeat(t) {
  const rows = visible().rows.filter((r) => r.state === "done");
  const swept = [...new Set(chosen().flatMap((s) => docs.get(s)?.axes || []))];
  const first = swept.find((a) => a.includes("scale")) || swept.find((a) => a !== state.color) || "model";
  const second = swept.find((a) => a.includes("aspect")) || swept.find((a) => a !== first) || "seed";
  const xs = [...new Set(rows.map((r) => String(r[first])))].sort(natural), ys = [...new Set(rows.map((r) => String(r[second])))].sort(natural);
  const cell = (x, y) => rows.filter((r) => String(r[first]) === x && String(r[second]) === y).map((r) => r[state.y]);
  const z = ys.map((y) => xs.map((x) => (cell(x, y).length ? mean(cell(x, y)) : null)));
  const text = ys.map((y) => xs.map((x) => (cell(x, y).length ? `${short(mean(cell(x, y)))}<br>n = ${cell(x, y).length}` : "none")));
  $("note").textContent = rows.length ? "Means over finished trials, sizes and seeds together unless one setting or facet is chosen; n in each cell." : "Nothing is finished.";
  const plan = layout([""], t);
  Object.assign(plan.xaxis, { type: "category", title: { text: first } });
  Object.assign(plan.yaxis, { type: "category", title: { text: second }, tickformat: "" });
  return [[{ type: "heatmap", x: xs, y: ys, z, text, texttemplate: "%{text}", colorscale: "Viridis", reversescale: true, xgap: 2, ygap: 2,
    colorbar: { title: { text: unit(state.y), side: "right" } }, hovertemplate: "%{x}, %{y}: %{text}<extra></extra>" }], plan];
}

let turn = 0;
async function draw() {
  const mine = ++turn;
  try {
    await Promise.all(chosen().map(loadSweep));
    if (mine !== turn) return;
    fillControls();
    writeAddress();
    const t = theme();
    const [traces, plan] = await { scatter: drawScatter, iso: drawIso, heat: drawHeat }[state.view](t);
    if (mine !== turn) return;
    await Plotly.react($("plot"), traces, plan, { responsive: true, displayModeBar: false });
    words();
    document.body.dataset.ready = String(mine);
  } catch (e) {
    $("note").textContent = `${e.message}. Reload when the server is back.`;
  }
}

/* ---- words beside the figure --------------------------------------------------------------------------------- */

const HEAD = ["trial", "state", "setting", "parameters", "x", "random", "trained", "gpu_hours"];
function cells(r) {
  return [r.label, r.state, r.setting, short(r.parameters), short(r[state.x]), short(r[`initial/${state.y}`]), short(r[state.y]), short(r.gpu_hours)];
}

function words() {
  const names = chosen(), doc = docs.get(names[0]) || {};
  $("title").textContent = names.length === 1 ? doc.question || names[0] : names.join(", ");
  $("expect").textContent = names.length === 1 && doc.expect ? `Expected: ${doc.expect}` : "";
  document.title = `Scaling: ${names.join(", ")}`;
  const told = names.flatMap((s) => docs.get(s)?.laws?.[`${state.y}|${state.x}`]?.summary || [`${s}: no fit of this pair of axes; run jepa scaling ${s}`]);
  $("findings").replaceChildren(...told.map((line) => node("li", line)));
  const head = node("tr");
  head.append(...HEAD.map((h) => node("th", h === "x" ? state.x : h === "trained" ? state.y : h === "random" ? "before training" : h.replace("_", "-"))));
  const body = allRows().slice(0, 2000).map((r) => {
    const line = node("tr"), values = cells(r);
    line.append(...values.map((v) => node("td", v)));
    if (r.run) { const link = node("a", values[0]); link.href = runLink(r); line.firstChild.replaceChildren(link); }
    return line;
  });
  $("table").replaceChildren(head, ...body);
}

const runLink = (r) => `../#/experiments/${r.experiment}/runs/${r.run}`;

function showTrial(names) {
  const rows = allRows().filter((r) => names.includes(r.trial));
  if (!rows.length) return;
  const out = [node("h3", point(rows[0]))];
  for (const r of rows) {
    const facts = [`seed ${r.seed}: ${r.state}`, r.rollbacks > 0 ? `rolled back ${r.rollbacks}×` : "", `${r.attempts} attempts`,
      `${short(r.gpu_hours)} GPU-h`, `${short(r[state.y])}, before training ${short(r[`initial/${state.y}`])}`];
    const line = node("p", facts.filter(Boolean).join(", ") + ". ");
    if (r.run) line.append(Object.assign(node("a", "MLflow run"), { href: runLink(r), className: "run" }), " ");
    line.append(node("code", `jepa why ${r.trial}`));
    out.push(line);
  }
  const picture = docs.get(rows[0].sweep)?.masks?.[rows[0].setting];
  if (picture) {
    out.push(node("p", `masks of ${rows[0].setting} (blue context, orange targets):`));
    for (const sample of picture.samples.slice(0, 4)) out.push(mask(sample, picture.grid));
  }
  $("trial").replaceChildren(...out);
}

function mask(letters, grid) {
  const canvas = Object.assign(node("canvas"), { width: grid, height: grid });
  const pen = canvas.getContext("2d");
  [...letters].forEach((c, i) => {
    pen.fillStyle = { c: "#3b6fb6", t: "#e08a2b" }[c] || "#9993";
    pen.fillRect(i % grid, Math.floor(i / grid), 1, 1);
  });
  return canvas;
}

function download(name, type, text) {
  const link = Object.assign(node("a"), { download: name, href: URL.createObjectURL(new Blob([text], { type })) });
  link.click();
  URL.revokeObjectURL(link.href);
}

function csv() {
  const rows = allRows(), columns = [...new Set(rows.flatMap((r) => Object.keys(r)))];
  const quote = (v) => (/[",\n]/.test(String(v ?? "")) ? `"${String(v).replaceAll('"', '""')}"` : String(v ?? ""));
  download("scaling.csv", "text/csv", [columns, ...rows.map((r) => columns.map((c) => r[c]))].map((l) => l.map(quote).join(",")).join("\n"));
}

/* ---- begin --------------------------------------------------------------------------------------------------- */

function listen() {
  for (const id of ["view", "y", "x", "color", "facet", "setting"]) $(id).onchange = () => { state[id] = $(id).value; draw(); };
  for (const id of FLAGS) $(id).onchange = () => { state[id] = $(id).checked ? "1" : "0"; draw(); };
  $("sweeps").onchange = () => {
    state.sweeps = [...$("sweeps").querySelectorAll("input:checked")].map((i) => i.value).join(",");
    draw();
  };
  for (const kind of ["png", "svg"]) $(kind).onclick = () => Plotly.downloadImage($("plot"), { format: kind, filename: "scaling", width: 1200, height: 700, scale: kind === "png" ? 2 : 1 });
  $("csv").onclick = csv;
  $("share").onclick = () => navigator.clipboard?.writeText(location.href).then(() => { $("share").textContent = "Copied"; });
  addEventListener("keydown", (e) => {
    if (e.target.matches("select, input[type=text]") || e.ctrlKey || e.metaKey || e.altKey) return;
    const flag = { c: "curves", l: "law", f: "frontier", r: "reference", x: "logx", y: "logy" }[e.key];
    if (flag) { state[flag] = state[flag] === "1" ? "0" : "1"; draw(); }
  });
  addEventListener("hashchange", () => { readAddress(); draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

async function begin() {
  readAddress();
  listen();
  try { known = await listSweeps(); } catch (e) { $("note").textContent = `${e.message}.`; return; }
  if (!known.length) { $("note").textContent = "No sweep is here yet: submit one and let jepa ui or jepa sync collect it."; return; }
  await draw();
  const on = (name) => $("plot").on(name, (e) => { const c = e.points[0].customdata; if (c) showTrial([].concat(c)); });
  on("plotly_hover"); on("plotly_click");
}
begin();
