"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const SIGNS = {same: "✓", unsure: "?", different: "×"};
const BY_STATUS = { // sentences for errors of a proxy, which come without ours
  413: "The proxy before the server takes no picture of this size; save it smaller.",
  502: "The server does not answer the proxy before it; is it still running?",
  504: "The server took longer than the proxy before it waits; try again.",
};
const WHOLE = [0, 0, 1, 1];
const SMALLEST_DRAG = 8; // pixels; less is a click

let facts = null; // of /api/info
let query = null; // {blob, name, crop} or {entry, crop}
const VISIT = performance.timeOrigin; // the browser's history may contain states before a reload
const queries = []; // all queries of this visit, for the browser's Back
let running = null; // the AbortController of the present request
let turn = 0; // counts queries, and files that are being read to become one

// --- elements ------------------------------------------------------------------------------------

// Texts become text nodes, so that no name can be taken for HTML.
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
// Words for screen readers.
const unseen = (words) => el("span", {class: "unseen"}, words);
// A name that may be broken after a / or a _.
const breakable = (name) => (name.match(/[^/_]+[/_]*|[/_]+/g) || []).flatMap((part) => [part, el("wbr")]);
const count = (number, word) => `${number.toLocaleString("en")} ${number === 1 ? word : `${word}s`}`;
const among = (which, looked, of) => (looked < of ? ` of the ${looked.toLocaleString("en")} ${which}` : "");
const cosine = (value) => value.toFixed(3);
// An address relative to this page, because a proxy may serve it below a path.
const fromHere = (address) => address.replace(/^\//, "");

// --- requests ------------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(sentence, status) {
    super(sentence);
    this.status = status;
  }
}

async function request(address, options) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer. Is `python search.py serve` still running?");
  }
  let content = null;
  try { content = await answer.json(); } catch (error) { if (error.name === "AbortError") throw error; }
  if (answer.ok && content !== null) return content;
  const sentence = content && content.error;
  const said = sentence ? `${sentence[0].toUpperCase()}${sentence.slice(1)}.` : BY_STATUS[answer.status];
  throw new Refusal(said || `The server answered ${answer.status}.`, answer.status);
}

// Runs `work`, which is stopped when newer work begins.
async function working(words, work) {
  if (running) running.abort();
  const own = running = new AbortController();
  $("busy").hidden = false;
  $("status").textContent = words;
  $("trouble").replaceChildren();
  $("neighbours").setAttribute("aria-busy", "true");
  try {
    await work(own.signal);
  } catch (error) {
    if (own === running && error.name !== "AbortError") {
      $("status").textContent = "";
      $("legend").textContent = "";
      $("neighbours").replaceChildren();
      // An entry that was removed from the index will not come back.
      const removed = error.status === 404 && query && query.entry;
      showError(error.message, removed ? ["Show the index", () => begin(null)] : ["Try again", refresh]);
    }
    if (!(error instanceof Refusal) && error.name !== "AbortError") throw error;
  } finally {
    if (own === running) {
      running = null;
      $("busy").hidden = true;
      $("neighbours").setAttribute("aria-busy", "false");
    }
  }
}

// Shows an error; `remedy` is [words, function] of a button.
function showError(sentence, remedy) {
  const buttons = remedy ? [el("button", {type: "button", onclick: remedy[1]}, remedy[0])] : [];
  $("trouble").replaceChildren(el("p", {}, sentence), ...buttons);
  $("trouble").scrollIntoView({block: "nearest"});
}

const refresh = () => (query ? search() : browse());

// --- searching -----------------------------------------------------------------------------------

function search() {
  const chosen = query;
  return working("Searching …", async (signal) => {
    const parameters = new URLSearchParams({top: $("top").value, label: $("label").value.trim()});
    if (chosen.crop) parameters.set("crop", chosen.crop.map((edge) => edge.toFixed(4)).join(","));
    if (chosen.entry) {
      parameters.set("entry", chosen.entry.row);
      parameters.set("check", chosen.entry.check);
    }
    const body = chosen.blob || null;
    const answer = await request(`api/search?${parameters}`, {method: "POST", body, signal});
    show(answer, parameters.get("label"));
  });
}

