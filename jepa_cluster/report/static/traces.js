/* Plotly traces of points, seeds, curves and laws, and the legend's entries. No fits. */

import {
  appendTo,
  axisName,
  axisTitle,
  FITTED,
  formatNumber,
  groupBy,
  mean,
  plain,
  pointLabel,
  REFERENCE,
} from "scaling/format.js";
import { documents, histories } from "scaling/api.js";
import { isSmall } from "scaling/layout.js";
import { markOf } from "scaling/marks.js";
import { chosenSweeps, findings, isOn, state } from "scaling/state.js";

export const MAX_CURVES = 200; // trials above which curves are left out
const DASHES = ["dash", "dot", "longdash", "dashdot"]; // laws of several sweeps

/* One mark per point: finished trials in the shape of their setting, others in that of their state.
   A whisker is the interval of a finished point by the noise of all seeds. A rim of ink: the
   learning rate is not known to be near the best one. shape: row -> symbol. */
export function pointTraces(rows, name, color, shape, t, where) {
  const points = [
    ...groupBy(rows, (r) => `${r.sweep} ${pointLabel(r)} ${r.state === "done" || r.trial}`)
      .values(),
  ];
  const means = points.map(interval), y = means.map(([m]) => m);
  const x = points.map((p) => mean(p.map((r) => r[state.x])));
  return {
    type: "scatter",
    mode: "markers",
    name,
    legendgroup: name,
    showlegend: false,
    ...where,
    x,
    y,
    error_y: {
      type: "data",
      symmetric: false,
      thickness: 1.2,
      width: 3,
      color,
      array: means.map(([m, , high]) => high - m || 0),
      arrayminus: means.map(([m, low]) => m - low || 0),
    },
    marker: {
      color,
      size: rows.length > MAX_CURVES ? 6 : 10,
      line: { color: points.map(([r]) => (isOff(r) ? t.ink : color)), width: 1.5 },
      symbol: points.map(([r]) => (r.state === "done" ? shape(r) : markOf(r.state).symbol)),
    },
    customdata: points.map((p) => p.map((r) => r.trial)),
    text: points.map((p) =>
      `<b>${plain(pointLabel(p[0]))}</b>${p.length > 1 ? ` · ${p.length} seeds` : ""}<br>${
        [...new Set(p.map((r) => r.state))].join(", ")
      }`
    ),
    hovertext: means.map(([m, low, high], i) =>
      `${axisTitle(state.x)}: ${formatNumber(x[i])}<br>${axisTitle(state.y)}: ${formatNumber(m)}` +
      (low === undefined ? "" : ` [${formatNumber(low)}, ${formatNumber(high)}]`)
    ),
    hovertemplate: "%{text}<br>%{hovertext}<extra></extra>",
  };
}

/* A calibration exists, and the trial's learning rate is not known to be near its best one. */
export const isOff = (r) => r.state === "done" && r["lr/is_near"] === 0;

/* Returns [mean, low, high] of a finished point; no ends where seeds are not known to differ. */
function interval(rows) {
  const m = mean(rows.map((r) => r[state.y]));
  const reach = documents.get(rows[0].sweep)?.reach?.[state.y];
  if (!reach || rows[0].state !== "done") return [m];
  const factor = Math.exp(reach / Math.sqrt(rows.length));
  return [m, m / factor, m * factor];
}

/* Small marks of the seeds of points that have several. */
export function seedTraces(rows, name, color, t, where) {
  const several = [
    ...groupBy(rows.filter((r) => r.state === "done"), (r) => `${r.sweep} ${pointLabel(r)}`)
      .values(),
  ].filter((p) => p.length > 1).flat();
  return {
    type: "scatter",
    mode: "markers",
    legendgroup: name,
    showlegend: false,
    hoverinfo: "skip",
    ...where,
    x: several.map((r) => r[state.x]),
    y: several.map((r) => r[state.y]),
    marker: { color, size: 5, line: { color: t.paper, width: 1 } },
  };
}

/* The marks of states and their words: ["● done", "◇ queued, interrupted"]. */
export function stateWords(states) {
  const words = new Map();
  for (const s of new Set(states)) appendTo(words, markOf(s).glyph, s);
  return [...words].map(([glyph, names]) => `${glyph} ${names.join(", ")}`);
}

/* Legend entries without points: [{name, color, symbol}]. */
export function legendTraces(entries) {
  return entries.map(({ name, color, symbol }) => ({
    type: "scatter",
    mode: "markers",
    x: [null],
    y: [null],
    name: plain(name),
    legendgroup: name,
    showlegend: true,
    marker: { color, symbol, size: 10, line: { color, width: 1.5 } },
  }));
}

/* The label of a value of an axis, in the words of the tables. */
export function valueName(axis, value) {
  const words = Object.assign({}, ...chosenSweeps().map((s) => documents.get(s)?.words?.[axis]));
  return words[value] ||
    (["model", "setting", "sweep"].includes(axis) ? value : `${axisName(axis)} ${value}`);
}

export function curveTraces(rows, color, where) {
  const x = [], y = [];
  for (const r of rows) {
    const xs = new Map(histories.get(`${r.trial} ${state.x}`) || []);
    const ys = (histories.get(`${r.trial} ${state.y}`) || []).filter(([step]) => xs.get(step) > 0)
      .sort((a, b) => a[0] - b[0]);
    for (const [step, value] of ys) {
      x.push(xs.get(step));
      y.push(value);
    }
    x.push(null);
    y.push(null);
  }
  return {
    type: "scatter",
    mode: "lines",
    x,
    y,
    line: { color, width: 1 },
    opacity: 0.45,
    hoverinfo: "skip",
    showlegend: false,
    ...where,
  };
}

