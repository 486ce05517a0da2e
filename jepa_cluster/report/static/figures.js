/* Turn rows into Plotly traces: points with curves and laws, iso-FLOP parabolas, heat maps. No fits. */

import { COLORS, SHAPES, AXIS_TITLES } from "scaling/constants.js";
import { TRIAL_METRICS, REFERENCE, shortTitle, groupBy, interval, logTicks, mean, naturalOrder, axisName, pointLabel, formatNumber, axisTitle } from "scaling/format.js";
import { documents, histories } from "scaling/api.js";
import { chosenSweeps, findings, isOn, state, sweptAxes, visibleRows } from "scaling/state.js";

const MAX_CURVES = 200;  // trials above which curves are left out
const MAX_FACETS = 12; // facets that are drawn
const DASHES = ["dash", "dot", "longdash", "dashdot"]; // laws of several sweeps

const isNarrow = () => window.innerWidth < 680;
const axisOf = (i) => ({ xaxis: `x${i ? i + 1 : ""}`, yaxis: `y${i ? i + 1 : ""}` });

export function theme() {
  const css = getComputedStyle(document.documentElement);
  const get = (n) => css.getPropertyValue(n).trim();
  return { ink: get("--ink"), line: get("--line"), paper: get("--paper") };
}

export function curvesOf() {
  const { rows } = visibleRows();
  return state.view === "scatter" && isOn("curves") && rows.length <= MAX_CURVES && !TRIAL_METRICS.includes(state.x) ? rows : [];
}

function panels(rows) {
  const byFacet = state.facet ? groupBy(rows, (r) => r[state.facet]) : new Map([["", rows]]);
  const names = [...byFacet.keys()].sort(naturalOrder);
  const left = names.length > MAX_FACETS ? ` The first ${MAX_FACETS} of ${names.length} facets.` : "";
  return { byFacet, facets: names.length ? names.slice(0, MAX_FACETS) : [""], left };
}

function layout(facets, t, apart = false) {
  const columns = Math.min(facets.length, isNarrow() ? 1 : facets.length === 2 || facets.length === 4 ? 2 : 3);
  const rowCount = Math.ceil(facets.length / columns), gapX = columns > 1 ? (apart ? 0.16 : 0.07) : 0, gapY = rowCount > 1 ? 0.3 / rowCount : 0;
  const out = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: t.ink, size: 13 },
    margin: { l: 70, r: 15, t: facets.length > 1 ? 30 : 10, b: isNarrow() ? 150 : 105 }, hovermode: "closest", annotations: [],
    height: Math.max(isNarrow() ? 420 : 560, rowCount * (isNarrow() ? 280 : 300) + 100), hoverlabel: { font: { size: 12 } },
    legend: { orientation: "h", yref: "container", y: 0.01, yanchor: "bottom", x: 0, itemsizing: "constant" }, showlegend: true, shapes: [] };
  facets.forEach((name, i) => {
    const n = i ? i + 1 : "", column = i % columns, line = Math.floor(i / columns);
    const w = (1 - gapX * (columns - 1)) / columns, h = (1 - gapY * (rowCount - 1)) / rowCount;
    const x0 = column * (w + gapX), y1 = 1 - line * (h + gapY);
    const common = { gridcolor: t.line, zeroline: false, linecolor: t.line, exponentformat: "power", automargin: true, ticklabelstandoff: 2 };
    const few = isOn("logy") ? { nticks: 9, tickformat: ".3~g" } : {};
    out[`xaxis${n}`] = { ...common, domain: [x0, x0 + w], anchor: `y${n}`, type: isOn("logx") ? "log" : "linear", nticks: columns > 1 || isNarrow() ? 5 : 7,
      title: { text: apart || line === rowCount - 1 || i + columns >= facets.length ? axisTitle(state.x) : "" }, ...(i && !apart ? { matches: "x" } : {}) };
    out[`yaxis${n}`] = { ...common, ...few, showticklabels: apart || !column, domain: [Math.max(0, y1 - h), y1], anchor: `x${n}`,
      type: isOn("logy") ? "log" : "linear", title: { standoff: 14, text: column && !apart ? "" : rowCount > 1 ? shortTitle(state.y) : axisTitle(state.y) }, ...(i && !apart ? { matches: "y" } : {}) };
    if (facets.length > 1) out.annotations.push({ text: name, xref: "paper", yref: "paper", x: x0 + w / 2, y: y1,
      xanchor: "center", yanchor: "bottom", showarrow: false });
  });
  return out;
}

