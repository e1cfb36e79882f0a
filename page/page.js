"use strict";
(() => {
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs || [];
const IMAGES = DATA.images || [];
const FILES = DATA.files || [];
const shown = new Set(RUNS.map((_, i) => i));
const redraws = [];
let current = 0;

// --- elements ------------------------------------------------------------------------------------

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else node.setAttribute(name, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const colour = (i) => `var(--c${i % 8})`;
// There are eight colours: lines of the ninth run and later are dashed, of the 17th and later dotted.
const dashes = (i) => ["none", "7 4", "2 4"][Math.floor(i / 8) % 3];
const show = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e5)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
};
// A number in a column of a table, with four significant digits.
const figures = (value) => (Math.abs(value) >= 0.001 && Math.abs(value) < 1e4 ? value.toPrecision(4) : show(value));
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const counted = (count, one, more = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : more}`;
// A name within a sentence, whose direction it does not change if it is written from right to left.
const bidi = (name) => `\u2068${name}\u2069`;
// A name as an element, which may be broken after a / or a _. The middle of a very long name is left
// out; the whole one appears at the pointer, and with the large picture.
const LONGEST = 64;
function named(name) {
  const letters = Array.from(name), long = letters.length > LONGEST;
  const shown = long ? `${letters.slice(0, LONGEST / 2).join("")}…${letters.slice(-LONGEST / 4).join("")}` : name;
  const parts = shown.match(/[^/_]+[/_]*|[/_]+/g) || [];
  return el("bdi", {title: long ? name : null}, parts.flatMap((part) => [part, el("wbr")]));
}
const headRow = (names) => el("thead", {}, el("tr", {}, names.map((name) => el("th", {scope: "col"}, name))));

// A picture that a click shows large; `more` are lines below it, in addition to its name and file.
function picture(number, name, ...more) {
  const source = IMAGES[number];
  if (!source) return el("span", {class: "thumb none", title: name}, name);
  const image = el("img", {class: "thumb", src: source, alt: name, decoding: "async"});
  const button = el("button", {class: "look", type: "button", "aria-label": `${bidi(name)}, large`}, image);
  button.look = {number, name, more};
  button.addEventListener("click", () => enlarge(button));
  button.tabIndex = -1;
  queueMicrotask(() => {  // once it stands among the others
    const row = together(button);
    if (!row.some((each) => each.tabIndex === 0)) row[0].tabIndex = 0;
  });
  return button;
}

// The pictures around it, of a row or of a card: the tab key stops at one of them, arrows go on.
function together(button) {
  const around = button.closest("[data-together]") || button.parentElement;
  return around ? [...around.querySelectorAll("button.look")] : [button];
}
document.addEventListener("focusin", ({target}) => {
  if (!target.look) return;
  for (const each of together(target)) each.tabIndex = each === target ? 0 : -1;
});
document.addEventListener("keydown", (event) => {
  if (!event.target.look || event.ctrlKey || event.altKey || event.metaKey) return;
  const row = together(event.target), at = row.indexOf(event.target);
  const to = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: row.length - 1}[event.key];
  if (to === undefined) return;
  event.preventDefault();
  if (row[to]) row[to].focus();
});

// --- pictures shown large ------------------------------------------------------------------------

const large = {
  image: el("img", {alt: ""}),
  words: el("div", {class: "words", "aria-live": "polite"}),
  box: el("dialog", {id: "large", "aria-label": "picture"}),
  row: [], at: 0,
};
large.box.append(
  el("div", {class: "stage"}, large.image), large.words,
  el("div", {class: "tabs"},
    el("button", {type: "button", "aria-label": "previous picture", "data-step": -1}, "←"),
    el("button", {type: "button", "aria-label": "next picture", "data-step": 1}, "→"),
    el("button", {type: "button", "data-close": ""}, "close")));
document.body.append(large.box);

function lookAt(at) {
  large.at = (at + large.row.length) % large.row.length;
  const {number, name, more} = large.row[large.at];
  large.image.src = IMAGES[number];
  large.image.alt = name;
  const place = large.row.length > 1 ? el("span", {class: "note"}, `${large.at + 1} of ${large.row.length}`) : null;
  large.words.replaceChildren(...[el("b", {}, name), ...more.filter(Boolean).map((words) => el("div", {}, words)),
    el("div", {class: "note"}, FILES[number] || ""), place].filter(Boolean));
}
// Shows a picture large; the arrows lead to the others in its row or card.
function enlarge(button) {
  const buttons = together(button);
  openLarge(buttons.map((b) => b.look), buttons.indexOf(button), button);
}
function openLarge(row, at, button) {
  hideTip();
  large.row = row;
  lookAt(at);
  for (const b of large.box.querySelectorAll("[data-step]")) b.hidden = large.row.length < 2;
  if (!large.box.open) large.box.showModal();
  large.box.onclose = () => { if (button && button.isConnected) button.focus({preventScroll: true}); };
}
large.box.addEventListener("click", (event) => {
  const step = event.target.dataset && event.target.dataset.step;
  if (step) lookAt(large.at + Number(step));
  else if (event.target === large.box || (event.target.dataset && "close" in event.target.dataset)) large.box.close();
});
large.box.addEventListener("keydown", (event) => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (step && large.row.length > 1) { lookAt(large.at + step); event.preventDefault(); }
});
let swipe = null;
large.box.addEventListener("pointerdown", (event) => { swipe = event.clientX; });
large.box.addEventListener("pointerup", (event) => {
  const moved = swipe === null ? 0 : event.clientX - swipe;
  swipe = null;
  if (Math.abs(moved) > 60 && large.row.length > 1) lookAt(large.at + (moved < 0 ? 1 : -1));
});

// --- the tip that follows the pointer ------------------------------------------------------------

const tip = document.body.appendChild(el("div", {id: "tip", hidden: "", role: "status"}));

function showTip(event, ...content) {
  tip.replaceChildren(...content.flat().filter((part) => part !== null));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const width = document.documentElement.clientWidth, height = window.innerHeight;
  let left = event.clientX + 16, top = event.clientY + 16;
  if (left + box.width > width - 8) left = Math.max(8, event.clientX - box.width - 12);
  if (top + box.height > height - 8) top = Math.max(8, event.clientY - box.height - 12);
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
}
const hideTip = () => { tip.hidden = true; };
const line = (swatch, name, value) => el("div", {class: "line"},
  swatch ? el("span", {class: "dot", style: {background: swatch}}) : null,
  el("span", {}, name), el("span", {}, value));
const imageTip = (number) => (IMAGES[number] ? el("img", {src: IMAGES[number], alt: ""}) : null);

// --- axes ----------------------------------------------------------------------------------------

// Multiples of a round step from low to high, at most `most` of them (but 2 are allowed).
function ticks(low, high, most, whole) {
  const span = high - low;
  if (!(span > 0) || !Number.isFinite(span)) return {values: [low], step: Math.abs(low) || 1};
  let power = Math.floor(Math.log10(span / Math.max(2, most))) - 1;
  for (;; power += 1) {
    for (const factor of [1, 2, 5]) {
      const step = factor * 10 ** power;
      if (whole && step < 1) continue;
      const first = Math.ceil(low / step - 1e-6), last = Math.floor(high / step + 1e-6);
      if (last - first + 1 > Math.max(2, most)) continue;
      const values = [];
      for (let i = first; i <= last; i += 1) values.push(power < 0 ? Number((i * step).toFixed(-power)) : i * step);
      return {values: values.length ? values : [low], step};
    }
  }
}
// Ticks of a log axis: 1, 2 and 5 of each decade, or 1 and 3, or 1, or some of the decades.
function logTicks(low, high, most) {
  const between = (factors) => {
    const found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p += 1) {
      for (const factor of factors) found.push(Number(`${factor}e${p}`));
    }
    return found.filter((v) => v >= low * (1 - 1e-9) && v <= high * (1 + 1e-9));
  };
  const fine = [[1, 2, 5], [1, 3], [1]].map(between).find((found) => found.length <= most && found.length > 1);
  if (fine) return fine;
  const decades = between([1]), every = Math.ceil(decades.length / most);
  return decades.length > 1 ? decades.filter((_, i) => i % every === 0) : ticks(low, high, most).values;
}
// The text of a tick, with as many digits as its step needs, so that no two texts are equal.
function tickText(value, step) {
  if (value === 0) return "0";
  const size = Math.abs(value), digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  if (size >= 1e6 || (digits > 5 && size < 1e-3)) return tidy(value.toExponential(Math.max(0, Math.min(6, Math.floor(Math.log10(size) + 1e-9) + digits))));
  return value.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits, useGrouping: size >= 1e4});
}
const tidy = (text) => text.replace(/\.?0*e\+?/, "e");
const logText = (value) => (value >= 1e4 || value < 1e-3 ? tidy(value.toExponential(1)) : String(value));
function extent(values, around) {
  let low = Infinity, high = -Infinity;
  for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  if (low === high) { const pad = Math.abs(low) * 0.1 || 1; return [low - pad, high + pad]; }
  const pad = (high - low) * around;
  return [low - pad, high + pad];
}
// The range of a log axis: at most three decades below the highest value. A point far below the
// others, such as the last rate of a cosine schedule, would flatten them; it is drawn at the edge.
const DECADES = 1e3;
function logExtent(values) {
  let low = Infinity, high = 0;
  for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  return [Math.max(low, high / DECADES) / 1.15, high * 1.15];
}

function frame(host, caption, note, height) {
  const figure = el("figure", {class: "chart"},
    el("figcaption", {}, el("b", {}, caption), el("span", {}, note || "")));
  host.append(figure);
  return (draw) => {
    let drawing = null;
    const redraw = () => {
      const width = Math.max(200, figure.clientWidth - 26);
      const next = svg("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": caption});
      draw(next, width);
      if (drawing) drawing.replaceWith(next); else figure.append(next);
      drawing = next;
    };
    redraw();
    let last = figure.clientWidth;
    new ResizeObserver(() => {
      if (figure.clientWidth && figure.clientWidth !== last) { last = figure.clientWidth; redraw(); }
    }).observe(figure);
    return redraw;
  };
}

// Draws a chart's axes; returns the box of its lines, with the functions x and y from values to pixels.
function axes(root, width, height, x, y, {log, whole, wholeY, xName, noX} = {}) {
  const top = 8, bottom = height - (xName ? 36 : 22);
  const most = Math.max(2, Math.min(6, Math.floor((bottom - top) / 22)));
  const step = log ? null : ticks(y[0], y[1], most, wholeY);
  const marks = log ? logTicks(y[0], y[1], most).map((v) => [v, logText(v)]) : step.values.map((v) => [v, tickText(v, step.step)]);
  const left = Math.max(30, 12 + 6.6 * Math.max(...marks.map(([, text]) => text.length)));
  const box = {left, right: width - 12, top, bottom};
  const f = log ? Math.log : (v) => v;
  box.x = (v) => left + (v - x[0]) / (x[1] - x[0]) * (box.right - left);
  box.y = (v) => bottom - (f(log ? Math.max(v, y[0]) : v) - f(y[0])) / (f(y[1]) - f(y[0])) * (bottom - top);
  for (const [value, text] of marks) {
    const at = box.y(value);
    root.append(svg("line", {class: "grid", x1: left, x2: box.right, y1: at, y2: at}),
      svg("text", {class: "tick y", x: left - 6, y: at + 4, "text-anchor": "end"}, text));
  }
  if (!noX) {
    // As many ticks as the longest text leaves room for.
    const room = (found) => 6.6 * Math.max(...found.values.map((v) => tickText(v, found.step).length)) + 16;
    let count = Math.max(2, Math.floor((box.right - left) / 34)), found = ticks(x[0], x[1], count, whole);
    while (count > 2 && room(found) * found.values.length > box.right - left + 16) found = ticks(x[0], x[1], count -= 1, whole);
    for (const value of found.values) {
      const at = box.x(value), text = tickText(value, found.step);
      const overhang = Math.max(0, at + 3.3 * text.length - width);
      root.append(svg("line", {class: "grid", x1: at, x2: at, y1: bottom, y2: bottom + 4}),
        svg("text", {class: "tick x", x: at - overhang, y: bottom + 16, "text-anchor": "middle"}, text));
    }
  }
  if (xName) root.append(svg("text", {x: box.right, y: bottom + 30, "text-anchor": "end"}, xName));
  return box;
}

// --- charts --------------------------------------------------------------------------------------

// series: {name, colour, points: [[x, y]], run, dash: "4 3"}; those of hidden runs are left out.
function lineChart(host, {title, note, series, xName, log, band, marks = [], height = 178}) {
  const start = frame(host, title, note, height);
  const redraw = start((root, width) => {
    const visible = series.filter((s) => s.run === undefined || shown.has(s.run));
    const points = visible.flatMap((s) => s.points).filter((p) => p[1] !== null && (!log || p[1] > 0));
    const area = band ? band.flatMap((b) => [[b[0], b[1]], [b[0], b[2]]]) : [];
    if (!points.length) {
      root.append(svg("text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, "nothing to show"));
      return;
    }
    root.setAttribute("aria-label", spoken(title, xName, visible));
    const all = [...points, ...area];
    const x = extent(all.map((p) => p[0]), 0), heights = all.map((p) => p[1]);
    const y = log ? logExtent(heights) : extent(heights, 0.06);
    const box = axes(root, width, height, x, y, {log, xName, whole: xName === "epoch" || xName === "step"});
    if (band) {
      const up = band.map((b) => `${box.x(b[0])},${box.y(b[2])}`);
      const down = band.slice().reverse().map((b) => `${box.x(b[0])},${box.y(b[1])}`);
      root.append(svg("polygon", {class: "band", points: [...up, ...down].join(" ")}));
    }
    for (const s of visible) {
      const kept = s.points.filter((p) => p[1] !== null && (!log || p[1] > 0));
      const path = kept.map((p) => `${box.x(p[0]).toFixed(1)},${box.y(p[1]).toFixed(1)}`).join(" ");
      root.append(svg("polyline", {class: "series", points: path, style: stroke(s)}));
      for (const p of kept) {
        const beneath = log && p[1] < y[0];
        if (!beneath && kept.length >= 25) continue;
        const place = {cx: box.x(p[0]), cy: box.y(p[1])};
        if (!beneath) root.append(svg("circle", {...place, r: 2.4, style: {fill: s.colour}}));
        else root.append(svg("circle", {...place, r: 3, class: "beneath", style: {stroke: s.colour}}, svg("title", {}, "below the axis")));
      }
    }
    for (const [value, words] of marks) {
      if (value < x[0] || value > x[1]) continue;
      root.append(svg("line", {class: "cursor", x1: box.x(value), x2: box.x(value), y1: box.top, y2: box.bottom}, svg("title", {}, `${words}: ${value}`)));
    }
    const cursor = svg("g", {});
    const pad = svg("rect", {class: "pad", x: 0, y: 0, width, height, fill: "transparent"});
    const xs = [...new Set(points.map((p) => p[0]))].sort((a, b) => a - b);
    const move = (event) => {
      const at = (event.clientX - root.getBoundingClientRect().left) * width / root.clientWidth;
      const near = xs.reduce((a, b) => (Math.abs(box.x(b) - at) < Math.abs(box.x(a) - at) ? b : a));
      cursor.replaceChildren(svg("line", {class: "cursor", x1: box.x(near), x2: box.x(near), y1: box.top, y2: box.bottom}));
      const lines = [];
      for (const s of visible) {
        const hit = s.points.find((p) => p[0] === near && p[1] !== null);
        if (!hit) continue;
        if (!log || hit[1] > 0) {
          cursor.append(svg("circle", {cx: box.x(near), cy: box.y(hit[1]), r: 4, style: {fill: s.colour}}));
        }
        lines.push(line(s.colour, s.name, show(hit[1])));
      }
      showTip(event, el("b", {}, `${xName || ""} ${show(near)}`), lines);
    };
    pad.addEventListener("pointermove", move);
    pad.addEventListener("pointerdown", move);
    pad.addEventListener("pointerleave", () => { cursor.replaceChildren(); hideTip(); });
    root.append(cursor, pad);
  });
  // For the lines of runs, the buttons at the top of the page are the legend.
  if (series.length > 1 && series[0].run === undefined) host.lastChild.append(legend(series));
  return redraw;
}

const stroke = (s) => ({stroke: s.colour, "stroke-dasharray": s.dash || "none"});
const stretch = (s) => svg("line", {x1: 0, x2: 20, y1: 4, y2: 4, style: stroke(s)});
const legend = (series) => el("p", {class: "legend"}, series.map((s) => el("span", {},
  svg("svg", {class: "stroke", viewBox: "0 0 20 8", "aria-hidden": "true"},
    stretch(s)), named(s.name))));

// A description of a chart for screen readers: the first and the last point of each line.
function spoken(title, xName, series) {
  const at = ([x, y]) => `${show(y)} at ${xName || ""} ${show(x)}`;
  const course = (s) => `${series.length > 1 ? `${s.name}: ` : ""}from ${at(s.points[0])} to ${at(s.points[s.points.length - 1])}`;
  return `${title}. ${series.filter((s) => s.points.length).map(course).join("; ")}`;
}

// points: [x, y, name, image]
function scatter(host, {title, note, points, xName, yName, joined, height = 230}) {
  frame(host, title, note, height)((root, width) => {
    const x = extent(points.map((p) => p[0]), 0.02), y = extent(points.map((p) => p[1]), 0.06);
    const box = axes(root, width, height, x, y, {xName, whole: points.every((p) => Number.isInteger(p[0]))});
    if (joined) {
      root.append(svg("polyline", {class: "series", style: {stroke: colour(0), opacity: 0.5},
        points: points.map((p) => `${box.x(p[0])},${box.y(p[1])}`).join(" ")}));
    }
    const dots = points.map((p) => svg("circle", {class: "point", cx: box.x(p[0]), cy: box.y(p[1]),
      r: joined ? 2 : 3, style: {fill: colour(0), opacity: joined ? 1 : 0.6}}));
    const ring = svg("circle", {r: 6, fill: "none", style: {stroke: colour(1), "stroke-width": 2}, visibility: "hidden"});
    const pad = svg("rect", {class: "pad", x: 0, y: 0, width, height, fill: "transparent"});
    nearest(pad, root, width, points.map((p) => [box.x(p[0]), box.y(p[1])]), (i, event) => {
      ring.setAttribute("visibility", i < 0 ? "hidden" : "visible");
      if (i < 0) { hideTip(); return; }
      const [px, py, name, image] = points[i];
      ring.setAttribute("cx", box.x(px));
      ring.setAttribute("cy", box.y(py));
      showTip(event, imageTip(image), el("b", {}, name), line(null, xName, show(px)), line(null, yName, show(py)));
    });
    root.append(...dots, ring, pad);
  });
}

// The index of the place nearest to (x, y), within 22 pixels; -1 if there is none.
function closest(places, x, y) {
  let best = -1, least = 22 ** 2;
  places.forEach(([px, py], i) => {
    const d = (px - x) ** 2 + (py - y) ** 2;
    if (d < least) { least = d; best = i; }
  });
  return best;
}

// Calls `report` with the index of the place nearest to the pointer, as it moves over `pad`.
function nearest(pad, root, width, places, report) {
  const move = (event) => {
    const box = root.getBoundingClientRect(), factor = width / box.width;
    report(closest(places, (event.clientX - box.left) * factor, (event.clientY - box.top) * factor), event);
  };
  pad.addEventListener("pointermove", move);
  pad.addEventListener("pointerdown", move);
  pad.addEventListener("pointerleave", (event) => report(-1, event));
}

function bars(host, {title, note, counts, edges, labels, xName, value = (v) => `${v}`, height = 178}) {
  frame(host, title, note, height)((root, width) => {
    const most = Math.max(...counts, 1e-9) * 1.05;
    const x = edges ? [edges[0], edges[edges.length - 1]] : [0, counts.length];
    const box = axes(root, width, height, x, [0, most], {xName, noX: !edges, wholeY: counts.every(Number.isInteger)});
    const step = (box.right - box.left) / counts.length;
    const every = labels ? Math.max(1, Math.ceil((6.6 * Math.max(...labels.map((l) => l.length)) + 6) / step)) : 1;
    counts.forEach((count, i) => {
      const where = edges ? `${show(edges[i])} to ${show(edges[i + 1])}` : labels[i];
      const bar = svg("rect", {class: "bar", x: box.left + i * step + 0.5, width: Math.max(1, step - 1),
        y: box.y(count), height: Math.max(0, box.bottom - box.y(count))});
      bar.addEventListener("pointermove", (event) => showTip(event, el("b", {}, where), el("div", {}, value(count))));
      bar.addEventListener("pointerleave", hideTip);
      root.append(bar);
      if (labels && i % every === 0) {
        root.append(svg("text", {x: box.left + (i + 0.5) * step, y: box.bottom + 16, "text-anchor": "middle"}, labels[i]));
      }
    });
  });
}

// --- curves of all runs --------------------------------------------------------------------------

function seriesOf(column, title, across, factor) {
  return RUNS.map((run, i) => ({
    name: RUNS.length > 1 ? run.name : title, colour: colour(i), dash: dashes(i), run: i,
    points: (run.columns[column] || []).map((y, row) => [run.across[across][row], y === null ? null : y * factor]).filter((p) => p[1] !== null),
  })).filter((s) => s.points.length);
}

function drawCurves() {
  const host = document.getElementById("curves-here");
  if (!host) return;
  const draw = (across) => {
    redraws.length = 0;
    host.replaceChildren();
    for (const group of DATA.groups) {
      const several = group.columns.filter((c) => RUNS.some((run) => (run.columns[c] || []).filter((v) => v !== null).length > 1));
      if (!several.length) continue;
      const grid = el("div", {class: "charts"});
      const content = [el("h3", {}, group.title), grid];
      if (group.folded) {
        const fold = el("details", {}, el("summary", {}, `${group.title} (${several.length})`), grid);
        host.append(fold);
      } else host.append(...content);
      for (const column of several) {
        const title = (group.titles || {})[column] || (group.percent ? `${column}, %` : column);
        const series = seriesOf(column, title, across, group.percent ? 100 : 1);
        const last = series.length === 1 ? series[0].points[series[0].points.length - 1][1] : null;
        redraws.push(lineChart(grid, {title, note: last === null ? "" : `last ${show(last)}`,
          series, xName: across, log: group.log}));
      }
    }
    if (!host.children.length) host.append(el("p", {class: "note"}, "A curve needs two epochs, or two evaluations."));
  };
  const picker = el("div", {class: "tabs"}, el("span", {class: "note"}, "across"));
  for (const across of ["epoch", "step", "minutes"]) {
    picker.append(el("button", {"data-across": across, "aria-pressed": String(across === "epoch"), onclick: (event) => {
      for (const b of picker.querySelectorAll("button")) b.setAttribute("aria-pressed", String(b === event.target));
      draw(across);
    }}, across));
  }
  host.before(picker);
  draw("epoch");
}

// --- sections of one run -------------------------------------------------------------------------

const doubts = (run) => (run.doubts || []).map((words) => el("p", {class: "warning"}, words));

function drawGalleries(host, run) {
  const groups = run.galleries || [];
  host.append(...doubts(run));
  if (!groups.length) { host.append(el("p", {class: "note"}, run.missing || "No embeddings, no neighbours.")); return; }
  const tabs = el("div", {class: "tabs", role: "group", "aria-label": "which queries"});
  const about = el("p", {class: "about"});
  const rows = el("div", {class: "card scroll"});
  const open = (group, tab) => {
    for (const b of tabs.children) b.setAttribute("aria-pressed", String(b === tab));
    about.textContent = group.about;
    rows.replaceChildren(...group.rows.map(galleryRow));
  };
  for (const group of groups) {
    tabs.append(el("button", {type: "button", onclick: (event) => open(group, event.currentTarget)}, group.title));
  }
  host.append(tabs, about, el("p", {class: "legend"},
    el("span", {}, el("i", {}), "right: the query's class"), el("span", {}, el("i", {class: "wrong"}), "wrong: another class"),
    el("span", {}, "below each: cosine to the query, class")), rows);
  open(groups[0], tabs.firstChild);
}

// The rank of the nearest right image, in words, for a query whose nearest image is wrong.
function rankOfRight(row) {
  if (row.rank === null || row.rank === undefined || row.rank === 1) return null;
  const seen = row.rank <= row.found.length ? "" : ", not shown";
  return `nearest right image: place ${row.rank.toLocaleString("en")}${seen}`;
}

function galleryRow(row) {
  const where = rankOfRight(row);
  return el("div", {class: "row", "data-together": ""},
    el("div", {class: "query"}, picture(row.image, row.name, "the query", where),
      el("div", {class: "name"}, named(row.name), where ? el("span", {class: "where"}, where) : null)),
    el("div", {class: "found"}, row.found.map((hit, i) => el("div", {
      class: hit.right ? "cell" : "cell wrong",
      onpointermove: (event) => showTip(event, imageTip(hit.image), el("b", {}, hit.name),
        line(null, hit.right ? "right" : `wrong, wanted ${bidi(row.name)}`, ""), line(null, "cosine", show(hit.cosine)), line(null, "place", i + 1)),
      onpointerleave: hideTip,
    }, el("div", {class: "frame"}, picture(hit.image, hit.name, `place ${i + 1} for ${bidi(row.name)}: ${hit.right ? "right" : "wrong"}`, `cosine ${hit.cosine.toFixed(3)}`),
      el("span", {class: "mark"}, hit.right ? "✓" : "×")),
    el("div", {class: "under"}, el("b", {}, hit.cosine.toFixed(3)), el("span", {}, hit.name))))));
}

function drawConfusions(host, run) {
  host.append(...doubts(run));
  if (!run.classes) {
    host.append(el("p", {class: "note"}, run.missing || "No query had anything to find, so no classes are confused."));
    return;
  }
  if (!run.confusions.length) {
    host.append(el("p", {class: "note"}, "No query's nearest image is of another class."));
  } else {
    host.append(el("div", {class: "pairs"}, run.confusions.map((pair) => el("div", {class: "card pair"},
      el("div", {class: "who"}, named(pair.names[0]), " ↔ ", named(pair.names[1])),
      el("div", {class: "how"}, `${pair.counts[0]} of ${pair.sizes[0]} taken for the second, ${pair.counts[1]} of ${pair.sizes[1]} for the first`),
      el("div", {class: "duos"}, pair.examples.map((e) => el("div", {class: "duo", "data-together": "",
        onpointermove: (event) => showTip(event, imageTip(e.query), el("b", {}, e.of), line(null, `taken for ${bidi(e.as)}`, show(e.cosine))),
        onpointerleave: hideTip}, picture(e.query, e.of, `taken for ${bidi(e.as)}`), "→", picture(e.found, e.as, `cosine ${e.cosine.toFixed(3)} to the query`))))))));
  }
  const grid = el("div", {class: "two"});
  const {lowest, never} = run.classes;
  if (lowest.length) host.append(el("h3", {}, "Classes that are found worst"));
  if (lowest.length && never > lowest.length) host.append(el("p", {class: "note"}, `${lowest.length} of the ${never.toLocaleString("en")} classes of which no query's nearest image is right.`));
  host.append(grid);
  if (lowest.length) grid.append(el("div", {class: "card scroll"}, el("table", {class: "ranked"},
    headRow(["images", "class", "R@1, %", "queries"]),
    el("tbody", {}, lowest.map((c) => el("tr", {},
      el("td", {}, c.images.map((i) => picture(i, c.name))), el("td", {}, el("span", {class: "named"}, named(c.name))),
      el("td", {}, (100 * c.score).toFixed(0)), el("td", {}, c.size)))))));
  const side = el("div", {});
  grid.append(side);
  if (run.classes.histogram.length) {
    bars(side, {title: "R@1 over the classes", note: "number of classes", counts: run.classes.histogram,
      edges: run.classes.histogram.map((_, i) => i * 10).concat(100), xName: "R@1 of a class, %", value: (v) => counted(v, "class", "classes"), height: 240});
  }
}

