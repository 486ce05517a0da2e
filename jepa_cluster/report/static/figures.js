/* The figures: points with curves and laws, iso-FLOP parabolas, heat maps. */

import { AXIS_TITLES, COLORS, SHAPES } from "scaling/constants.js";
import {
  axisName,
  axisTitle,
  formatNumber,
  groupBy,
  isError,
  mean,
  naturalOrder,
  REFERENCE,
  TRIAL_METRICS,
} from "scaling/format.js";
import { effect } from "scaling/effect.js";
import { axisOf, layout, panels } from "scaling/layout.js";
import { chosenSweeps, findings, isOn, state, sweptAxes, visibleRows } from "scaling/state.js";
import {
  curveTraces,
  lawTraces,
  legendTraces,
  MAX_CURVES,
  pointTraces,
  referenceTrace,
  seedTraces,
  selectedFit,
  setYRange,
} from "scaling/traces.js";

export function curvesOf() {
  const { rows } = visibleRows();
  return state.view === "scatter" && isOn("curves") && rows.length <= MAX_CURVES &&
      !TRIAL_METRICS.includes(state.x)
    ? rows
    : [];
}

function scatter(t) {
  const { rows, note } = visibleRows(), { byFacet, facets, left } = panels(rows), notes = [note];
  const order = new Map(
    [...groupBy(rows, (r) => r[state.color])].sort((a, b) =>
      state.color === "model" ? a[1][0].parameters - b[1][0].parameters : naturalOrder(a[0], b[0])
    ).map(([k], i) => [k, i]),
  );
  const kinds = state.shape
    ? [...new Set(rows.map((r) => String(r[state.shape] ?? "?")))].sort(naturalOrder)
    : [];
  const shapeOf = (v) => SHAPES[Math.max(0, kinds.indexOf(v)) % SHAPES.length],
    shape = (r) => shapeOf(String(r[state.shape] ?? "?"));
  const traces = [], withCurves = new Set(curvesOf().map((r) => r.trial));
  if (isOn("curves") && rows.length > MAX_CURVES) {
    notes.push(`Curves are left out above ${MAX_CURVES} trials: choose a setting.`);
  }
  for (const fit of isOn("law") ? chosenSweeps().map((s) => selectedFit(findings(s))) : []) {
    if (fit && !fit.c) {
      notes.push(`${fit.text[0].toUpperCase()}${fit.text.slice(1).split("; E = ")[0]}.`);
    }
  }
  const comparable = isError(state.y) && state.x in REFERENCE[0];
  if (isOn("reference") && !comparable) {
    notes.push("The paper's numbers are probe errors over FLOPs, images or parameters.");
  }
  facets.forEach((facet, i) => {
    const where = axisOf(i);
    traces.push(...lawTraces(t, where, i === 0));
    const groups = [...groupBy(byFacet.get(facet) || [], (r) => r[state.color])].sort((a, b) =>
      order.get(a[0]) - order.get(b[0])
    );
    for (const [name, members] of groups) {
      const color = COLORS[order.get(name) % COLORS.length];
      if (withCurves.size) traces.push(curveTraces(members, color, where));
      traces.push(
        pointTraces(members, name, color, shape, where),
        seedTraces(members, name, color, t, where),
      );
    }
    if (isOn("reference") && comparable) traces.push(referenceTrace(t, where, i === 0));
  });
  const same = state.shape === state.color;
  traces.push(
    ...legendTraces(
      state.color,
      [...order.keys()],
      COLORS,
      same ? [...order.keys()].map(shapeOf) : ["circle"],
    ),
    ...(same || kinds.length < 2 ? [] : legendTraces(state.shape, kinds, [t.ink], SHAPES)),
  );
  const plan = layout(facets, t),
    start = rows.map((r) => r[`initial/${state.y}`]).filter(Number.isFinite);
  setYRange(plan, traces, state.facet || !start.length ? [] : [mean(start)]);
  if (start.length && !state.facet) {
    plan.shapes.push({
      type: "line",
      xref: "paper",
      x0: 0,
      x1: 1,
      y0: mean(start),
      y1: mean(start),
      line: { dash: "dot", color: t.ink, width: 1 },
    });
    plan.annotations.push({
      text: "randomly initialised encoder",
      xref: "paper",
      x: 1,
      xanchor: "right",
      yanchor: "bottom",
      showarrow: false,
      y: isOn("logy") ? Math.log10(mean(start)) : mean(start),
      yref: "y",
    });
  }
  return [traces, plan, notes.join(" ") + left];
}

/* ---- iso-FLOP: error against size at equal compute, and how the best size grows */

