/* The Scaling page: load, draw, handle input. The address holds all of the view, so it can be
   shared. What is loaded is drawn at once; runs and curves that are still loading are drawn when
   they arrive. */

import { $ } from "scaling/format.js";
import { listSweeps, loadCurves, loadSweep, needsCurves, refresh } from "scaling/api.js";
import {
  CHOICES,
  chosenSweeps,
  fillControls,
  FLAGS,
  readAddress,
  state,
  writeAddress,
} from "scaling/state.js";
import { addDownloads } from "scaling/downloads.js";
import { curvesOf, figure } from "scaling/figures.js";
import { onWidthChange, theme } from "scaling/layout.js";
import { csv, showFindings, showTrial } from "scaling/panels.js";

let drawCount = 0, pending = 0;
let markDrawn = () => {};
const firstDraw = new Promise((done) => {
  markDrawn = done;
});
let plotly;

/* Plotly's 4 MB block the page for most of a second, so they are started after the first
   requests. */
function startPlotly() {
  plotly ||= window.Plotly ? Promise.resolve() : new Promise((onload) =>
    document.head.append(
      Object.assign(document.createElement("script"), { src: "plotly.min.js", onload }),
    )
  );
  return plotly;
}

async function draw() {
  const mine = ++drawCount;
  delete document.body.dataset.settled;
  try {
    const stale = await Promise.all(chosenSweeps().map(async (s) => [s, await loadSweep(s)]));
    for (const [sweep, more] of stale) if (more) later(() => refresh(sweep));
    if (mine !== drawCount) return;
    fillControls();
    writeAddress();
    const rows = curvesOf(), keys = [state.x, state.y];
    if (rows.length && needsCurves(rows, keys)) later(() => loadCurves(rows, keys));
    const [traces, plan, note, key] = figure(theme());
    $("note").textContent = note.trim();
    $("key").textContent = key;
    $("plot").style.height = `${plan.height}px`;
    showFindings();
    await startPlotly();
    await Plotly.react($("plot"), traces, plan, { displayModeBar: false });
    document.body.dataset.view = state.view;
    document.body.dataset.ready = String(mine);
    markDrawn();
    if (!pending && mine === drawCount) document.body.dataset.settled = "1";
  } catch (e) {
    showError(e);
  }
}

/* Run a request after the first drawing, so that it does not delay it; draw again when it
   returns true. */
async function later(work) {
  let more = false;
  pending++;
  try {
    await firstDraw;
    more = await work();
  } catch (e) {
    showError(e);
  } finally {
    pending--;
  }
  if (more) await draw();
  else if (!pending && document.body.dataset.ready === String(drawCount)) {
    document.body.dataset.settled = "1";
  }
}

function showError(e) {
  $("note").textContent = `${e.message}. Reload when the server is back.`;
}

function addListeners() {
  for (const id of CHOICES) {
    $(id).onchange = () => {
      state[id] = $(id).value;
      draw();
    };
  }
  for (const id of FLAGS) {
    $(id).onchange = () => {
      state[id] = $(id).checked ? "1" : "0";
      draw();
    };
  }
  $("sweeps").onchange = () => {
    state.sweeps = [...$("sweeps").querySelectorAll("input:checked")].map((i) => i.value).join(",");
    draw();
  };
  addDownloads();
  $("csv").onclick = csv;
  $("share").onclick = () =>
    navigator.clipboard?.writeText(location.href).then(() => {
      $("share").textContent = "Copied";
    });
  addEventListener("keydown", (e) => {
    if (e.target.matches("select, input[type=text]") || e.ctrlKey || e.metaKey || e.altKey) return;
    const flag = {
      c: "curves",
      l: "law",
      b: "beyond",
      f: "frontier",
      r: "reference",
      x: "logx",
      y: "logy",
    }[e.key];
    if (flag) {
      state[flag] = state[flag] === "1" ? "0" : "1";
      draw();
    }
  });
  addEventListener("hashchange", () => {
    readAddress();
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  onWidthChange(draw);
}

async function start() {
  readAddress();
  addListeners();
  let known = [];
  try {
    known = await listSweeps();
  } catch (e) {
    return showError(e);
  }
  if (!known.length) {
    $("note").textContent =
      "No sweep is here yet: submit one and let jepa ui or jepa sync collect it.";
    return;
  }
  await draw();
  const on = (name) =>
    $("plot").on(name, (e) => {
      const c = e.points[0].customdata;
      if (c) showTrial([].concat(c));
    });
  on("plotly_hover");
  on("plotly_click");
}
start();