function drawPairs(host, run) {
  const found = run.pairs;
  if (!found) { host.append(el("p", {class: "note"}, "This run has not compared all pairs.")); return; }
  host.append(el("ul", {class: "said"}, found.said.map((words) => el("li", {}, words))));
  const points = (values) => values.map((v, i) => [found.cosines[i], 100 * v]);
  const grid = el("div", {class: "charts wide"});
  host.append(grid);
  lineChart(grid, {title: "cosines of pairs, % of their kind", note: `${counted(found.queries, "query", "queries")} with all images`, xName: "cosine", height: 240,
    marks: found.marks, series: [{name: "pairs of one class", colour: "var(--right)", points: points(found.same)},
      {name: "pairs of two classes", colour: "var(--wrong)", points: points(found.different)}]});
  if (found.marks.length) host.append(el("p", {class: "note space"}, "Upright and dashed: the recommended thresholds."));
}

const CLOSEST = 40; // the largest magnification of the map
const FEW = 150; // the most points in view that are shown as pictures

function drawMap(host, run) {
  const map = run.map;
  if (!map || !map.points) { host.append(el("p", {class: "note"}, (map && map.note) || run.missing || "Too few images for a map.")); return; }
  const phone = document.documentElement.clientWidth < 640, height = phone ? 400 : 640;
  const wrong = new Map(map.wrong || []);
  const search = el("input", {type: "search", placeholder: "part of a class's name", "aria-label": "find a class"});
  const found = el("span", {class: "note", role: "status"});
  const errors = el("button", {type: "button", "data-errors": "", "aria-pressed": "false"}, `errors (${wrong.size.toLocaleString("en")})`);
  const button = (words, label, act) => el("button", {type: "button", "aria-label": label, "data-zoom": words, onclick: act}, words);
  const view = {x: 0.5, y: 0.5, zoom: 1};
  let redraw = () => {}, size = [1, 1];
  const set = (x, y, zoom) => {
    view.zoom = Math.min(CLOSEST, Math.max(1, zoom));
    const half = 0.5 / view.zoom;
    view.x = Math.min(1 - half, Math.max(half, x));
    view.y = Math.min(1 - half, Math.max(half, y));
    redraw();
  };
  // Magnifies around a place of the drawing, in pixels, which does not move.
  const magnify = (factor, px = size[0] / 2, py = size[1] / 2) => {
    const zoom = Math.min(CLOSEST, Math.max(1, view.zoom * factor));
    const dx = px / size[0] - 0.5, dy = py / size[1] - 0.5;
    set(view.x + dx / view.zoom - dx / zoom, view.y + dy / view.zoom - dy / zoom, zoom);
  };
  const pan = (px, py) => set(view.x - px / size[0] / view.zoom, view.y - py / size[1] / view.zoom, view.zoom);
  const all = () => set(0.5, 0.5, 1);

  const folded = (text) => text.normalize("NFC").toLowerCase(); // accents may be separate characters
  let classes = null; // those whose names contain the searched text; null: all
  const look = () => {
    const words = folded(search.value.trim());
    classes = words ? new Set(map.names.flatMap((n, i) => (folded(n).includes(words) ? [i] : []))) : null;
    const count = classes ? map.points.filter((p) => classes.has(p[2])).length : 0;
    found.textContent = !classes ? "" : classes.size ? `${classes.size} of ${counted(map.names.length, "class", "classes")}, ${counted(count, "image")}` : "no class on the map is called that";
    redraw();
  };
  const goThere = () => {
    if (!classes || !classes.size) return;
    const own = map.points.filter((p) => classes.has(p[2]));
    const [left, right] = extent(own.map((p) => p[0]), 0.1), [low, high] = extent(own.map((p) => 1 - p[1]), 0.1);
    set((left + right) / 2, (low + high) / 2, Math.min(0.8 / Math.max(right - left, high - low, 0.02), CLOSEST));
  };
  search.addEventListener("input", look);
  search.addEventListener("keydown", (event) => { if (event.key === "Enter") goThere(); });
  errors.addEventListener("click", () => {
    errors.setAttribute("aria-pressed", String(errors.getAttribute("aria-pressed") !== "true"));
    redraw();
  });
  host.append(el("div", {class: "tabs"}, search, wrong.size ? errors : null,
    button("−", "zoom out", () => magnify(1 / 1.6)), button("+", "zoom in", () => magnify(1.6)), button("all", "all: the whole map", all), found));
  if (map.note) host.append(el("p", {class: "note"}, map.note));

  frame(host, "each point an image, each colour a class", phone ? "pinch to zoom, tap a point" : "wheel or + − to zoom, drag to move, click a point", height)((root, width) => {
    size = [width, height];
    root.setAttribute("class", "map");
    root.setAttribute("role", "application"); // it has keys of its own
    root.setAttribute("aria-label", "map of the embedding: + and − zoom, the arrows move, 0 shows all");
    root.setAttribute("tabindex", "0");
    const layer = svg("g", {}), pictures = svg("g", {});
    const dots = map.points.map((p) => svg("circle", {class: "point", r: 4,
      style: {fill: `hsl(${(p[2] * 137.508) % 360} ${58 + (p[2] % 3) * 14}% ${44 + (p[2] % 4) * 7}%)`}}));
    layer.append(...dots);
    const places = map.points.map(() => [0, 0]);
    let hovered = -1;

    const mark = () => {
      const only = errors.getAttribute("aria-pressed") === "true";
      const here = hovered >= 0 ? map.points[hovered][2] : -1;
      root.classList.toggle("dim", Boolean(classes) || only || here >= 0);
      map.points.forEach((p, i) => {
        const on = here >= 0 ? p[2] === here : (!classes || classes.has(p[2])) && (!only || wrong.has(i));
        dots[i].classList.toggle("on", on && (here >= 0 || Boolean(classes) || only));
        dots[i].classList.toggle("bad", wrong.has(i) && (only || view.zoom > 1.5));
        dots[i].setAttribute("r", on && only ? 5 : 4);
      });
    };
    redraw = () => {
      const inView = [];
      map.points.forEach(([x, y], i) => {
        const px = width / 2 + (0.02 + 0.96 * x - view.x) * width * view.zoom;
        const py = height / 2 + (0.02 + 0.96 * (1 - y) - view.y) * height * view.zoom;
        places[i] = [px, py];
        dots[i].setAttribute("cx", px.toFixed(1));
        dots[i].setAttribute("cy", py.toFixed(1));
        if (px > -20 && py > -20 && px < width + 20 && py < height + 20) inView.push(i);
      });
      const close = view.zoom > 1 && inView.length <= FEW;
      const side = Math.max(26, Math.min(64, Math.sqrt(width * height / Math.max(1, inView.length)) * 0.6));
      pictures.replaceChildren(...(close ? inView : []).filter((i) => IMAGES[map.points[i][3]]).map((i) => {
        const [px, py] = places[i], x = px - side / 2, y = py - side / 2;
        return svg("g", {class: wrong.has(i) ? "card-of bad" : "card-of"},
          svg("rect", {x: x - 2, y: y - 2, width: side + 4, height: side + 4, rx: 4}),
          svg("image", {href: IMAGES[map.points[i][3]], x, y, width: side, height: side}));
      }));
      root.style.touchAction = view.zoom > 1 ? "none" : "pan-y";
      root.classList.toggle("zoomed", view.zoom > 1);
      mark();
    };
    const hover = (i, event) => {
      hovered = i;
      mark();
      if (i < 0) { hideTip(); return; }
      const [, , c, image] = map.points[i];
      showTip(event, imageTip(image), el("b", {}, map.names[c]),
        wrong.has(i) ? line("var(--wrong)", `nearest image: ${bidi(wrong.get(i))}`, "") : null);
    };
    const at = (event) => {
      const box = root.getBoundingClientRect();
      return [(event.clientX - box.left) * width / box.width, (event.clientY - box.top) * height / box.height];
    };
    const nearestTo = (event) => closest(places, ...at(event));

    // The wheel scrolls the page until the pointer has moved over the map.
    let awake = false, travelled = 0, pinch = 0;
    const fingers = new Map();
    window.addEventListener("scroll", () => { awake = false; }, {passive: true});
    root.addEventListener("wheel", (event) => {
      const out = event.deltaY > 0;
      if ((!awake && !event.ctrlKey) || (out && view.zoom <= 1) || (!out && view.zoom >= CLOSEST)) return;
      event.preventDefault();
      hover(-1);
      magnify(Math.exp(-Math.max(-60, Math.min(60, event.deltaY)) * 0.006), ...at(event));
    }, {passive: false});
    root.addEventListener("pointerdown", (event) => {
      fingers.set(event.pointerId, at(event));
      travelled = fingers.size > 1 ? 99 : 0;
      pinch = 0;
      if (event.pointerType !== "mouse") hover(nearestTo(event), event);
    });
    root.addEventListener("pointermove", (event) => {
      awake = true;
      const before = fingers.get(event.pointerId), now = at(event);
      if (!before) { if (event.pointerType === "mouse") hover(nearestTo(event), event); return; }
      fingers.set(event.pointerId, now);
      if (fingers.size === 2) {
        const [[ax, ay], [bx, by]] = [...fingers.values()];
        const apart = Math.hypot(ax - bx, ay - by);
        if (pinch) { hideTip(); magnify(apart / pinch, (ax + bx) / 2, (ay + by) / 2); }
        pinch = apart;
        return;
      }
      travelled += Math.hypot(now[0] - before[0], now[1] - before[1]);
      if (travelled > 4 && view.zoom > 1) {
        if (!root.hasPointerCapture(event.pointerId)) root.setPointerCapture(event.pointerId);
        hover(-1);
        pan(now[0] - before[0], now[1] - before[1]);
      }
    });
    const lift = (event) => { fingers.delete(event.pointerId); pinch = 0; };
    root.addEventListener("pointerup", lift);
    root.addEventListener("pointercancel", lift);
    root.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") { lift(event); hover(-1); } });
    root.addEventListener("click", (event) => {
      if (travelled > 4 || event.pointerType === "touch") return;
      const i = nearestTo(event);
      if (i < 0 || !IMAGES[map.points[i][3]]) return;
      const [, , c, image] = map.points[i];
      openLarge([{number: image, name: map.names[c], more: [wrong.has(i) ? `nearest image: ${bidi(wrong.get(i))}` : null]}], 0, null);
    });
    root.addEventListener("dblclick", (event) => magnify(2, ...at(event)));
    root.addEventListener("keydown", (event) => {
      const act = {"+": () => magnify(1.6), "=": () => magnify(1.6), "-": () => magnify(1 / 1.6), "0": all,
        ArrowLeft: () => pan(60, 0), ArrowRight: () => pan(-60, 0), ArrowUp: () => pan(0, 60), ArrowDown: () => pan(0, -60)}[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      if (view.zoom === 1 && event.key.startsWith("Arrow")) return;
      event.preventDefault();
      hover(-1);
      act();
    });
    root.append(layer, pictures);
    redraw();
  });
  if (map.neighbours !== undefined) {
    host.append(el("p", {class: "note space"}, `Of ${percent(map.neighbours)} of these images the nearest on the map is among their ten nearest in the embedding.`
      + (wrong.size ? ` Errors: the ${wrong.size.toLocaleString("en")} of ${map.points.length.toLocaleString("en")} whose nearest image, among all that are searched, is of another class.` : "")));
  }
}

// --- what methods learned ------------------------------------------------------------------------

const kinds = {
  "class-values": (host, part) => {
    const grid = el("div", {class: "charts wide"});
    host.append(grid);
    scatter(grid, {title: `all ${part.classes.toLocaleString("en")} classes, ranked`, note: `epoch ${part.epoch}`,
      points: part.ranked, xName: "rank", yName: part.value, joined: true});
    if (part.course) {
      const q = part.course.quantiles, epochs = part.course.epochs;
      const row = (values, name, c, dash) => ({name, colour: c, dash, points: epochs.map((e, i) => [e, values[i]])});
      lineChart(grid, {title: `how the ${part.value}s moved`, note: "band: 80 % of the classes", height: 230, xName: "epoch",
        band: epochs.map((e, i) => [e, q[1][i], q[3][i]]),
        series: [row(q[2], "median", "var(--ink)"), row(q[0], "smallest", "var(--soft)", "4 3"), row(q[4], "largest", "var(--soft)", "4 3"),
          ...part.course.lines.map((l, i) => row(l.values, l.name, colour(i)))]});
    }
    for (const s of part.scatters) {
      scatter(grid, {title: `${s.y} against ${s.x}`, note: `rank correlation ${s.correlation.toFixed(2)} [${s.low.toFixed(2)}, ${s.high.toFixed(2)}]`, points: s.points, xName: s.x, yName: s.y});
    }
    const table = (title, rows) => el("div", {class: "card scroll"}, el("b", {}, title), el("table", {class: "ranked"},
      headRow(["images", "class", part.value, ...(rows[0].spread === null ? [] : ["spread"]), ...(rows[0].nearest === null ? [] : ["nearest proxy"])]),
      el("tbody", {}, rows.map((r) => el("tr", {}, el("td", {}, r.images.map((i) => picture(i, r.name))), el("td", {}, el("span", {class: "named"}, named(r.name))),
        el("td", {}, figures(r.value)), rows[0].spread === null ? null : el("td", {}, r.spread === null ? "–" : figures(r.spread)),
        rows[0].nearest === null ? null : el("td", {}, figures(r.nearest)))))));
    host.append(el("div", {class: "two"}, table(`largest ${part.value}s`, part.largest), table(`smallest ${part.value}s`, part.smallest)),
      el("p", {class: "note space"}, "Spread: 1 − mean cosine of the class's training images to their mean direction, by the best network. Nearest proxy: cosine to the closest other class's proxy."));
  },
  pairs: (host, part) => {
    host.append(el("div", {class: "pairs"}, part.pairs.map((pair) => el("div", {class: "card pair"},
      el("div", {class: "who"}, named(pair.names[0]), " ↔ ", named(pair.names[1])), el("div", {class: "how"}, `cosine ${show(pair.value)}`),
      el("div", {class: "duos"}, pair.images.map((side, i) => el("div", {class: "duo"}, side.map((n) => picture(n, pair.names[i])))))))));
    const grid = el("div", {class: "charts wide space"});
    host.append(grid);
    bars(grid, {title: part.histogram_of, ...part.histogram, xName: "cosine", value: (v) => counted(v, "class", "classes")});
  },
  courses: (host, part, run) => columnCharts(host, part.columns, run),
  certainty: (host, part) => {
    const strip = (title, cells) => el("div", {class: "card"}, el("b", {}, title),
      el("div", {class: "strip space"}, cells.map((c) => el("div", {
        onpointermove: (event) => showTip(event, imageTip(c.image), el("b", {}, c.name), line(null, "uncertainty", show(c.value))), onpointerleave: hideTip},
        picture(c.image, c.name), el("b", {}, show(c.value)), el("span", {}, c.name)))));
    host.append(el("div", {class: "two"}, strip("least certain", part.least), strip("most certain", part.most)));
    const grid = el("div", {class: "charts wide space"});
    host.append(grid);
    bars(grid, {title: "uncertainty of all images", ...part.histogram, xName: "length of the uncertainty", value: (v) => counted(v, "image")});
    if (part.quintiles.length) {
      bars(grid, {title: "R@1 by certainty, %", note: "does it know when it errs?", counts: part.quintiles.map((v) => 100 * v),
        labels: ["surest fifth", "2nd", "3rd", "4th", "least sure"], value: (v) => percent(v / 100)});
    }
  },
  norms: (host, part, run) => {
    const grid = el("div", {class: "charts wide"});
    host.append(grid);
    bars(grid, {title: "lengths of the evaluation images' embeddings", ...part.histogram, xName: "length", value: (v) => counted(v, "image")});
    columnCharts(grid, part.columns, run, true);
  },
  masks: (host, part) => {
    const count = part.rows.length, size = part.rows[0].length;
    const canvas = el("canvas", {class: "masks", width: size, height: count, role: "img", "aria-label": "masks"});
    canvas.style.height = `${Math.max(70, Math.min(360, count * 26))}px`;
    const pixels = canvas.getContext("2d").createImageData(size, count);
    part.rows.flat().forEach((v, i) => pixels.data.set([...ramp(Math.max(0, v) / 99), 255], 4 * i));
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const c = Math.min(count - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * count)));
      const d = Math.min(size - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * size)));
      showTip(event, el("b", {}, `cluster ${c}, dimension ${d}`), el("div", {}, show(part.rows[c][d] / 99 * part.most)));
    });
    canvas.addEventListener("pointerleave", hideTip);
    host.append(el("figure", {class: "chart"}, el("figcaption", {}, el("b", {}, `${count} mask${count > 1 ? "s" : ""} of ${size} dimensions`),
      el("span", {}, `dark 0, light ${show(part.most)}`)), canvas));
    if (count > 1 && count <= 12) {
      host.append(el("div", {class: "card scroll space"}, el("b", {}, "cosines between the masks"), el("table", {},
        headRow(["mask of", ...part.cosines.map((_, i) => `cluster ${i}`)]), el("tbody", {}, part.cosines.map((r, i) => el("tr", {}, el("td", {}, `cluster ${i}`), r.map((v) => el("td", {}, v.toFixed(2)))))))));
    }
  },
  clusters: (host, part) => {
    const grid = el("div", {class: "charts wide"});
    host.append(grid);
    bars(grid, {title: "images in each cluster", counts: part.clusters.map((c) => c.size), labels: part.clusters.map((c) => String(c.cluster)),
      xName: "cluster", value: (v) => counted(v, "image")});
    host.append(el("div", {class: "pairs space"}, part.clusters.map((c) => el("div", {class: "card pair"},
      el("div", {class: "who"}, `cluster ${c.cluster}`),
      el("div", {class: "how"}, [counted(c.size, "image"), c.class_count ? ` of ${counted(c.class_count, "class", "classes")}` : ""].join("")),
      el("div", {class: "strip"}, c.classes.slice(0, 8).map((k) => el("div", {}, k.images.map((i) => picture(i, k.name)), el("b", {}, k.size), el("span", {title: k.name}, k.name))))))));
  },
};