/* ---- points, curves, laws -------------------------------------------------------------------------------------- */

/* One mark per point, with whiskers over the 90 % interval of the mean of its seeds. Hollow: not finished.
   shape: row -> symbol. */
function pointTraces(rows, name, color, shape, where) {
  const points = [...groupBy(rows, (r) => `${r.sweep} ${pointLabel(r)} ${r.state === "done" || r.trial}`).values()];
  const means = points.map((p) => interval(p.map((r) => r[state.y]))), y = means.map(([m]) => m);
  return { type: "scatter", mode: "markers", name, legendgroup: name, showlegend: false, ...where,
    x: points.map((p) => mean(p.map((r) => r[state.x]))), y,
    error_y: { type: "data", symmetric: false, thickness: 1.2, width: 3, color,
      array: means.map(([m, , high]) => high - m || 0), arrayminus: means.map(([m, low]) => m - low || 0) },
    marker: { color, size: rows.length > MAX_CURVES ? 6 : 10, line: { color, width: 1.5 },
      symbol: points.map((p) => shape(p[0]) + (p.every((r) => r.state === "done") ? "" : "-open")) },
    customdata: points.map((p) => p.map((r) => r.trial)),
    text: points.map((p) => `<b>${pointLabel(p[0])}</b>${p.length > 1 ? ` · ${p.length} seeds` : ""}<br>${[...new Set(p.map((r) => r.state))].join(", ")}`),
    hovertext: means.map(([m, low, high]) => formatNumber(m) + (low === undefined ? "" : ` [${formatNumber(low)}, ${formatNumber(high)}] over seeds, 90 %`)),
    hovertemplate: `%{text}<br>${axisTitle(state.x)}: %{x:.4g}<br>${axisTitle(state.y)}: %{hovertext}<extra></extra>` };
}

/* Small marks of the seeds of points that have several. */
function seedTraces(rows, name, color, t, where) {
  const several = [...groupBy(rows.filter((r) => r.state === "done"), (r) => `${r.sweep} ${pointLabel(r)}`).values()].filter((p) => p.length > 1).flat();
  return { type: "scatter", mode: "markers", legendgroup: name, showlegend: false, hoverinfo: "skip", ...where,
    x: several.map((r) => r[state.x]), y: several.map((r) => r[state.y]), marker: { color, size: 5, line: { color: t.paper, width: 1 } } };
}

/* Legend entries without points: one per colour, one per shape. */
function legendTraces(axis, values, colors, shapes) {
  const words = Object.assign({}, ...chosenSweeps().map((s) => documents.get(s)?.words?.[axis]));
  const name = (v) => words[v] || (["model", "setting", "sweep"].includes(axis) ? v : `${axisName(axis)} ${v}`);
  return values.map((v, i) => ({ type: "scatter", mode: "markers", x: [null], y: [null], name: name(v), legendgroup: v,
    marker: { color: colors[i % colors.length], symbol: shapes[i % shapes.length], size: 10 } }));
}

