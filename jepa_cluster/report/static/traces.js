/* Plotly traces of points, seeds, curves and laws, and the legend's entries. No fits. */

import {
  axisName,
  axisTitle,
  formatNumber,
  groupBy,
  interval,
  isNarrow,
  logTicks,
  mean,
  plain,
  pointLabel,
  REFERENCE,
} from "scaling/format.js";
import { documents, histories } from "scaling/api.js";
import { chosenSweeps, findings, isOn, state } from "scaling/state.js";

export const MAX_CURVES = 200; // trials above which curves are left out
const DASHES = ["dash", "dot", "longdash", "dashdot"]; // laws of several sweeps

/* One mark per point, with whiskers over the 90 % interval of the mean of its seeds. Hollow: not
   finished. shape: row -> symbol. */
export function pointTraces(rows, name, color, shape, where) {
  const points = [
    ...groupBy(rows, (r) => `${r.sweep} ${pointLabel(r)} ${r.state === "done" || r.trial}`)
      .values(),
  ];
  const means = points.map((p) => interval(p.map((r) => r[state.y]))), y = means.map(([m]) => m);
  return {
    type: "scatter",
    mode: "markers",
    name,
    legendgroup: name,
    showlegend: false,
    ...where,
    x: points.map((p) => mean(p.map((r) => r[state.x]))),
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
      line: { color, width: 1.5 },
      symbol: points.map((p) => shape(p[0]) + (p.every((r) => r.state === "done") ? "" : "-open")),
    },
    customdata: points.map((p) => p.map((r) => r.trial)),
    text: points.map((p) =>
      `<b>${plain(pointLabel(p[0]))}</b>${p.length > 1 ? ` · ${p.length} seeds` : ""}<br>${
        [...new Set(p.map((r) => r.state))].join(", ")
      }`
    ),
    hovertext: means.map(([m, low, high]) =>
      formatNumber(m) +
      (low === undefined ? "" : ` [${formatNumber(low)}, ${formatNumber(high)}] over seeds, 90 %`)
    ),
    hovertemplate: `%{text}<br>${axisTitle(state.x)}: %{x:.4g}<br>${
      axisTitle(state.y)
    }: %{hovertext}<extra></extra>`,
  };
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

/* Legend entries without points: one per colour, one per shape. */
export function legendTraces(axis, values, colors, shapes) {
  const words = Object.assign({}, ...chosenSweeps().map((s) => documents.get(s)?.words?.[axis]));
  const name = (v) =>
    words[v] || (["model", "setting", "sweep"].includes(axis) ? v : `${axisName(axis)} ${v}`);
  return values.map((v, i) => ({
    type: "scatter",
    mode: "markers",
    x: [null],
    y: [null],
    name: plain(name(v)),
    legendgroup: v,
    marker: { color: colors[i % colors.length], symbol: shapes[i % shapes.length], size: 10 },
  }));
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
      of = chosenSweeps().length > 1 ? ` of ${s}` : "";
    if (!found) continue;
    const fit = withinData(selectedFit(found));
    const rows = doc.trials.filter((r) => found.frontier.includes(r.trial));
    if (isOn("frontier") && rows.length > 1) {
      const best = [...groupBy(rows, pointLabel).values()].map((
        p,
      ) => [mean(p.map((r) => r[state.x])), mean(p.map((r) => r[state.y]))]).sort((a, b) =>
        a[0] - b[0]
      );
      out.push({
        type: "scatter",
        mode: "lines",
        x: best.map((b) => b[0]),
        y: best.map((b) => b[1]),
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
        marker: { symbol: "square-open", size: 9, color: t.ink },
        hovertemplate: "predicted beforehand: %{y:.4g}<extra></extra>",
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

/* Fit y to the data with a margin. Whiskers extend it to 1.5 times the data at most; laws do
   not. */
export function setYRange(plan, traces, more = []) {
  const some = traces.filter((d) => d.meta !== "law" && d.yaxis !== "y2");
  const lowest = isOn("logy") ? 0 : -Infinity;
  const ends = (v) =>
    v.filter((y) => y > lowest).reduce(([a, b], y) => [Math.min(a, y), Math.max(b, y)], [
      Infinity,
      -Infinity,
    ]);
  const [least, most] = ends(some.flatMap((d) => d.y).concat(more));
  if (!Number.isFinite(most)) return;
  const [low, high] = ends(
    some.flatMap((
      d,
    ) => (d.error_y
      ? d.y.flatMap((y, i) => [y - d.error_y.arrayminus[i], y + d.error_y.array[i]])
      : [])
    ).concat(least, most),
  );
  const of = (v) => (isOn("logy") ? Math.log10(v) : v),
    reach = isOn("logy")
      ? [least / 1.5, most * 1.5]
      : [1.5 * least - 0.5 * most, 1.5 * most - 0.5 * least],
    [a, b] = [of(Math.max(low, reach[0])), of(Math.min(high, reach[1]))];
  const room = (b - a) * 0.05 || 0.05,
    range = [a - room, b + room],
    tickvals = isOn("logy") && logTicks(...range);
  for (
    const k of Object.keys(plan).filter((k) =>
      k.startsWith("yaxis") && (k === "yaxis" || plan[k].matches)
    )
  ) {
    Object.assign(plan[k], { range }, tickvals ? { tickmode: "array", tickvals } : {});
  }
}

export function referenceTrace(t, where, legend) {
  return {
    type: "scatter",
    mode: state.facet || isNarrow() ? "markers" : "markers+text",
    x: REFERENCE.map((p) => p[state.x]),
    y: REFERENCE.map((p) => p.error),
    text: REFERENCE.map((p) => p.name),
    textposition: ["middle left", "top left", "bottom left"],
    marker: { symbol: "star", size: 12, color: t.ink },
    name: "paper: linear probe, ImageNet-1k",
    showlegend: legend,
    hovertemplate: "%{text}: %{y}<extra>arXiv 2301.08243, linear probe</extra>",
    ...where,
  };
}