const STOPS = [[14, 20, 52], [38, 92, 130], [63, 165, 137], [243, 232, 110]];
function ramp(v) {
  const at = Math.min(0.9999, v) * (STOPS.length - 1), i = Math.floor(at), t = at - i;
  return STOPS[i].map((a, k) => Math.round(a + (STOPS[i + 1][k] - a) * t));
}

// Charts of columns of metrics.csv for one run; `flat`: directly in `host`, without a grid of their own.
function columnCharts(host, columns, run, flat) {
  const grid = flat ? host : el("div", {class: "charts"});
  if (!flat) host.append(grid);
  for (const column of columns) {
    const values = (run.columns[column] || []).map((y, i) => [run.across.epoch[i], y]).filter((p) => p[1] !== null);
    if (values.length > 1) {
      lineChart(grid, {title: column, series: [{name: column, colour: colour(RUNS.indexOf(run)), points: values}], xName: "epoch"});
    }
  }
}

function drawMethods(host, run) {
  for (const part of run.sections || []) {
    const box = el("section", {"data-kind": part.kind}, el("h2", {}, part.title), el("p", {class: "about"}, part.about),
      (part.said || []).length ? el("ul", {class: "said"}, part.said.map((words) => el("li", {}, words))) : null);
    host.append(box);
    kinds[part.kind](box, part, run);
  }
}

