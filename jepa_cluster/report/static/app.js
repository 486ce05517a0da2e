/* The Scaling page: read, draw, listen. All of what is shown is in the address, so a view can be sent. What is at hand
   is drawn at once; runs and curves that are still on their way are drawn when they come. */

import { $ } from "scaling/format.js";
import { lacksCurves, listSweeps, loadCurves, loadSweep, refresh } from "scaling/api.js";
import { CHOICES, FLAGS, chosen, fillControls, readAddress, state, writeAddress } from "scaling/state.js";
import { curvesOf, figure, theme } from "scaling/figures.js";
import { csv, showTrial, words } from "scaling/panels.js";

let turn = 0, pending = 0;
let show = () => {};
const shown = new Promise((done) => { show = done; });
let plotly;

/* Plotly's 4 MB take most of a second to start, in which nothing can be asked for nor painted. */
function startPlotly() {
  plotly ||= window.Plotly ? Promise.resolve() : new Promise((onload) =>
    document.head.append(Object.assign(document.createElement("script"), { src: "plotly.min.js", onload })));
  return plotly;
}

async function draw() {
  const mine = ++turn;
  delete document.body.dataset.settled;
  try {
    const stale = await Promise.all(chosen().map(async (s) => [s, await loadSweep(s)]));
    for (const [sweep, more] of stale) if (more) later(() => refresh(sweep));
    if (mine !== turn) return;
    fillControls();
    writeAddress();
    const rows = curvesOf(), keys = [state.x, state.y];
    if (rows.length && lacksCurves(rows, keys)) later(() => loadCurves(rows, keys));
    const [traces, plan, note] = figure(theme());
    $("note").textContent = note.trim();
    $("key").hidden = state.view !== "scatter";
    $("plot").style.height = `${plan.height}px`;
    words();
    await startPlotly();
    await Plotly.react($("plot"), traces, plan, { responsive: true, displayModeBar: false });
    document.body.dataset.ready = String(mine);
    show();
    if (!pending && mine === turn) document.body.dataset.settled = "1";
  } catch (e) { complain(e); }
}

/* Work that the figure does not wait for, nor is held up by at the server; what it brings is drawn. */
async function later(work) {
  let more = false;
  pending++;
  try { await shown; more = await work(); } catch (e) { complain(e); } finally { pending--; }
  if (more) await draw();
  else if (!pending && document.body.dataset.ready === String(turn)) document.body.dataset.settled = "1";
}

function complain(e) { $("note").textContent = `${e.message}. Reload when the server is back.`; }

function listen() {
  for (const id of CHOICES) $(id).onchange = () => { state[id] = $(id).value; draw(); };
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
    const flag = { c: "curves", l: "law", b: "beyond", f: "frontier", r: "reference", x: "logx", y: "logy" }[e.key];
    if (flag) { state[flag] = state[flag] === "1" ? "0" : "1"; draw(); }
  });
  addEventListener("hashchange", () => { readAddress(); draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

async function begin() {
  readAddress();
  listen();
  let known = [];
  try { known = await listSweeps(); } catch (e) { return complain(e); }
  if (!known.length) { $("note").textContent = "No sweep is here yet: submit one and let jepa ui or jepa sync collect it."; return; }
  await draw();
  const on = (name) => $("plot").on(name, (e) => { const c = e.points[0].customdata; if (c) showTrial([].concat(c)); });
  on("plotly_hover"); on("plotly_click");
}
begin();
