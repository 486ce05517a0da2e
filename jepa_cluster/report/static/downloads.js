/* The figure as a file: on white, 85 or 175 mm wide, with 8 pt type. PNG and SVG are made by Plotly;
   PDF is the SVG on a page of its size, by the browser's own print to PDF. */

import { $, element } from "scaling/format.js";
import { figure } from "scaling/figures.js";
import { MAX_FACETS, writeKey } from "scaling/layout.js";
import { chosenSweeps, state } from "scaling/state.js";

const PER_MM = 96 / 25.4; // px
const POINT = 96 / 72; // px
const MAX_HEIGHT = Math.floor(228 * PER_MM); // px, of the text of a page
const TRIES = 4;
const DARK = { ink: "#1c1e21", line: "#d5d8dd", paper: "#ffffff" };

/* The figure with its key. Panels are lower, and then fewer, until it fits on a page. */
function fitted(t) {
  for (let panels = MAX_FACETS;; panels--) {
    let most = MAX_HEIGHT;
    for (let i = 0; i < TRIES; i++) {
      const [data, layout, , key] = figure({ ...t, most, panels });
      writeKey(layout, t, key);
      const over = layout.height - MAX_HEIGHT;
      if (over <= 0 || panels === 1) return [data, layout];
      most -= over;
    }
  }
}

/* The address of a picture of the figure at the chosen width. */
async function picture(format) {
  const width = Math.round($("mm").value * PER_MM);
  const [data, layout] = fitted({ ...DARK, width, size: 8 * POINT });
  layout.paper_bgcolor = layout.plot_bgcolor = DARK.paper;
  const size = { width, height: Math.round(layout.height) };
  const url = await Plotly.toImage({ data, layout }, {
    format,
    ...size,
    scale: format === "png" ? 2 : 1,
  });
  return { url, ...size };
}

async function save(format) {
  const { url } = await picture(format);
  const name = [...chosenSweeps(), state.view, `${$("mm").value}mm`].join("-");
  Object.assign(element("a"), { href: url, download: `${name}.${format}` }).click();
}

/* Print the figure alone: the printer "Save as PDF" writes vectors and text. */
async function print() {
  const { url, height } = await picture("svg");
  $("print")?.remove();
  const frame = Object.assign(element("iframe"), { id: "print", title: "Figure to print" });
  const svg = decodeURIComponent(url.slice(url.indexOf(",") + 1));
  const page = `size: ${$("mm").value}mm ${Math.ceil(height / PER_MM) + 1}mm; margin: 0`;
  frame.srcdoc = `<!doctype html><title>scaling</title><style>@page { ${page} }
    body { margin: 0 } svg { display: block; width: ${
    $("mm").value
  }mm; height: auto }</style>${svg}`;
  frame.onload = () => frame.contentWindow.print();
  document.body.append(frame);
}

export function addDownloads() {
  $("png").onclick = () => save("png");
  $("svg").onclick = () => save("svg");
  $("pdf").onclick = print;
}