const PARTS = {galleries: drawGalleries, confusions: drawConfusions, pairs: drawPairs, methods: drawMethods, map: drawMap};

function drawRun() {
  hideTip();
  for (const [name, draw] of Object.entries(PARTS)) {
    const host = document.getElementById(`${name}-here`);
    if (!host) continue;
    host.replaceChildren();
    draw(host, RUNS[current]);
  }
  for (const b of document.querySelectorAll("[data-choose]")) {
    b.setAttribute("aria-pressed", String(Number(b.dataset.choose) === current));
  }
}

// --- the whole page ------------------------------------------------------------------------------

function sortable(table) {
  const heads = [...table.querySelectorAll("th[data-sort]")];
  const onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.currentTarget.click(); } };
  // Not a <button>, whose text is left out when a table is copied.
  heads.forEach((head) => head.append(el("span", {role: "button", tabindex: "0", onkeydown}, ...head.childNodes)));
  heads.forEach((head) => head.addEventListener("click", () => {
    const column = head.cellIndex, before = head.getAttribute("aria-sort");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows];
    const numeric = rows.every((r) => key(r) === "" || !Number.isNaN(Number(key(r))));
    // The first click sorts numbers from the highest, words from A.
    const up = before ? before === "descending" : !numeric;
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    rows.sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", {numeric: true});
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }));
}