function curveTraces(rows, color, where) {
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
  for (const [i, s] of chosenSweeps().entries()) {
    const found = findings(s), doc = documents.get(s), of = chosenSweeps().length > 1 ? ` of ${s}` : "";
    if (!found) continue;
    const fit = withinData(selectedFit(found));
    const rows = doc.trials.filter((r) => found.frontier.includes(r.trial));
    if (isOn("frontier") && rows.length > 1) {
      const best = [...groupBy(rows, pointLabel).values()].map((p) => [mean(p.map((r) => r[state.x])), mean(p.map((r) => r[state.y]))]).sort((a, b) => a[0] - b[0]);
      out.push({ type: "scatter", mode: "lines", x: best.map((b) => b[0]), y: best.map((b) => b[1]), name: `frontier${of}`, legendgroup: `frontier${of}`,
        line: { color: t.ink, width: 1, shape: "hv" }, opacity: 0.6, hoverinfo: "skip", showlegend: legend, ...where });
    }
    if (isOn("law") && fit?.c) {
      out.push(bandTrace(fit, `90 % band${of}`, { legendgroup: `law${of}`, showlegend: legend, ...where }));
      out.push({ type: "scatter", mode: "lines", x: fit.c, y: fit.e, meta: "law", name: `law${of}: ${fit.name}`, legendgroup: `law${of}`, showlegend: legend,
        line: { color: t.ink, dash: DASHES[i % DASHES.length], width: 1.6 }, hoverinfo: "skip", ...where }); // no hover: it would cover the trials
    }
    const predicted = doc.predicted;
    if (isOn("law") && predicted?.points && predicted.error === state.y && predicted.compute === state.x)
      out.push({ type: "scatter", mode: "markers", x: predicted.points.map((p) => p.compute), y: predicted.points.map((p) => p.error.value), ...where,
        error_y: { type: "data", symmetric: false, color: t.ink, array: predicted.points.map((p) => p.error.high - p.error.value),
          arrayminus: predicted.points.map((p) => p.error.value - p.error.low) }, name: `predicted from ${predicted.source}`, showlegend: legend,
        marker: { symbol: "square-open", size: 9, color: t.ink }, hovertemplate: "predicted beforehand: %{y:.4g}<extra></extra>" });
  }
  return out;
}

const selectedFit = (found) => found?.fits.find((f) => f.name === (state.setting || "frontier")) || found?.fits[0];

/* The part of a law inside its data, unless the user asked for all of it. */
function withinData(fit) {
  if (!fit?.span || isOn("beyond")) return fit;
  const kept = fit.c.map((c, i) => (c >= fit.span[0] && c <= fit.span[1] ? i : -1)).filter((i) => i >= 0);
  return { ...fit, ...Object.fromEntries(["c", "e", "low", "high"].map((k) => [k, kept.map((i) => fit[k][i])])) };
}

function bandTrace(fit, name, more) {
  return { type: "scatter", mode: "lines", meta: "law", fill: "toself", fillcolor: "rgba(128,128,128,.2)", line: { width: 0 }, hoverinfo: "skip", name,
    x: [...fit.c, ...[...fit.c].reverse()], y: [...fit.high, ...[...fit.low].reverse()], ...more };
}

/* Fit y to the data with a margin. Whiskers extend it to 1.5 times the data at most; laws do not. */
function setYRange(plan, traces, more = []) {
  const some = traces.filter((d) => d.meta !== "law" && d.yaxis !== "y2");
  const ends = (v) => v.filter((y) => y > 0).reduce(([a, b], y) => [Math.min(a, y), Math.max(b, y)], [Infinity, 0]);
  const [least, most] = ends(some.flatMap((d) => d.y).concat(more));
  if (!most) return;
  const [low, high] = ends(some.flatMap((d) => (d.error_y ? d.y.flatMap((y, i) => [y - d.error_y.arrayminus[i], y + d.error_y.array[i]]) : [])).concat(least, most));
  const of = (v) => (isOn("logy") ? Math.log10(v) : v), [a, b] = [of(Math.max(low, least / 1.5)), of(Math.min(high, most * 1.5))];
  const room = (b - a) * 0.05 || 0.05, range = [a - room, b + room], tickvals = isOn("logy") && logTicks(...range);
  for (const k of Object.keys(plan).filter((k) => k.startsWith("yaxis") && (k === "yaxis" || plan[k].matches)))
    Object.assign(plan[k], { range }, tickvals ? { tickmode: "array", tickvals } : {});
}

function referenceTrace(t, where, legend) {
  return { type: "scatter", mode: state.facet || isNarrow() ? "markers" : "markers+text", x: REFERENCE.map((p) => p[state.x]), y: REFERENCE.map((p) => p.error), text: REFERENCE.map((p) => p.name),
    textposition: ["middle left", "top left", "bottom left"], marker: { symbol: "star", size: 12, color: t.ink },
    name: "paper: linear probe, ImageNet-1k", showlegend: legend, hovertemplate: "%{text}: %{y}<extra>arXiv 2301.08243, linear probe</extra>", ...where };
}