function iso(t) {
  const traces = [];
  let i = 0;
  for (const s of chosenSweeps()) {
    const found = findings(s) || {},
      computeUnit = axisTitle(state.x).match(/\[(.*)\]/)?.[1] || axisTitle(state.x);
    for (const b of found.iso || []) {
      const color = COLORS[i++ % COLORS.length], name = `${formatNumber(b.compute)} ${computeUnit}`;
      traces.push({
        type: "scatter",
        mode: "markers",
        x: b.n,
        y: b.e,
        name,
        legendgroup: name,
        marker: { color, size: 9 },
        hovertemplate: `${AXIS_TITLES.parameters}: %{x:.4g}<br>${
          axisTitle(state.y)
        }: %{y:.4g}<extra>${name}</extra>`,
      });
      traces.push({
        type: "scatter",
        mode: "lines",
        x: b.curve_n,
        y: b.curve_e,
        legendgroup: name,
        showlegend: false,
        line: { color, dash: "dot" },
        hoverinfo: "skip",
      });
      if (!b.optimum) continue;
      traces.push({
        type: "scatter",
        mode: "markers",
        x: [b.optimum],
        y: [Math.min(...b.curve_e)],
        showlegend: false,
        legendgroup: name,
        marker: { symbol: "star", size: 14, color },
        hovertemplate: `N_opt = %{x:.3g}<extra>${name}</extra>`,
      });
      traces.push({
        type: "scatter",
        mode: "markers",
        x: [b.compute],
        y: [b.optimum],
        showlegend: false,
        legendgroup: name,
        ...axisOf(1),
        marker: { symbol: "star", size: 14, color },
        hovertemplate: `N_opt(%{x:.3g}) = %{y:.3g}<extra></extra>`,
      });
    }
    if (found.growth) {
      traces.push({
        type: "scatter",
        mode: "lines",
        x: found.growth.c,
        y: found.growth.n,
        name: found.growth.text,
        ...axisOf(1),
        line: { color: t.ink, dash: "dash" },
      });
    }
  }
  const note = traces.length
    ? ""
    : "No budget is shared by three sizes, so there is no iso-FLOP curve. " +
      "Give small models longer horizons, or fork trunks.";
  const plan = layout(
    traces.some((x) => x.yaxis === "y2") ? ["at equal compute", "the best size"] : [""],
    t,
    true,
  );
  Object.assign(plan.xaxis, { title: { text: AXIS_TITLES.parameters }, type: "log" });
  setYRange(plan, traces);
  if (!traces.length) plan.xaxis.visible = plan.yaxis.visible = false;
  if (plan.yaxis2) {
    Object.assign(plan.yaxis2, {
      title: { text: `N_opt, ${AXIS_TITLES.parameters}` },
      type: "log",
      tickformat: "",
    });
  }
  return [traces, plan, note];
}

/* ---- heat map: mask scale x aspect where they are swept, else the first two axes */

function heat(t) {
  const { rows: all, note } = visibleRows(), rows = all.filter((r) => r.state === "done");
  const axes = [...sweptAxes().filter((a) => a !== "model"), "model", "seed"].filter((a) =>
    a !== state.facet
  );
  const first = axes.find((a) => a.includes("scale")) || axes[0];
  const second = axes.find((a) => a.includes("aspect")) || axes.find((a) => a !== first);
  const values = (a) => [...new Set(rows.map((r) => String(r[a])))].sort(naturalOrder);
  const xs = values(first), ys = values(second), { byFacet, facets, left } = panels(rows);
  const traces = facets.map((facet, i) => {
    const cells = groupBy(byFacet.get(facet) || [], (r) => `${r[first]} × ${r[second]}`);
    const cell = (x, y) => cells.get(`${x} × ${y}`)?.map((r) => r[state.y]);
    return {
      type: "heatmap",
      x: xs,
      y: ys,
      ...axisOf(i),
      coloraxis: "coloraxis",
      xgap: 2,
      ygap: 2,
      texttemplate: "%{text}",
      z: ys.map((y) =>
        xs.map((x) => {
          const c = cell(x, y);
          return c ? mean(c) : null;
        })
      ),
      text: ys.map((y) =>
        xs.map((x) => {
          const c = cell(x, y);
          return c ? `${formatNumber(mean(c))}<br>n = ${c.length}` : "";
        })
      ),
      hovertemplate: "%{x}, %{y}: %{text}<extra></extra>",
    };
  });
  const plan = layout(facets, t), low = /error|loss/.test(state.y);
  plan.coloraxis = {
    colorscale: "Viridis",
    reversescale: low,
    colorbar: { title: { text: axisTitle(state.y), side: "right" } },
  };
  for (const key of Object.keys(plan).filter((k) => /^[xy]axis/.test(k))) {
    Object.assign(plan[key], {
      type: "category",
      tickformat: "",
      title: plan[key].title.text
        ? { text: axisName(key[0] === "x" ? first : second) }
        : { text: "" },
    });
  }
  const models = new Set(rows.map((r) => r.model)),
    mixed = models.size > 1 && state.facet !== "model";
  return [
    traces,
    plan,
    [
      rows.length ? "Means over finished trials, n in each cell." : note || "Nothing is finished.",
      mixed && first !== "model" && second !== "model"
        ? `${models.size} sizes are averaged together: facet by model to see each.`
        : "",
    ].join(" ") + left,
  ];
}

/* Returns [traces, layout, note above the figure]. */
export function figure(t) {
  return { effect, scatter, iso, heat }[state.view](t);
}