function show(answer, label) {
  const found = answer.neighbours;
  showCount(answer.entries);
  const seconds = answer.seconds < 0.1 ? "in less than 0.1 s" : `in ${answer.seconds.toFixed(1)} s`;
  $("found-title").textContent = "Nearest pictures";
  if (found.length) {
    const counts = ["same", "unsure", "different"].map((word) =>
      [word, found.filter((one) => one.verdict === word).length]);
    const said = answer.thresholds ? `: ${counts.filter(([, n]) => n).map(([word, n]) => `${n} ${word}`).join(", ")}` : "";
    $("status").textContent = `${count(found.length, "picture")} of ${answer.entries.toLocaleString("en")} ${seconds}${said}`;
  } else if (label) {
    $("status").textContent = `No picture${among("nearest", answer.looked_at, answer.entries)} has “${label}” in its label or name.`;
  } else {
    $("status").textContent = "The index holds no other picture.";
  }
  explain(found.length > 0, answer.thresholds);
  $("neighbours").replaceChildren(...found.map(card));
}

const percent = (rate) => `${Number((100 * rate).toPrecision(2))} %`;

// Says what the verdicts mean, and how often they are expected to be wrong.
function explain(any, limits) {
  if (!any) { $("legend").textContent = ""; return; }
  if (!limits) {
    $("legend").textContent = "Scores are cosines, 1 for the same picture. This index has no threshold, so nothing is called same or different.";
    return;
  }
  const wrong = (rate, pairs, queries) =>
    (rate === null ? "" : ` (wrong for ${percent(rate)} of the ${limits.searched === null ? pairs : queries})`);
  const same = limits.same === null
    ? "Nothing but the same file is called same, because too few pictures were measured to tell in an index of this size"
    : `Same: ${cosine(limits.same)} or more${wrong(limits.false_same, "pairs that differ", "queries with nothing of their kind here")}`;
  const different = `different: less than ${cosine(limits.different)}${wrong(limits.false_different, "pairs that match", "queries with something of their kind here")}`;
  $("legend").textContent = `Scores are cosines. ${same}; ${different}; between them, unsure.${limits.doubt ? ` ${limits.doubt}` : ""}`;
}

function thumbnail(entry) {
  const none = () => el("span", {class: "thumb none"}, `${entry.name} cannot be shown`);
  if (entry.gone) return el("span", {class: "thumb none"}, `${entry.name} is gone`);
  const image = el("img", {class: "thumb", src: fromHere(entry.thumbnail), alt: "", loading: "lazy", decoding: "async", draggable: "false"});
  image.addEventListener("error", () => image.replaceWith(none()));
  return image;
}

const verdict = (entry) => (entry.verdict && entry.same_file ? "same file" : entry.verdict);

function card(entry) {
  const scored = entry.cosine !== undefined;
  const title = titleOf({entry});
  const called = scored && entry.verdict
    ? el("span", {class: `verdict ${entry.verdict}`}, unseen(", "), el("span", {"aria-hidden": "true"}, `${SIGNS[entry.verdict]} `), verdict(entry)) : null;
  return el("li", {},
    el("button", {
      type: "button", class: `neighbour ${scored && entry.verdict ? `is-${entry.verdict}` : ""}`, title: entry.id,
      onclick: () => begin({entry, crop: null}),
    },
    thumbnail(entry),
    el("b", {}, ...breakable(title)),
    ...(entry.label === null ? [] : [unseen(", "), el("span", {class: "name"}, entry.name)]),
    scored ? el("span", {class: "score"}, el("span", {}, unseen(", cosine "), cosine(entry.cosine)), called) : null,
    unseen("; search on from here")));
}

// Shows pictures of the index, before anything is searched for.
function browse() {
  const label = $("label").value.trim();
  return working("Looking …", async (signal) => {
    const parameters = new URLSearchParams({count: $("top").value, label});
    const {entries, of, looked_at} = await request(`api/entries?${parameters}`, {signal});
    showCount(of);
    $("found-title").textContent = "Pictures of the index";
    const some = label ? `with “${label}” in their label or name` : "from all over the index";
    if (entries.length) $("status").textContent = `${count(entries.length, "picture")} ${some}. Choose one to search from it.`;
    else if (label) $("status").textContent = `No picture${among("first", looked_at, of)} has “${label}” in its label or name.`;
    else $("status").textContent = "The index is empty. Add pictures to it with `python search.py add`.";
    $("legend").textContent = "";
    $("neighbours").replaceChildren(...entries.map(card));
  });
}

// --- the query -----------------------------------------------------------------------------------

