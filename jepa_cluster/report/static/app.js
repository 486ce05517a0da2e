/* The Scaling page: load, draw, handle input. The address holds all of the view, so it can be
   shared, and the browser's history steps through views. What is loaded is drawn at once; runs and
   curves that are still loading are drawn when they arrive. */

import { $ } from "scaling/format.js";
import { documents, listSweeps, loadCurves, loadSweep, needsCurves, refresh } from "scaling/api.js";
import { fillCard, pin, showPinned, unpin } from "scaling/card.js";
import { curvesOf, figure } from "scaling/figures.js";
import { onWidthChange, theme } from "scaling/layout.js";
import { pageState } from "scaling/notes.js";
import { csv, showFindings } from "scaling/panels.js";
import {
  change,
  checkSweeps,
  CHOICES,
  chosenSweeps,
  endCheck,
  fillControls,
  FLAGS,
  loadedRows,
  readAddress,
  state,
  writeAddress,
} from "scaling/state.js";
import { addDownloads } from "scaling/downloads.js";
import { listenToTable, showTable } from "scaling/table.js";

const TYPING_PAUSE = 200; // ms without a key after which the figure follows the filter
let drawCount = 0, pending = 0, problem = "", figureNote = "";
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
  problem = "";
  try {
    await load();
    if (mine !== drawCount) return;
    if (problem && !isLoaded()) return showNotes();
    fillControls();
    const { isEmpty } = pageState();
    document.body.classList.toggle("no-trials", !loadedRows().length);
    $("plot").hidden = isEmpty;
    $("key").hidden = isEmpty;
    showFindings();
    showTable();
    if (loadedRows().length) endCheck();
    writeAddress();
    showPinned();
    if (isEmpty) showNotes();
    else await drawFigure();
    document.body.dataset.view = state.view;
    document.body.dataset.ready = String(mine);
    markDrawn();
    if (!pending && mine === drawCount) document.body.dataset.settled = "1";
  } catch (e) {
    showError(e);
  }
}

/* Load the chosen sweeps. One that cannot be loaded leaves the others as they are. */
async function load() {
  checkSweeps();
  const loaded = await Promise.allSettled(
    chosenSweeps().map(async (sweep) => {
      if (await loadSweep(sweep)) later(() => refresh(sweep));
    }),
  );
  const lost = loaded.find((each) => each.status === "rejected");
  if (lost) problem = sentence(lost.reason);
}

const isLoaded = () => chosenSweeps().some((s) => documents.has(s));

async function drawFigure() {
  const rows = curvesOf(), keys = [state.x, state.y], isFirst = !$("plot").on;
  if (rows.length && needsCurves(rows, keys)) later(() => loadCurves(rows, keys));
  const [traces, plan, note, key] = figure(theme());
  figureNote = note.trim();
  $("key").textContent = key;
  showNotes();
  $("plot").style.height = `${plan.height}px`;
  await startPlotly();
  await Plotly.react($("plot"), traces, plan, { displayModeBar: false });
  if (!isFirst) return;
  const trialsOf = (e) => [].concat(e.points[0].customdata || []);
  $("plot").on("plotly_hover", (e) => fillCard(trialsOf(e)));
  $("plot").on("plotly_click", (e) => pin(trialsOf(e)));
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

const sentence = (e) =>
  `${e.message}.${documents.size ? " The last data stay." : ""} Reload when the server is back.`;

function showError(e) {
  problem = sentence(e);
  showNotes();
}

function showNotes() {
  const { notes, isEmpty } = problem && !isLoaded() ? { notes: [], isEmpty: true } : pageState();
  const all = [...notes, isEmpty ? "" : figureNote, problem];
  $("note").textContent = all.filter(Boolean).join(" ");
}

function addListeners() {
  for (const id of CHOICES) $(id).onchange = () => change({ [id]: $(id).value });
  for (const id of FLAGS) $(id).onchange = () => change({ [id]: $(id).checked ? "1" : "0" });
  $("sweeps").onchange = () => {
    const names = [...$("sweeps").querySelectorAll("input:checked")].map((i) => i.value);
    change({ sweeps: names.join(","), color: "", shape: "auto" });
  };
  let typed = "";
  $("filter").oninput = () => {
    const isFirst = !typed;
    typed = $("filter").value.trim();
    change({ filter: typed }, isFirst);
  };
  $("filter").onchange = () => {
    typed = "";
  };
  $("controls").onsubmit = (e) => e.preventDefault();
  listenToTable();
  addDownloads();
  $("csv").onclick = csv;
  $("share").onclick = () =>
    navigator.clipboard?.writeText(location.href).then(() => {
      $("share").textContent = "Copied";
    }).catch(() => {
      $("share").textContent = "Copy the address";
    });
  addEventListener("keydown", (e) => {
    if (e.key === "Escape" && !(e.target.matches("#filter") && e.target.value)) return unpin();
    if (e.target.matches("select, input:not([type=checkbox])")) return;
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const flag = {
      c: "curves",
      l: "law",
      b: "beyond",
      f: "frontier",
      r: "reference",
      x: "logx",
      y: "logy",
    }[e.key];
    if (flag) change({ [flag]: state[flag] === "1" ? "0" : "1" });
  });
  addEventListener("view", ({ detail }) => follow(Object.keys(detail)));
  addEventListener("hashchange", () => {
    readAddress();
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  onWidthChange(draw);
}

/* After a change of these parts of the view: the table and the card at once, the figure where it
   changes. */
let timer;
function follow(names) {
  const isQuick = names.every((name) => ["sort", "trial", "filter"].includes(name));
  if (isQuick && isLoaded()) {
    showTable();
    showPinned();
    showNotes();
  }
  clearTimeout(timer);
  if (names.includes("filter")) timer = setTimeout(draw, TYPING_PAUSE);
  else if (!isQuick) draw();
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
}
start();
