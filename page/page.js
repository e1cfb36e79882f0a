"use strict";
(() => {
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs || [];
const IMAGES = DATA.images || [];
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
const show = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e5)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
};
const percent = (value) => `${(100 * value).toFixed(1)} %`;

function picture(number, name) {
  const source = IMAGES[number];
  if (!source) return el("span", {class: "thumb none"}, name);
  return el("img", {class: "thumb", src: source, alt: name, decoding: "async"});
}

// --- the tip that follows the pointer ------------------------------------------------------------

const tip = document.body.appendChild(el("div", {id: "tip", hidden: "", role: "status"}));

function tell(event, ...content) {
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
const hush = () => { tip.hidden = true; };
const line = (swatch, name, value) => el("div", {class: "line"},
  swatch ? el("span", {class: "dot", style: {background: swatch}}) : null,
  el("span", {}, name), el("span", {}, value));
const imageTip = (number) => (IMAGES[number] ? el("img", {src: IMAGES[number], alt: ""}) : null);

// --- axes ----------------------------------------------------------------------------------------

function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) {
    found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  }
  return found;
}
function logTicks(low, high) {
  const found = [];
  for (let p = Math.ceil(Math.log10(low) - 1e-9); p <= Math.log10(high) + 1e-9; p += 1) found.push(10 ** p);
  return found.length ? found : [low];
}
function extent(values, around) {
  let low = Infinity, high = -Infinity;
  for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  if (low === high) { const pad = Math.abs(low) * 0.1 || 1; return [low - pad, high + pad]; }
  const pad = (high - low) * around;
  return [low - pad, high + pad];
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

function axes(root, box, x, y, options) {
  const yt = options.log ? logTicks(...y) : ticks(y[0], y[1], 4);
  for (const value of yt) {
    const at = box.y(value);
    if (at < box.top - 1 || at > box.bottom + 1) continue;
    root.append(svg("line", {class: "grid", x1: box.left, x2: box.right, y1: at, y2: at}),
      svg("text", {x: box.left - 6, y: at + 4, "text-anchor": "end"}, show(value)));
  }
  for (const value of ticks(x[0], x[1], Math.max(2, Math.floor((box.right - box.left) / 70)))) {
    if (options.whole && value % 1 !== 0) continue;
    root.append(svg("text", {x: box.x(value), y: box.bottom + 16, "text-anchor": "middle"}, show(value)));
  }
  if (options.xName) {
    root.append(svg("text", {x: box.right, y: box.bottom + 30, "text-anchor": "end"}, options.xName));
  }
}

function scale(width, height, x, y, log, below) {
  const box = {left: 48, right: width - 8, top: 8, bottom: height - (below || 22)};
  box.x = (v) => box.left + (v - x[0]) / (x[1] - x[0]) * (box.right - box.left);
  const f = log ? Math.log : (v) => v;
  box.y = (v) => box.bottom - (f(v) - f(y[0])) / (f(y[1]) - f(y[0])) * (box.bottom - box.top);
  return box;
}

// --- charts --------------------------------------------------------------------------------------

// series: {name, colour, points: [[x, y]], run, dash}; those of runs that are off are left out.
function lineChart(host, {title, note, series, xName, log, band, height = 178}) {
  const start = frame(host, title, note, height);
  return start((root, width) => {
    const visible = series.filter((s) => s.run === undefined || shown.has(s.run));
    const points = visible.flatMap((s) => s.points).filter((p) => p[1] !== null && (!log || p[1] > 0));
    const area = band ? band.flatMap((b) => [[b[0], b[1]], [b[0], b[2]]]) : [];
    if (!points.length) {
      root.append(svg("text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, "nothing to show"));
      return;
    }
    const all = [...points, ...area];
    let x = extent(all.map((p) => p[0]), 0);
    const y = log ? extent(all.map((p) => p[1]), 0).map((v, i) => (i ? v * 1.15 : Math.max(v / 1.15, 1e-30)))
      : extent(all.map((p) => p[1]), 0.06);
    const box = scale(width, height, x, y, log, xName ? 36 : 22);
    axes(root, box, x, y, {log, xName, whole: xName === "epoch" || xName === "step"});
    if (band) {
      const up = band.map((b) => `${box.x(b[0])},${box.y(b[2])}`);
      const down = band.slice().reverse().map((b) => `${box.x(b[0])},${box.y(b[1])}`);
      root.append(svg("polygon", {class: "band", points: [...up, ...down].join(" ")}));
    }
    for (const s of visible) {
      const kept = s.points.filter((p) => p[1] !== null && (!log || p[1] > 0));
      const path = kept.map((p) => `${box.x(p[0]).toFixed(1)},${box.y(p[1]).toFixed(1)}`).join(" ");
      const style = {stroke: s.colour};
      if (s.dash) style["stroke-dasharray"] = "4 3";
      root.append(svg("polyline", {class: "series", points: path, style}));
      if (kept.length < 25) {
        for (const p of kept) {
          root.append(svg("circle", {cx: box.x(p[0]), cy: box.y(p[1]), r: 2.4, style: {fill: s.colour}}));
        }
      }
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
      tell(event, el("b", {}, `${xName || ""} ${show(near)}`), lines);
    };
    pad.addEventListener("pointermove", move);
    pad.addEventListener("pointerdown", move);
    pad.addEventListener("pointerleave", () => { cursor.replaceChildren(); hush(); });
    root.append(cursor, pad);
  });
}

// points: [x, y, name, image]
function scatter(host, {title, note, points, xName, yName, joined, height = 230}) {
  frame(host, title, note, height)((root, width) => {
    const x = extent(points.map((p) => p[0]), 0.02), y = extent(points.map((p) => p[1]), 0.06);
    const box = scale(width, height, x, y, false, 36);
    axes(root, box, x, y, {xName});
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
      if (i < 0) { hush(); return; }
      const [px, py, name, image] = points[i];
      ring.setAttribute("cx", box.x(px));
      ring.setAttribute("cy", box.y(py));
      tell(event, imageTip(image), el("b", {}, name), line(null, xName, show(px)), line(null, yName, show(py)));
    });
    root.append(...dots, ring, pad);
  });
}

function nearest(pad, root, width, places, report) {
  const move = (event) => {
    const box = root.getBoundingClientRect(), factor = width / box.width;
    const x = (event.clientX - box.left) * factor, y = (event.clientY - box.top) * factor;
    let best = -1, least = 22 ** 2;
    places.forEach(([px, py], i) => {
      const d = (px - x) ** 2 + (py - y) ** 2;
      if (d < least) { least = d; best = i; }
    });
    report(best, event);
  };
  pad.addEventListener("pointermove", move);
  pad.addEventListener("pointerdown", move);
  pad.addEventListener("pointerleave", (event) => report(-1, event));
}

function bars(host, {title, note, counts, edges, labels, xName, value = (v) => `${v}`, height = 178}) {
  frame(host, title, note, height)((root, width) => {
    const most = Math.max(...counts, 1e-9) * 1.05;
    const x = edges ? [edges[0], edges[edges.length - 1]] : [0, counts.length];
    const box = scale(width, height, x, [0, most], false, xName ? 36 : 22);
    axes(root, box, edges ? x : [0, 0], [0, most], {xName});
    const step = (box.right - box.left) / counts.length;
    counts.forEach((count, i) => {
      const where = edges ? `${show(edges[i])} to ${show(edges[i + 1])}` : labels[i];
      const bar = svg("rect", {class: "bar", x: box.left + i * step + 0.5, width: Math.max(1, step - 1),
        y: box.y(count), height: Math.max(0, box.bottom - box.y(count))});
      bar.addEventListener("pointermove", (event) => tell(event, el("b", {}, where), el("div", {}, value(count))));
      bar.addEventListener("pointerleave", hush);
      root.append(bar);
      if (labels) {
        root.append(svg("text", {x: box.left + (i + 0.5) * step, y: box.bottom + 16, "text-anchor": "middle"}, labels[i]));
      }
    });
  });
}

// --- courses of all runs -------------------------------------------------------------------------

function seriesOf(column, across, factor) {
  return RUNS.map((run, i) => ({
    name: RUNS.length > 1 ? run.name : column, colour: colour(i), run: i,
    points: (run.columns[column] || []).map((y, row) => [run.across[across][row], y === null ? null : y * factor]).filter((p) => p[1] !== null),
  })).filter((s) => s.points.length);
}

function drawCourses() {
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
        const series = seriesOf(column, across, group.percent ? 100 : 1);
        const last = series.length === 1 ? series[0].points[series[0].points.length - 1][1] : null;
        redraws.push(lineChart(grid, {title: group.percent ? `${column}, %` : column, note: last === null ? "" : `last ${show(last)}`,
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
  const tabs = el("div", {class: "tabs", role: "tablist"});
  const about = el("p", {class: "about"});
  const rows = el("div", {class: "card scroll"});
  const open = (group, tab) => {
    for (const b of tabs.children) b.setAttribute("aria-selected", String(b === tab));
    about.textContent = group.about;
    rows.replaceChildren(...group.rows.map(galleryRow));
  };
  for (const group of groups) {
    const tab = el("button", {role: "tab", onclick: (event) => open(group, event.currentTarget)}, group.title);
    tabs.append(tab);
  }
  host.append(tabs, about, el("p", {class: "legend"},
    el("span", {}, el("i", {}), "right: the query's class"), el("span", {}, el("i", {class: "wrong"}), "wrong: another class"),
    el("span", {}, "below each: cosine to the query, class")), rows);
  open(groups[0], tabs.firstChild);
}

function galleryRow(row) {
  return el("div", {class: "row"},
    el("div", {class: "query"}, picture(row.image, row.name), el("span", {class: "name"}, row.name)),
    el("div", {class: "found"}, row.found.map((hit, i) => el("div", {
      class: hit.right ? "cell" : "cell wrong",
      onpointermove: (event) => tell(event, imageTip(hit.image), el("b", {}, hit.name),
        line(null, hit.right ? "right" : `wrong, wanted ${row.name}`, ""), line(null, "cosine", show(hit.cosine)), line(null, "place", i + 1)),
      onpointerleave: hush,
    }, el("div", {class: "frame"}, picture(hit.image, hit.name), el("span", {class: "mark"}, hit.right ? "✓" : "×")),
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
      el("div", {class: "who"}, `${pair.names[0]} ↔ ${pair.names[1]}`),
      el("div", {class: "how"}, `${pair.counts[0]} of ${pair.sizes[0]} taken for the second, ${pair.counts[1]} of ${pair.sizes[1]} for the first`),
      el("div", {class: "duos"}, pair.examples.map((e) => el("div", {class: "duo",
        onpointermove: (event) => tell(event, imageTip(e.query), el("b", {}, e.of), line(null, `taken for ${e.as}`, show(e.cosine))),
        onpointerleave: hush}, picture(e.query, e.of), "→", picture(e.found, e.as))))))));
  }
  host.append(el("h3", {}, "Classes that are found worst"));
  const grid = el("div", {class: "two"});
  host.append(grid);
  grid.append(el("div", {class: "card scroll"}, el("table", {class: "ranked"},
    el("thead", {}, el("tr", {}, el("th", {}, "images"), el("th", {}, "class"), el("th", {}, "R@1, %"), el("th", {}, "queries"))),
    el("tbody", {}, run.classes.lowest.map((c) => el("tr", {},
      el("td", {}, c.images.map((i) => picture(i, c.name))), el("td", {}, c.name),
      el("td", {}, (100 * c.score).toFixed(0)), el("td", {}, c.size)))))));
  const side = el("div", {});
  grid.append(side);
  if (run.classes.histogram.length) {
    bars(side, {title: "R@1 over the classes", note: "number of classes", counts: run.classes.histogram,
      edges: run.classes.histogram.map((_, i) => i * 10).concat(100), xName: "R@1 of a class, %", value: (v) => `${v} classes`, height: 240});
  }
}

function drawMap(host, run) {
  const map = run.map;
  if (!map || !map.points) { host.append(el("p", {class: "note"}, (map && map.note) || run.missing || "Too few images for a map.")); return; }
  const search = el("input", {type: "search", placeholder: "find a class", list: "map-classes", "aria-label": "find a class"});
  host.append(el("div", {class: "tabs"}, search, el("datalist", {id: "map-classes"}, map.names.map((n) => el("option", {value: n}))),
    el("span", {class: "note"}, map.note)));
  const phone = document.documentElement.clientWidth < 640;
  let mark = () => {};
  frame(host, "each point an image, each colour a class", "hover: the image and its class", phone ? 380 : 620)((root, width) => {
    const height = phone ? 380 : 620, dots = [], places = [];
    for (const [x, y, c] of map.points) {
      const px = 8 + x * (width - 16), py = 8 + (1 - y) * (height - 16);
      places.push([px, py]);
      dots.push(svg("circle", {class: "point", cx: px.toFixed(1), cy: py.toFixed(1), r: 4,
        style: {fill: `hsl(${(c * 137.508) % 360} ${58 + (c % 3) * 14}% ${44 + (c % 4) * 7}%)`}}));
    }
    mark = (wanted) => {
      const on = wanted >= 0;
      root.classList.toggle("dim", on);
      dots.forEach((dot, i) => dot.classList.toggle("on", on && map.points[i][2] === wanted));
    };
    const named = () => map.names.findIndex((n) => n.toLowerCase() === search.value.trim().toLowerCase());
    const pad = svg("rect", {class: "pad", x: 0, y: 0, width, height, fill: "transparent"});
    nearest(pad, root, width, places, (i, event) => {
      if (i < 0) { hush(); mark(named()); return; }
      const [, , c, image] = map.points[i];
      mark(c);
      tell(event, imageTip(image), el("b", {}, map.names[c]));
    });
    search.oninput = () => mark(named());
    root.append(...dots, pad);
  });
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
        series: [row(q[2], "median", "var(--ink)"), row(q[0], "smallest", "var(--soft)", true), row(q[4], "largest", "var(--soft)", true),
          ...part.course.lines.map((l, i) => row(l.values, l.name, colour(i)))]});
    }
    for (const s of part.scatters) {
      scatter(grid, {title: `${s.y} against ${s.x}`, note: `rank correlation ${s.correlation.toFixed(2)}`, points: s.points, xName: s.x, yName: s.y});
    }
    const table = (title, rows) => el("div", {class: "card scroll"}, el("b", {}, title), el("table", {class: "ranked"},
      el("thead", {}, el("tr", {}, el("th", {}, "images"), el("th", {}, "class"), el("th", {}, part.value),
        rows[0].spread === null ? null : el("th", {}, "spread"), rows[0].nearest === null ? null : el("th", {}, "nearest proxy"))),
      el("tbody", {}, rows.map((r) => el("tr", {}, el("td", {}, r.images.map((i) => picture(i, r.name))), el("td", {}, r.name),
        el("td", {}, show(r.value)), rows[0].spread === null ? null : el("td", {}, show(r.spread)),
        rows[0].nearest === null ? null : el("td", {}, show(r.nearest)))))));
    host.append(el("div", {class: "two"}, table(`largest ${part.value}s`, part.largest), table(`smallest ${part.value}s`, part.smallest)),
      el("p", {class: "note space"}, "Spread: 1 − mean cosine of the class's training images to their mean direction, by the best network. Nearest proxy: cosine to the closest other class's proxy."));
  },
  pairs: (host, part) => {
    host.append(el("div", {class: "pairs"}, part.pairs.map((pair) => el("div", {class: "card pair"},
      el("div", {class: "who"}, `${pair.names[0]} ↔ ${pair.names[1]}`), el("div", {class: "how"}, `cosine ${show(pair.value)}`),
      el("div", {class: "duos"}, pair.images.map((side, i) => el("div", {class: "duo"}, side.map((n) => picture(n, pair.names[i])))))))));
    const grid = el("div", {class: "charts wide space"});
    host.append(grid);
    bars(grid, {title: part.histogram_of, ...part.histogram, xName: "cosine", value: (v) => `${v} classes`});
  },
  courses: (host, part, run) => courses(host, part.columns, run),
  certainty: (host, part) => {
    const strip = (title, cells) => el("div", {class: "card"}, el("b", {}, title),
      el("div", {class: "strip space"}, cells.map((c) => el("div", {
        onpointermove: (event) => tell(event, imageTip(c.image), el("b", {}, c.name), line(null, "uncertainty", show(c.value))), onpointerleave: hush},
        picture(c.image, c.name), el("b", {}, show(c.value)), el("span", {}, c.name)))));
    host.append(el("div", {class: "two"}, strip("least certain", part.least), strip("most certain", part.most)));
    const grid = el("div", {class: "charts wide space"});
    host.append(grid);
    bars(grid, {title: "uncertainty of all images", ...part.histogram, xName: "length of the uncertainty", value: (v) => `${v} images`});
    if (part.quintiles.length) {
      bars(grid, {title: "R@1 by certainty", note: "does it know when it errs?", counts: part.quintiles,
        labels: ["surest fifth", "2nd", "3rd", "4th", "least sure"], value: percent});
    }
  },
  norms: (host, part, run) => {
    const grid = el("div", {class: "charts wide"});
    host.append(grid);
    bars(grid, {title: "lengths of the evaluation images' embeddings", ...part.histogram, xName: "length", value: (v) => `${v} images`});
    courses(grid, part.columns, run, true);
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
      tell(event, el("b", {}, `cluster ${c}, dimension ${d}`), el("div", {}, show(part.rows[c][d] / 99 * part.most)));
    });
    canvas.addEventListener("pointerleave", hush);
    host.append(el("figure", {class: "chart"}, el("figcaption", {}, el("b", {}, `${count} masks of ${size} dimensions`),
      el("span", {}, `dark 0, light ${show(part.most)}`)), canvas));
    if (count > 1 && count <= 12) {
      host.append(el("div", {class: "card scroll space"}, el("b", {}, "cosines between the masks"), el("table", {},
        el("tbody", {}, part.cosines.map((r, i) => el("tr", {}, el("td", {}, `cluster ${i}`), r.map((v) => el("td", {}, v.toFixed(2)))))))));
    }
  },
  clusters: (host, part) => {
    const grid = el("div", {class: "charts wide"});
    host.append(grid);
    bars(grid, {title: "images in each cluster", counts: part.clusters.map((c) => c.size), labels: part.clusters.map((c) => String(c.cluster)),
      xName: "cluster", value: (v) => `${v} images`});
    host.append(el("div", {class: "pairs space"}, part.clusters.map((c) => el("div", {class: "card pair"},
      el("div", {class: "who"}, `cluster ${c.cluster}`),
      el("div", {class: "how"}, c.class_count ? `${c.size} images of ${c.class_count} classes` : `${c.size} images`),
      el("div", {class: "strip"}, c.classes.slice(0, 8).map((k) => el("div", {}, k.images.map((i) => picture(i, k.name)), el("b", {}, k.size), el("span", {title: k.name}, k.name))))))));
  },
};