// Searches from a picture or an entry; null shows the index.
function begin(chosen) {
  queries.push(chosen);
  history.pushState({visit: VISIT, query: queries.length - 1, entry: chosen?.entry}, "");
  take(chosen);
  // The element with the focus is about to be replaced.
  if (!chosen?.blob) { window.scrollTo({top: 0}); $("found-title").focus({preventScroll: true}); }
}

// The query of a state in the browser's history. A picture that was given before a reload is lost.
function queryAt(state) {
  if (state && state.visit === VISIT) return queries[state.query];
  return state && state.entry ? {entry: state.entry, crop: null} : null;
}

function take(chosen) {
  query = chosen;
  turn += 1;
  drag = null;
  $("hint").hidden = chosen !== null;
  $("shown").hidden = chosen === null;
  if (chosen !== null) picture(chosen);
  entitle(chosen);
  drawCrop();
  return refresh();
}

const titleOf = ({entry, name}) => (entry ? entry.label ?? entry.name : name);

// Sets the window's title, by which the browser's history lists the queries.
function entitle(chosen) {
  document.title = [chosen && titleOf(chosen), facts && facts.name, "search by picture"].filter(Boolean).join(" · ");
}

function picture(chosen) {
  const image = $("picture");
  const entry = chosen.entry;
  const title = titleOf(chosen);
  const more = entry ? (entry.label === null ? "of the index" : `${entry.name}, of the index`) : "your picture";
  $("what").replaceChildren(el("b", {}, title), el("span", {}, more));
  image.alt = `The query: ${title}`;
  const gone = Boolean(entry && entry.gone);
  canCrop(!gone);
  $("stage").hidden = gone;
  $("unshown").hidden = true;
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  if (gone) image.removeAttribute("src");
  else image.src = entry ? fromHere(entry.image) : URL.createObjectURL(chosen.blob);
}

function canCrop(yes) {
  for (const id of ["how", "edges"]) $(id).hidden = !yes;
  $("stage").classList.toggle("fixed", !yes);
}

$("picture").addEventListener("load", () => {
  const {naturalWidth: width, naturalHeight: height, classList} = $("picture");
  const small = Math.max(width, height) < 120; // too small to drag over
  classList.toggle("wider", small && width >= height);
  classList.toggle("higher", small && width < height);
});
$("picture").addEventListener("error", () => {
  if (!$("picture").hasAttribute("src")) return;
  $("stage").hidden = true;
  $("unshown").hidden = false;
  canCrop(false);
});

async function upload(files) {
  const file = Array.from(files).find((one) => one.type.startsWith("image/") || one.type === "");
  if (!file) return showError("This is not a picture. Give a file such as a JPEG or a PNG.");
  if (facts && file.size > facts.most_bytes) {
    const [have, most] = [file.size, facts.most_bytes].map((size) => Math.round(size / 1e6));
    return showError(`${file.name} has ${have} MB, and at most ${most} MB are accepted. Save it smaller.`);
  }
  if (file.size === 0) return showError(`${file.name} is empty. Choose another file.`);
  const own = turn += 1;
  // Read now, because the file may change or be deleted later, and because a folder fails here.
  const content = await file.arrayBuffer().catch(() => null);
  if (own !== turn) return null; // something else was chosen meanwhile
  if (content === null) return showError(`${file.name} cannot be read. Give a file that exists, not a folder.`);
  return begin({blob: new Blob([content], {type: file.type}), name: file.name || "pasted picture", crop: null});
}

for (const id of ["choose", "take"]) {
  $(id).addEventListener("change", (event) => {
    if (event.target.files.length) upload(event.target.files);
    event.target.value = ""; // so that the same file can be chosen again
  });
}

document.addEventListener("paste", (event) => {
  const {files, types} = event.clipboardData || {files: [], types: []};
  // Spreadsheets and word processors copy text with a picture of it: the field needs the text.
  const wanted = event.target !== $("label") || !types.includes("text/plain");
  if (files.length && wanted) { event.preventDefault(); upload(files); }
});

const carries = (event, kind) => Array.from(event.dataTransfer.types).includes(kind);
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  event.dataTransfer.dropEffect = carries(event, "Files") ? "copy" : "none";
  $("over").hidden = !carries(event, "Files");
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("over").hidden = true; });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("over").hidden = true;
  if (event.dataTransfer.files.length) upload(event.dataTransfer.files);
  else showError("Nothing is fetched from other pages. Save the picture, and drop its file.");
});

window.addEventListener("popstate", (event) => take(queryAt(event.state)));

// --- the crop ------------------------------------------------------------------------------------

const edges = Array.from(document.querySelectorAll("[data-edge]"));