function scatter(t) {
  const { rows, note } = visibleRows(), { byFacet, facets, left } = panels(rows), notes = [note];
  const order = new Map([...groupBy(rows, (r) => r[state.color])].sort((a, b) =>
    state.color === "model" ? a[1][0].parameters - b[1][0].parameters : naturalOrder(a[0], b[0])).map(([k], i) => [k, i]));
  const kinds = state.shape ? [...new Set(rows.map((r) => String(r[state.shape] ?? "?")))].sort(naturalOrder) : [];
  const shapeOf = (v) => SHAPES[Math.max(0, kinds.indexOf(v)) % SHAPES.length], shape = (r) => shapeOf(String(r[state.shape] ?? "?"));
  const traces = [], withCurves = new Set(curvesOf().map((r) => r.trial));
  if (isOn("curves") && rows.length > MAX_CURVES) notes.push(`Curves are left out above ${MAX_CURVES} trials: choose a setting.`);
  for (const fit of isOn("law") ? chosenSweeps().map((s) => selectedFit(findings(s))) : [])
    if (fit && !fit.c) notes.push(`${fit.text[0].toUpperCase()}${fit.text.slice(1).split("; E = ")[0]}.`);
  const comparable = state.y.endsWith("_error") && state.x in REFERENCE[0];
  if (isOn("reference") && !comparable) notes.push("The paper's numbers are probe errors over FLOPs, images or parameters.");
  facets.forEach((facet, i) => {
    const where = axisOf(i);
    traces.push(...lawTraces(t, where, i === 0));
    const groups = [...groupBy(byFacet.get(facet) || [], (r) => r[state.color])].sort((a, b) => order.get(a[0]) - order.get(b[0]));
    for (const [name, members] of groups) {
      const color = COLORS[order.get(name) % COLORS.length];
      if (withCurves.size) traces.push(curveTraces(members, color, where));
      traces.push(pointTraces(members, name, color, shape, where), seedTraces(members, name, color, t, where));
    }
    if (isOn("reference") && comparable) traces.push(referenceTrace(t, where, i === 0));
  });
  const same = state.shape === state.color;
  traces.push(...legendTraces(state.color, [...order.keys()], COLORS, same ? [...order.keys()].map(shapeOf) : ["circle"]), ...(same || kinds.length < 2 ? [] : legendTraces(state.shape, kinds, [t.ink], SHAPES)));
  const plan = layout(facets, t), start = rows.map((r) => r[`initial/${state.y}`]).filter(Number.isFinite);
  setYRange(plan, traces, state.facet || !start.length ? [] : [mean(start)]);
  if (start.length && !state.facet) {
    plan.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: mean(start), y1: mean(start), line: { dash: "dot", color: t.ink, width: 1 } });
    plan.annotations.push({ text: "randomly initialised encoder", xref: "paper", x: 1, xanchor: "right", yanchor: "bottom", showarrow: false,
      y: isOn("logy") ? Math.log10(mean(start)) : mean(start), yref: "y" });
  }
  return [traces, plan, notes.join(" ") + left];
}

/* ---- iso-FLOP: error against size at equal compute, and how the best size grows --------------------------------- */