export function lawTraces(t, where, legend) {
  const out = [];
  for (const [i, s] of chosenSweeps().entries()) {
    const found = findings(s),
      doc = documents.get(s),
      frontier = found?.frontier,
      of = chosenSweeps().length > 1 ? ` of ${s}` : "";
    if (!found) continue;
    const fit = withinData(selectedFit(found));
    if (isOn("frontier") && frontier?.c.length > 1) {
      out.push({
        type: "scatter",
        mode: "lines",
        x: frontier.c,
        y: frontier.e,
        name: `frontier${of}`,
        legendgroup: `frontier${of}`,
        line: { color: t.ink, width: 1, shape: "hv" },
        opacity: 0.6,
        hoverinfo: "skip",
        showlegend: legend,
        ...where,
      });
    }
    if (isOn("law") && fit?.c) {
      out.push(
        bandTrace(fit, `90 % band${of}`, { legendgroup: `law${of}`, showlegend: legend, ...where }),
      );
      out.push({
        type: "scatter",
        mode: "lines",
        x: fit.c,
        y: fit.e,
        meta: "law",
        name: `law${of}: ${fit.name}`,
        legendgroup: `law${of}`,
        showlegend: legend,
        line: { color: t.ink, dash: DASHES[i % DASHES.length], width: 1.6 },
        hoverinfo: "skip",
        ...where,
      }); // no hover: it would cover the trials
    }
    const predicted = doc.predicted;
    if (
      isOn("law") && predicted?.points && predicted.error === state.y &&
      predicted.compute === state.x
    ) {
      out.push({
        type: "scatter",
        mode: "markers",
        x: predicted.points.map((p) => p.compute),
        y: predicted.points.map((p) => p.error.value),
        ...where,
        error_y: {
          type: "data",
          symmetric: false,
          color: t.ink,
          array: predicted.points.map((p) => p.error.high - p.error.value),
          arrayminus: predicted.points.map((p) => p.error.value - p.error.low),
        },
        name: `predicted from ${predicted.source}`,
        showlegend: legend,
        marker: { symbol: "line-ew-open", size: 12, color: t.ink },
        hovertemplate: predicted.points.map((p) =>
          `predicted beforehand: ${formatNumber(p.error.value, FITTED)}<extra></extra>`
        ),
      });
    }
  }
  return out;
}

export const selectedFit = (found) =>
  found?.fits.find((f) => f.name === (state.setting || "frontier")) || found?.fits[0];

/* The part of a law inside its data, unless the user asked for all of it. */
function withinData(fit) {
  if (!fit?.span || isOn("beyond")) return fit;
  const kept = fit.c.map((c, i) => (c >= fit.span[0] && c <= fit.span[1] ? i : -1)).filter((i) =>
    i >= 0
  );
  return {
    ...fit,
    ...Object.fromEntries(["c", "e", "low", "high"].map((k) => [k, kept.map((i) => fit[k][i])])),
  };
}

function bandTrace(fit, name, more) {
  return {
    type: "scatter",
    mode: "lines",
    meta: "law",
    fill: "toself",
    fillcolor: "rgba(128,128,128,.2)",
    line: { width: 0 },
    hoverinfo: "skip",
    name,
    x: [...fit.c, ...[...fit.c].reverse()],
    y: [...fit.high, ...[...fit.low].reverse()],
    ...more,
  };
}

/* The range of Y that covers the data. Whiskers extend it to 1.5 times the data at most; laws do
   not. */
export function yRange(traces, more = []) {
  const some = traces.filter((d) => d.meta !== "law" && d.yaxis !== "y2");
  const isLog = isOn("logy"), lowest = isLog ? 0 : -Infinity;
  const ends = (v) =>
    v.filter((y) => y > lowest).reduce(([a, b], y) => [Math.min(a, y), Math.max(b, y)], [
      Infinity,
      -Infinity,
    ]);
  const [least, most] = ends(some.flatMap((d) => d.y).concat(more));
  if (!Number.isFinite(most)) return null;
  const [low, high] = ends(
    some.flatMap((
      d,
    ) => (d.error_y
      ? d.y.flatMap((y, i) => [y - d.error_y.arrayminus[i], y + d.error_y.array[i]])
      : [])
    ).concat(least, most),
  );
  const reach = isLog
    ? [least / 1.5, most * 1.5]
    : [1.5 * least - 0.5 * most, 1.5 * most - 0.5 * least];
  return [Math.max(low, reach[0]), Math.min(high, reach[1])];
}

/* The range of X that covers all that is drawn. */
export function xRange(traces) {
  const lowest = isOn("logx") ? 0 : -Infinity;
  const x = traces.flatMap((d) => d.x).filter((v) => v !== null && v > lowest);
  return x.length ? x.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [x[0], x[0]]) : null;
}

export function referenceTrace(t, where, legend) {
  return {
    type: "scatter",
    mode: state.facet || isSmall(t) ? "markers" : "markers+text",
    x: REFERENCE.map((p) => p[state.x]),
    y: REFERENCE.map((p) => p.error),
    text: REFERENCE.map((p) => p.name),
    textposition: ["middle left", "top left", "bottom left"],
    marker: { symbol: "star-diamond", size: 11, color: t.ink },
    name: "paper: linear probe, ImageNet-1k",
    showlegend: legend,
    hovertemplate: "%{text}: %{y}<extra>arXiv 2301.08243, linear probe</extra>",
    ...where,
  };
}