// Lets the keyboard scroll a box whose content is wider than the box.
function reachable(box) {
  const heading = box.closest("section").querySelector("h2").textContent;
  new ResizeObserver(() => {
    const wider = box.scrollWidth > box.clientWidth;
    for (const [name, value] of Object.entries({tabindex: "0", role: "region", "aria-label": heading})) {
      if (wider) box.setAttribute(name, value); else box.removeAttribute(name);
    }
  }).observe(box);
}

const system = window.matchMedia("(prefers-color-scheme: dark)");
const theme = (dark) => document.documentElement.setAttribute("data-theme", dark ? "dark" : "light");
theme(system.matches);
system.addEventListener("change", (event) => theme(event.matches));
for (const b of document.querySelectorAll("[data-theme-switch]")) {
  b.addEventListener("click", () => theme(document.documentElement.getAttribute("data-theme") !== "dark"));
}
for (const b of document.querySelectorAll("[data-toggle]")) {
  b.addEventListener("click", () => {
    const i = Number(b.dataset.toggle);
    if (!shown.delete(i)) shown.add(i);
    b.setAttribute("aria-pressed", String(shown.has(i)));
    redraws.forEach((redraw) => redraw());
  });
}
for (const b of document.querySelectorAll("[data-choose]")) {
  b.addEventListener("click", () => { current = Number(b.dataset.choose); drawRun(); });
}
for (const dot of document.querySelectorAll("[data-run]")) {
  const i = Number(dot.dataset.run);
  dot.append(stretch({colour: colour(i), dash: dashes(i)}));
}
document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll(".scroll:not(:has(button))").forEach(reachable);
window.addEventListener("scroll", hideTip, {passive: true});
if (RUNS.length) { drawCurves(); drawRun(); }
document.documentElement.setAttribute("data-ready", "");
})();
