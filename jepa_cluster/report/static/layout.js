/* Where the panels of a figure are, in pixels: groups of panels below each other, each with its
   own axes. */

import { groupBy, naturalOrder, plain } from "scaling/format.js";
import { spread } from "scaling/ticks.js";
import { state } from "scaling/state.js";

export const MAX_FACETS = 12; // facets that are drawn
const NARROW = 560; // px, below which a figure has less room around it

export const axisOf = (i) => ({ xaxis: `x${i ? i + 1 : ""}`, yaxis: `y${i ? i + 1 : ""}` });

/* The page's colours, width and type. */
export function theme() {
  const css = getComputedStyle(document.documentElement);
  const get = (n) => css.getPropertyValue(n).trim();
  return {
    ink: get("--ink"),
    line: get("--line"),
    paper: get("--paper"),
    width: document.getElementById("plot").clientWidth || 800,
    size: 13,
  };
}

/* Call `draw` when the figure has another width. */
export function onWidthChange(draw) {
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (width && contentRect.width !== width) draw();
    width = contentRect.width;
  }).observe(document.getElementById("plot"));
}

export const isSmall = (t) => t.width < NARROW;

let pen;
export function textWidth(text, t) {
  pen ||= document.createElement("canvas").getContext("2d");
  pen.font = `${t.size}px system-ui, sans-serif`;
  return Math.ceil(pen.measureText(String(text).replace(/<[^>]*>/g, "")).width);
}

export function panels(rows, of = (r) => r[state.facet], known = []) {
  const byFacet = state.facet ? groupBy(rows, of) : new Map([["", rows]]);
  const place = (name) => known.indexOf(name);
  const names = [...byFacet.keys()].sort((a, b) => place(a) - place(b) || naturalOrder(a, b));
  const left = names.length > MAX_FACETS
    ? ` The first ${MAX_FACETS} of ${names.length} facets.`
    : "";
  return { byFacet, facets: names.length ? names.slice(0, MAX_FACETS) : [""], left };
}

/* groups: [{titles, minWidth, height, left, inner, right, above, below, maxWidth}]: `left` before
   the first panel of a line, `inner` before the others. Returns {plan, boxes}: Plotly's layout and
   the place of each panel. */
export function place(groups, t) {
  const boxes = [];
  let top = 0;
  for (const g of groups) {
    const { left = 64, inner = left, right = 8, above = 8, below = 56, maxWidth = 720 } = g;
    const n = g.titles.length, fit = Math.floor((t.width - left + inner) / (g.minWidth + inner));
    const lines = Math.ceil(n / Math.max(1, Math.min(n, fit, 6)));
    const columns = Math.ceil(n / lines);
    const room = (t.width - left - inner * (columns - 1)) / columns - right;
    const w = n > 1 || g.maxWidth ? Math.min(room, maxWidth) : room;
    g.titles.forEach((title, i) => {
      const column = i % columns, line = Math.floor(i / columns);
      const x = left + column * (w + right + inner);
      const y = top + line * (above + g.height + below) + above;
      const isLast = i + columns >= n;
      boxes.push({ x, y, w, h: g.height, title, column, isLast, below });
    });
    top += lines * (above + g.height + below);
  }
  return { plan: withAxes(boxes, top, t), boxes };
}

function withAxes(boxes, height, t) {
  const plan = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: t.ink, size: t.size, family: "system-ui, sans-serif" },
    margin: { l: 0, r: 0, t: 0, b: 0, autoexpand: false },
    hovermode: "closest",
    hoverlabel: { bgcolor: t.paper, bordercolor: t.line, font: { size: 13, color: t.ink } },
    annotations: [],
    images: [],
    shapes: [],
    width: t.width,
    height,
    showlegend: false,
  };
  const common = {
    gridcolor: t.line,
    zeroline: false,
    linecolor: t.line,
    automargin: false,
    ticklabelstandoff: 2,
  };
  boxes.forEach((box, i) => {
    const n = i ? i + 1 : "";
    const domain = (a, b) => [a, b].map((v) => Math.min(1, Math.max(0, v)));
    plan[`xaxis${n}`] = {
      ...common,
      domain: domain(box.x / t.width, (box.x + box.w) / t.width),
      anchor: `y${n}`,
    };
    plan[`yaxis${n}`] = {
      ...common,
      domain: domain(1 - (box.y + box.h) / height, 1 - box.y / height),
      anchor: `x${n}`,
    };
    if (box.title) write(plan, t, box.x + box.w / 2, box.y - 4, box.title, { yanchor: "bottom" });
  });
  return plan;
}

/* Write a text at a place in pixels from the upper left corner; later resizing keeps it there. */
export function write(plan, t, x, y, text, more = {}) {
  plan.annotations.push({
    text: plain(text),
    xref: "paper",
    yref: "paper",
    x: x / plan.width,
    y: 1 - y / plan.height,
    xanchor: "center",
    yanchor: "middle",
    showarrow: false,
    font: { size: t.size, color: t.ink },
    ...more,
  });
}

export const writeX = (plan, t, box, text) =>
  write(plan, t, box.x + box.w / 2, box.y + box.h + box.below - 12, text);
export const writeY = (plan, t, box, text, left = 10) =>
  write(plan, t, left, box.y + box.h / 2, text, { textangle: -90 });

/* The pixel of a value on an axis with its range. */
export function pixel(plan, box, n, letter, value) {
  const axis = plan[`${letter}axis${n ? n + 1 : ""}`], [a, b] = axis.range;
  const part = ((axis.type === "log" ? Math.log10(value) : value) - a) / (b - a);
  return letter === "x" ? box.x + part * box.w : box.y + (1 - part) * box.h;
}

/* Names at the ends of lines, right of a panel: ends = [{text, y, color}]. */
export function labelEnds(plan, t, box, n, ends) {
  const known = ends.map((e) => ({ ...e, at: pixel(plan, box, n, "y", e.y) }));
  known.sort((a, b) => a.at - b.at);
  const places = spread(known.map((e) => e.at), t.size + 3);
  known.forEach((e, i) =>
    write(plan, t, box.x + box.w + 6, places[i], e.text, { xanchor: "left", color: e.color })
  );
}

/* Show the legend below the figure, in columns; all of its lines are visible. */
export function showLegend(plan, t, names) {
  const entry = Math.max(...names.map((n) => textWidth(n, t))) + 48;
  const columns = Math.max(1, Math.floor(t.width / entry));
  const lines = Math.ceil(names.length / columns), more = lines * (t.size + 8) + 8;
  const height = plan.height + more, part = more / height;
  for (const key of Object.keys(plan).filter((k) => k.startsWith("yaxis"))) {
    plan[key].domain = plan[key].domain.map((d) => Math.min(1, part + d * (1 - part)));
  }
  for (const a of plan.annotations.filter((a) => a.yref === "paper")) {
    a.y = part + a.y * (1 - part);
  }
  Object.assign(plan, {
    height,
    showlegend: true,
    legend: {
      orientation: "h",
      traceorder: "normal",
      xref: "container",
      yref: "container",
      x: 0,
      y: 0,
      yanchor: "bottom",
      maxheight: more + 8,
      entrywidth: entry - 44,
      entrywidthmode: "pixels",
      itemsizing: "constant",
      font: { size: t.size },
    },
  });
}
