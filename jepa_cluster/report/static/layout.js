/* Where the panels of a figure are, in pixels: groups of panels below each other, each with its
   own axes. */

import { groupBy, naturalOrder, plain } from "scaling/format.js";
import { spread } from "scaling/ticks.js";
import { state } from "scaling/state.js";

export const MAX_FACETS = 12; // facets that are drawn
const LEAST = { width: 56, height: 40 }; // px, of a panel of a figure of limited height
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

export function panels(rows, of, known, most = MAX_FACETS) {
  const byFacet = state.facet ? groupBy(rows, of) : new Map([["", rows]]);
  const place = (name) => known.indexOf(name);
  const names = [...byFacet.keys()].sort((a, b) => place(a) - place(b) || naturalOrder(a, b));
  return {
    byFacet,
    facets: names.length ? names.slice(0, most) : [""],
    left: left(most, names.length),
  };
}

/* A sentence about panels that are left out. */
export const left = (shown, all) => (shown < all ? `The first ${shown} of ${all} panels` : "");

/* Lines and columns of a group of panels that are as wide as this at least. */
function arrange(g, t, minWidth) {
  const { left = 64, inner = left, right = 8, above = 8, below = belowPanel(t), maxWidth = 720 } =
    g;
  const n = g.titles.length,
    fit = Math.floor((t.width - left + inner) / (minWidth + right + inner));
  const lines = Math.ceil(n / Math.max(1, Math.min(n, fit, 6)));
  const columns = Math.ceil(n / lines);
  const room = (t.width - left - inner * (columns - 1)) / columns - right;
  const w = n > 1 || g.maxWidth ? Math.min(room, maxWidth) : room;
  return { ...g, left, inner, right, above, below, n, lines, columns, w };
}

/* Room below a panel for its ticks and the name of its axis. */
export const belowPanel = (t) => (t.most ? 42 : 56);

/* Where the figure would be higher than t.most, panels are narrower, and then lower. */
function fit(groups, t) {
  const made = groups.map((g) => arrange(g, t, g.minWidth));
  const sum = (of, heightOf) => of.reduce((total, g) => total + g.lines * heightOf(g), 0);
  const around = (g) => g.above + g.below;
  if (!(sum(made, (g) => g.height + around(g)) > t.most)) return made;
  const dense = groups.map((g) => arrange(g, t, Math.min(g.minWidth, LEAST.width)));
  const part = (t.most - sum(dense, around)) / sum(dense, (g) => g.height);
  return dense.map((g) => {
    const least = Math.min(g.height, g.least || LEAST.height);
    return { ...g, height: Math.max(least, Math.min(1, part) * g.height) };
  });
}

/* groups: [{titles, minWidth, height, left, inner, right, above, below, maxWidth, least}]: `left`
   before the first panel of a line, `inner` before the others; `least` of its height. Returns
   {plan, boxes}: Plotly's layout and the place of each panel. */
export function place(groups, t) {
  const boxes = [];
  let top = 0;
  for (const g of fit(groups, t)) {
    const { left, inner, right, above, below, n, lines, columns, w, height: h } = g;
    g.titles.forEach((title, i) => {
      const column = i % columns, line = Math.floor(i / columns);
      const x = left + column * (w + right + inner);
      const y = top + line * (above + h + below) + above;
      boxes.push({ x, y, w, h, title, column, isLast: i + columns >= n, below });
    });
    top += lines * (above + h + below);
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

/* Names at the ends of lines, right of a panel, after a mark in their colour: ends =
   [{text, y, color}]. The colours themselves have too little contrast for text. */
export function labelEnds(plan, t, box, n, ends) {
  const known = ends.map((e) => ({ ...e, at: pixel(plan, box, n, "y", e.y) }));
  known.sort((a, b) => a.at - b.at);
  const places = spread(known.map((e) => e.at), t.size + 3);
  known.forEach((e, i) => {
    const text = `<span style="color:${e.color}">●</span> ${plain(e.text)}`;
    write(plan, t, box.x + box.w + 6, places[i], "", { xanchor: "left", text });
  });
}

/* Make room below the figure. */
function extend(plan, more) {
  const before = plan.height, height = before + more, up = (y) => (more + y * before) / height;
  for (const key of Object.keys(plan).filter((k) => k.startsWith("yaxis"))) {
    plan[key].domain = plan[key].domain.map((d) => Math.min(1, up(d)));
  }
  const placed = [...plan.annotations, ...plan.images, ...(plan.legend ? [plan.legend] : [])];
  for (const each of placed) each.y = up(each.y);
  for (const image of plan.images) image.sizey *= before / height;
  plan.height = height;
}

/* Write the key below the figure, in lines that are as wide as it. */
export function writeKey(plan, t, text) {
  const lines = [""];
  for (const word of text.split(" ").filter(Boolean)) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (textWidth(longer, t) > t.width - 16) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  const line = t.size + 4, more = lines.length * line + 8;
  extend(plan, more);
  lines.forEach((words, i) =>
    write(plan, t, 8, plan.height - more + (i + 0.5) * line, words, { xanchor: "left" })
  );
}

/* Show the legend below the figure, in columns; all of its lines are visible. */
export function showLegend(plan, t, names) {
  const entry = Math.max(...names.map((n) => textWidth(n, t))) + 48;
  const columns = Math.max(1, Math.floor(t.width / entry));
  const lines = Math.ceil(names.length / columns), more = lines * (t.size + 8) + 8;
  extend(plan, more);
  Object.assign(plan, {
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
