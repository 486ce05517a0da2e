/* Words beside the figure: findings, the table of trials, one trial with its masks, and the numbers as CSV. */

import { $, download, node, point, short } from "scaling/format.js";
import { docs, runLink } from "scaling/api.js";
import { allRows, chosen, findings, state } from "scaling/state.js";

const ROWS = 2000; // lines of the table
const MASKS = { c: "#3b6fb6", t: "#e08a2b" };

export function words() {
  const names = chosen(), doc = docs.get(names[0]) || {};
  $("title").textContent = names.length === 1 ? doc.question || names[0] : names.join(", ");
  $("expect").textContent = names.length === 1 && doc.expect ? `Expected: ${doc.expect}` : "";
  document.title = `Scaling: ${names.join(", ")}`;
  const told = names.flatMap((s) => (findings(s)?.summary || [`no fit of this pair of axes; run jepa scaling ${s}`])
    .map((line) => (names.length > 1 ? `${s}: ${line}` : line)));
  $("findings").replaceChildren(...told.map((line) => node("li", line)));
  table();
}

function table() {
  const head = node("tr"), names = ["trial", "state", "setting", "parameters", state.x, "before training", state.y, "GPU-hours"];
  head.append(...names.map((h) => node("th", h)));
  const body = allRows().slice(0, ROWS).map((r) => {
    const line = node("tr");
    const values = [r.label, r.state, r.setting, short(r.parameters), short(r[state.x]), short(r[`initial/${state.y}`]), short(r[state.y]), short(r.gpu_hours)];
    line.append(...values.map((v) => node("td", v)));
    if (r.run) line.firstChild.replaceChildren(Object.assign(node("a", values[0]), { href: runLink(r) }));
    line.tabIndex = 0;
    line.onfocus = line.onclick = () => showTrial([r.trial]);
    return line;
  });
  $("table").replaceChildren(head, ...body);
}

/* The trials behind a mark: what they are, where their runs are, why they stand as they do, what their masks look like. */
export function showTrial(names) {
  const rows = allRows().filter((r) => names.includes(r.trial));
  if (!rows.length) return;
  const out = [node("h3", point(rows[0]))];
  for (const r of rows) {
    const facts = [`seed ${r.seed}: ${r.state}`, `${r.attempts} attempt${r.attempts === 1 ? "" : "s"}`,
      r.cause && r.cause !== "done" ? `the last one ended: ${r.cause}` : "", r.trunk ? `a branch of ${r.trunk}` : "",
      `${short(r.gpu_hours)} GPU-h`, `${short(r[state.y])}, before training ${short(r[`initial/${state.y}`])}`];
    const line = node("p", facts.filter(Boolean).join(", ") + ". ");
    if (r.run) line.append(Object.assign(node("a", "MLflow run"), { href: runLink(r), className: "run" }), " ");
    line.append(node("code", `jepa why ${r.sweep} ${r.trial.split("-").pop()}`));
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
    pen.fillStyle = MASKS[c] || "#9993";
    pen.fillRect(i % grid, Math.floor(i / grid), 1, 1);
  });
  return canvas;
}

export function csv() {
  const rows = allRows(), columns = [...new Set(rows.flatMap((r) => Object.keys(r)))];
  const quote = (v) => (/[",\n]/.test(String(v ?? "")) ? `"${String(v).replaceAll('"', '""')}"` : String(v ?? ""));
  download("scaling.csv", "text/csv", [columns, ...rows.map((r) => columns.map((c) => r[c]))].map((l) => l.map(quote).join(",")).join("\n"));
}