function iso(t) {
  const traces = [];
  let i = 0;
  for (const s of chosenSweeps()) {
    const found = findings(s) || {}, computeUnit = axisTitle(state.x).match(/\[(.*)\]/)?.[1] || axisTitle(state.x);
    for (const b of found.iso || []) {
      const color = COLORS[i++ % COLORS.length], name = `${formatNumber(b.compute)} ${computeUnit}`;
      traces.push({ type: "scatter", mode: "markers", x: b.n, y: b.e, name, legendgroup: name, marker: { color, size: 9 },
        hovertemplate: `${AXIS_TITLES.parameters}: %{x:.4g}<br>${axisTitle(state.y)}: %{y:.4g}<extra>${name}</extra>` });
      traces.push({ type: "scatter", mode: "lines", x: b.curve_n, y: b.curve_e, legendgroup: name, showlegend: false, line: { color, dash: "dot" }, hoverinfo: "skip" });
      if (!b.optimum) continue;
      traces.push({ type: "scatter", mode: "markers", x: [b.optimum], y: [Math.min(...b.curve_e)], showlegend: false, legendgroup: name,
        marker: { symbol: "star", size: 14, color }, hovertemplate: `N_opt = %{x:.3g}<extra>${name}</extra>` });
      traces.push({ type: "scatter", mode: "markers", x: [b.compute], y: [b.optimum], showlegend: false, legendgroup: name, ...axisOf(1),
        marker: { symbol: "star", size: 14, color }, hovertemplate: `N_opt(%{x:.3g}) = %{y:.3g}<extra></extra>` });
    }
    if (found.growth) traces.push({ type: "scatter", mode: "lines", x: found.growth.c, y: found.growth.n, name: found.growth.text, ...axisOf(1),
      line: { color: t.ink, dash: "dash" } });
  }
  const note = traces.length ? "" : "No budget is shared by three sizes, so there is no iso-FLOP curve. Give small models longer horizons, or fork trunks.";
  const plan = layout(traces.some((x) => x.yaxis === "y2") ? ["at equal compute", "the best size"] : [""], t, true);
  Object.assign(plan.xaxis, { title: { text: AXIS_TITLES.parameters }, type: "log" });
  setYRange(plan, traces);
  if (!traces.length) plan.xaxis.visible = plan.yaxis.visible = false;
  if (plan.yaxis2) Object.assign(plan.yaxis2, { title: { text: `N_opt, ${AXIS_TITLES.parameters}` }, type: "log", tickformat: "" });
  return [traces, plan, note];
}

/* ---- heat map: mask scale x aspect where they are swept, else the first two axes -------------------------------- */

function heat(t) {
  const { rows: all, note } = visibleRows(), rows = all.filter((r) => r.state === "done");
  const axes = [...sweptAxes().filter((a) => a !== "model"), "model", "seed"].filter((a) => a !== state.facet);
  const first = axes.find((a) => a.includes("scale")) || axes[0];
  const second = axes.find((a) => a.includes("aspect")) || axes.find((a) => a !== first);
  const values = (a) => [...new Set(rows.map((r) => String(r[a])))].sort(naturalOrder);
  const xs = values(first), ys = values(second), { byFacet, facets, left } = panels(rows);
  const traces = facets.map((facet, i) => {
    const cells = groupBy(byFacet.get(facet) || [], (r) => `${r[first]} × ${r[second]}`);
    const cell = (x, y) => cells.get(`${x} × ${y}`)?.map((r) => r[state.y]);
    return { type: "heatmap", x: xs, y: ys, ...axisOf(i), coloraxis: "coloraxis", xgap: 2, ygap: 2, texttemplate: "%{text}",
      z: ys.map((y) => xs.map((x) => { const c = cell(x, y); return c ? mean(c) : null; })),
      text: ys.map((y) => xs.map((x) => { const c = cell(x, y); return c ? `${formatNumber(mean(c))}<br>n = ${c.length}` : ""; })),
      hovertemplate: "%{x}, %{y}: %{text}<extra></extra>" };
  });
  const plan = layout(facets, t), low = /error|loss/.test(state.y);
  plan.coloraxis = { colorscale: "Viridis", reversescale: low, colorbar: { title: { text: axisTitle(state.y), side: "right" } } };
  for (const key of Object.keys(plan).filter((k) => /^[xy]axis/.test(k)))
    Object.assign(plan[key], { type: "category", tickformat: "", title: plan[key].title.text ? { text: axisName(key[0] === "x" ? first : second) } : { text: "" } });
  const models = new Set(rows.map((r) => r.model)), mixed = models.size > 1 && state.facet !== "model";
  return [traces, plan, [rows.length ? "Means over finished trials, n in each cell." : note || "Nothing is finished.",
    mixed && first !== "model" && second !== "model" ? `${models.size} sizes are averaged together: facet by model to see each.` : ""].join(" ") + left];
}

/* Returns [traces, layout, note above the figure]. */
export function figure(t) { return { scatter, iso, heat }[state.view](t); }
