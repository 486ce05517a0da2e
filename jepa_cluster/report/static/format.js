/* Names, numbers and DOM helpers that all parts of the page use. It knows no sweep. */

import { AXIS_TITLES } from "scaling/constants.js";

export const X_METRICS = [
  "flops_total",
  "flops_encoder",
  "images_seen",
  "parameters",
  "gpu_hours_alone",
  "context_fraction",
  "target_fraction",
  "union_fraction",
];
export const TRIAL_METRICS = ["parameters", "gpu_hours_alone"]; // one value per trial: no curve
export const LABEL_FREE = ["probe/rankme", "probe/lidar"]; // of no setting that is better
export const OWN_MASK_LOSSES = ["loss", "val/loss"]; // comparable within one mask setting only

/* Linear probe on ImageNet-1k, arXiv 2301.08243 table 1; FLOPs by this project's arithmetic.
   Another probe than ours. */
export const REFERENCE = [
  {
    name: "ViT-B/16, 600 ep",
    error: 0.271,
    flops_total: 6.58e19,
    flops_encoder: 2.11e19,
    images_seen: 7.69e8,
    parameters: 8.56e7,
  },
  {
    name: "ViT-L/16, 600 ep",
    error: 0.225,
    flops_total: 2.04e20,
    flops_encoder: 7.46e19,
    images_seen: 7.69e8,
    parameters: 3.03e8,
  },
  {
    name: "ViT-H/14, 300 ep",
    error: 0.207,
    flops_total: 2.53e20,
    flops_encoder: 1.01e20,
    images_seen: 3.84e8,
    parameters: 6.3e8,
  },
];

export const $ = (id) => document.getElementById(id);
export const element = (name, text) =>
  Object.assign(document.createElement(name), text === undefined ? {} : { textContent: text });
export const isError = (m) => m.startsWith("probe/") && m.endsWith("_error");
export const axisTitle = (m) =>
  AXIS_TITLES[m] ||
  (isError(m) ? `${m.replace("probe/", "").replace("_error", "")} probe error` : m);
export const shortTitle = (m) => axisTitle(m).replace(/ \(.*|, its trunk.*/, ""); // fits a control
export const axisName = (axis) => axis.split(".").pop().replaceAll("_", " ");
/* Plotly reads some HTML in its texts; what users wrote is shown as it is. */
export const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
export const mean = (v) => v.reduce((a, b) => a + b, 0) / v.length;

/* Numbers as labels.py writes them: '0.2137', '12346', '1.204e+18'. The digits of costs, budgets and
   fits are FITTED. */
export const FITTED = 3;
export function formatNumber(v, digits = 4) {
  if (!Number.isFinite(v)) return "–";
  const six = +v.toPrecision(6), size = Math.abs(six);
  const whole = size < 1e6 ? String(Math.trunc(size)).length : 0;
  return general(+six.toPrecision(Math.max(digits, whole)));
}
export function formatPercent(fraction) {
  const percent = typeof fraction === "number" ? 100 * fraction : NaN;
  if (!(Math.abs(percent) < 1e6)) return formatNumber(percent);
  const text = percent.toFixed(1);
  return text === "-0.0" ? "0.0" : text; // no minus sign before a zero
}
export const signed = (percent) => (/^[-–]/.test(percent) ? percent : `+${percent}`);
/* Python's format "g". */
export function general(number) {
  const v = +number.toPrecision(6), size = Math.abs(v);
  return v && (size < 1e-4 || size >= 1e6)
    ? v.toExponential().replace(/([+-])(\d)$/, "$10$2")
    : String(v);
}
/* Words and numbers of a label in turns: 'ts=.05-.1 80k' -> 'ts=', .05, '-', .1, ' ', 80000, ''. */
const NUMBER = /(\d*\.?\d+(?:e[+-]?\d+)?k?)(?![\w.])/;
const partsOf = (text) =>
  String(text).split(NUMBER).map((part, i) =>
    i % 2 ? parseFloat(part) * (part.endsWith("k") ? 1000 : 1) : part
  );
export function naturalOrder(a, b) {
  const p = partsOf(a), q = partsOf(b);
  for (let i = 0; i < Math.min(p.length, q.length); i++) {
    const order = i % 2 ? p[i] - q[i] : p[i].localeCompare(q[i], "en", { numeric: true });
    if (order) return order;
  }
  return p.length - q.length;
}
export const pointLabel = (r) => r.label.replace(/(^| )s\d+$/, "") || "all";

export function appendTo(map, key, value) {
  map.has(key) ? map.get(key).push(value) : map.set(key, [value]);
}
export function groupBy(rows, of) {
  const out = new Map();
  for (const r of rows) appendTo(out, String(of(r) ?? "?"), r);
  return out;
}

export function download(name, type, text) {
  const link = Object.assign(element("a"), {
    download: name,
    href: URL.createObjectURL(new Blob([text], { type })),
  });
  link.click();
  URL.revokeObjectURL(link.href);
}