const STOPS = [[14, 20, 52], [38, 92, 130], [63, 165, 137], [243, 232, 110]];
function ramp(v) {
  const at = Math.min(0.9999, v) * (STOPS.length - 1), i = Math.floor(at), t = at - i;
  return STOPS[i].map((a, k) => Math.round(a + (STOPS[i + 1][k] - a) * t));
}

function courses(host, columns, run, flat) {
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
    const box = el("section", {"data-kind": part.kind}, el("h2", {}, part.title), el("p", {class: "about"}, part.about));
    host.append(box);
    kinds[part.kind](box, part, run);
  }
}

const PARTS = {galleries: drawGalleries, confusions: drawConfusions, methods: drawMethods, map: drawMap};

function drawRun() {
  hush();
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
  heads.forEach((head) => head.addEventListener("click", () => {
    const column = head.cellIndex, down = head.getAttribute("aria-sort") === "descending";
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows];
    const numeric = rows.every((r) => key(r) === "" || !Number.isNaN(Number(key(r))));
    rows.sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
      return down ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }));
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
for (const dot of document.querySelectorAll("[data-colour]")) dot.style.background = colour(Number(dot.dataset.colour));
document.querySelectorAll("table.sortable").forEach(sortable);
window.addEventListener("scroll", hush, {passive: true});
if (RUNS.length) { drawCourses(); drawRun(); }
document.documentElement.setAttribute("data-ready", "");
})();