function drawCrop() {
  const crop = query && query.crop;
  const box = $("crop");
  box.hidden = !crop;
  $("uncrop").hidden = !crop;
  const [left, top, right, bottom] = crop || WHOLE;
  for (const [name, share] of [["left", left], ["top", top], ["width", right - left], ["height", bottom - top]]) {
    box.style.setProperty(name, `${100 * share}%`);
  }
  for (const [number, input] of edges.entries()) {
    const value = Math.round(100 * (crop || WHOLE)[number]);
    input.value = value;
    input.nextElementSibling.textContent = `${value} %`;
    input.setAttribute("aria-valuetext", `${value} %`);
  }
}

function setCrop(crop) {
  query.crop = crop;
  drawCrop();
}

// The place of a pointer, as shares of the picture's width and height.
function place(event) {
  const box = $("picture").getBoundingClientRect();
  const share = (value) => Math.min(1, Math.max(0, value));
  return [share((event.clientX - box.left) / box.width), share((event.clientY - box.top) / box.height)];
}

let drag = null; // {id, from: [x, y], start: [clientX, clientY], before, moved}

$("stage").addEventListener("pointerdown", (event) => {
  if (!query || event.button !== 0 || drag || $("stage").classList.contains("fixed")) return;
  event.preventDefault();
  $("stage").setPointerCapture(event.pointerId);
  drag = {id: event.pointerId, from: place(event), start: [event.clientX, event.clientY], before: query.crop, moved: false};
});
$("stage").addEventListener("pointermove", (event) => {
  if (!drag || event.pointerId !== drag.id) return;
  drag.moved = drag.moved || Math.hypot(event.clientX - drag.start[0], event.clientY - drag.start[1]) >= SMALLEST_DRAG;
  if (!drag.moved) return;
  const [x0, y0] = drag.from, [x1, y1] = place(event);
  const crop = [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
  if (crop[2] - crop[0] >= 0.01 && crop[3] - crop[1] >= 0.01) setCrop(crop);
});
$("stage").addEventListener("pointerup", (event) => {
  if (!drag || event.pointerId !== drag.id) return;
  const changed = query.crop !== drag.before;
  drag = null;
  if (changed) search();
});
function stopDrag() {
  if (!drag) return;
  const before = drag.before;
  drag = null;
  setCrop(before);
}
$("stage").addEventListener("pointercancel", stopDrag);

for (const [number, input] of edges.entries()) {
  input.addEventListener("input", () => {
    const crop = [...(query.crop || WHOLE)];
    const value = Number(input.value) / 100;
    // An edge stops before the opposite one.
    crop[number] = number < 2 ? Math.min(value, crop[number + 2] - 0.01) : Math.max(value, crop[number - 2] + 0.01);
    setCrop(crop.every((edge, i) => Math.abs(edge - WHOLE[i]) < 1e-6) ? null : crop);
    later(refresh);
  });
}

$("uncrop").addEventListener("click", () => {
  setCrop(null);
  $("choose").focus();
  search();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (drag) stopDrag();
  else if (query && query.crop && document.activeElement !== $("label")) { setCrop(null); search(); }
});

// --- the form ------------------------------------------------------------------------------------

let waiting = 0;
function later(work) { // after the last of several changes
  clearTimeout(waiting);
  waiting = setTimeout(work, 350);
}
$("top").addEventListener("change", refresh);
$("label").addEventListener("input", () => later(refresh));
$("form").addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(waiting); refresh(); });

// --- light and dark ------------------------------------------------------------------------------

const system = window.matchMedia("(prefers-color-scheme: dark)");
const theme = (dark) => document.documentElement.setAttribute("data-theme", dark ? "dark" : "light");
theme(system.matches);
system.addEventListener("change", (event) => theme(event.matches));
$("theme").addEventListener("click", () => theme(document.documentElement.getAttribute("data-theme") !== "dark"));

// --- the start -----------------------------------------------------------------------------------

// The index may grow while the page is open.
function showCount(entries) {
  if (!facts) return;
  $("about").textContent = `${facts.name}: ${count(entries, "picture")}. What you search for stays on the machine that serves this page, and is not kept.`;
}

async function start() {
  try {
    facts = await request("api/info");
    showCount(facts.entries);
    document.documentElement.setAttribute("data-upright", facts.upright ? "yes" : "no");
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
  }
  await take(queryAt(history.state));
  document.documentElement.setAttribute("data-ready", "");
}
start();
})();
