// The review page: slides, fields, one field. It keeps nothing but your name. The ledger is on the server.
"use strict";

const NAMES = {
  rbc_single: "single", rbc_overlapping: "overlapping", wbc: "white", platelet: "platelet", not_a_cell: "no cell",
};
const KEYS = { s: "rbc_single", o: "rbc_overlapping", w: "wbc", p: "platelet", x: "not_a_cell" };
const SVG = "http://www.w3.org/2000/svg";
const SHOWN_AT_ONCE = 200;
const main = document.getElementById("main");
const who = document.getElementById("who");
const state = { order: "flagged", filter: "", only: "all", plain: false, readOnly: false };
let field = null; // what the server said of the field that is shown
let neighbours = []; // names of the fields of the list, in its order
let chosen = 0; // number of the chosen cell
let adding = false;
let near = 0; // calls so near to the threshold are marked
let zoom = { k: 1, x: 0, y: 0 };
let keyHandler = null;
let lastExclude = false; // the last thing done here was to exclude the field

const say = (text) => { document.getElementById("said").textContent = text; };

// Builds an element. Text is always set as text: names come from folders that anyone may have named.
function make(tag, about = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(about)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...inside.filter((each) => each !== null && each !== ""));
  return element;
}

async function ask(path, values, body) {
  const query = new URLSearchParams(values || {}).toString();
  const about = body && {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(query ? `${path}?${query}` : path, about);
  } catch {
    throw new Error("the server does not answer: is `rbc-edge review` still running?");
  }
  const text = await answer.text();
  let value = null;
  try { value = JSON.parse(text); } catch { /* the guard answers in plain text */ }
  if (!answer.ok) throw new Error(value ? [value.error, value.advice].filter(Boolean).join(". ") : text.trim());
  return value;
}

const address = (...parts) => `#/${parts.map(encodeURIComponent).join("/")}`;
const number = (n, one) => `${n} ${one}${n === 1 ? "" : "s"}`;

function setPath(...links) {
  const nav = document.getElementById("path");
  nav.replaceChildren();
  links.forEach(([text, href], i) => {
    if (i) nav.append(" / ");
    nav.append(href ? make("a", { href }, text) : make("span", { "aria-current": "page" }, text));
  });
}

// -- slides ----------------------------------------------------------------------------------------------

async function showSlides() {
  const of = await ask("api/slides");
  state.readOnly = of.read_only;
  document.getElementById("read-only").hidden = !of.read_only;
  if (!who.value) who.value = of.who;
  setPath(["Slides", ""]);
  main.replaceChildren(make("h1", {}, "Slides"));
  if (!of.slides.length) main.append(make("p", {}, "No slide is counted yet."));
  main.append(make("ul", { class: "list" }, ...of.slides.map((s) => make("li", {},
    make("a", { href: address("slide", s.slide) }, make("b", {}, s.slide),
      make("span", {}, number(s.n_ok || 0, "field")),
      make("span", {}, `${s.n_rbc || 0} red cells`),
      s.n_flagged ? make("span", { class: "chip warn" }, `${s.n_flagged} flagged`) : "",
      s.n_failed ? make("span", { class: "chip warn" }, `${s.n_failed} failed`) : "",
      s.n_excluded ? make("span", { class: "chip" }, `${s.n_excluded} excluded`) : "",
      s.n_corrected ? make("span", { class: "chip" }, `${s.n_corrected} corrected`) : "",
      s.n_lost ? make("span", { class: "chip warn" }, `${number(s.n_lost, "correction")} without a cell`) : "",
      s.n_reviewed ? make("span", { class: "chip" }, `${s.n_reviewed} reviewed`) : "")))));
}

// -- the fields of a slide -------------------------------------------------------------------------------

const byName = (a, b) => a.fov.localeCompare(b.fov, undefined, { numeric: true });
const ORDERS = {
  flagged: ["flagged first", (f) => [-f.flags.length, -(f.crowding || 0)]],
  crowded: ["crowded first", (f) => [-(f.crowding || 0)]],
  doubtful: ["doubtful first", (f) => [-(f.n_doubtful || 0)]],
  name: ["by name", () => []],
};
const ONLY = {
  all: ["all", () => true],
  flagged: ["flagged", (f) => f.flags.length > 0],
  open: ["not reviewed", (f) => f.status === "ok" && !f.reviewed],
  corrected: ["corrected", (f) => f.n_corrected + f.n_lost > 0],
  out: ["excluded or failed", (f) => f.status !== "ok"],
};

function inOrder(fields) {
  const key = ORDERS[state.order][1];
  const wanted = state.filter.toLowerCase();
  return fields
    .filter((f) => ONLY[state.only][1](f) && f.fov.toLowerCase().includes(wanted))
    .sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      for (let i = 0; i < x.length; i++) if (x[i] !== y[i]) return x[i] - y[i];
      return byName(a, b);
    });
}

function choice(label, options, name, redraw) {
  const select = make("select", { onchange: () => { state[name] = select.value; redraw(); } },
    ...Object.entries(options).map(([value, [text]]) =>
      make("option", { value, selected: state[name] === value }, text)));
  return make("label", {}, `${label} `, select);
}

async function showFields(slide) {
  const { fields } = await ask("api/fields", { slide });
  setPath(["Slides", "#/"], [slide, ""]);
  const list = make("ul", { class: "list", id: "fields" });
  const told = make("p", {});
  let most = SHOWN_AT_ONCE;
  const more = make("button", { onclick: () => { most += SHOWN_AT_ONCE; draw(); } }, "Show more");
  const draw = () => {
    const shown = inOrder(fields);
    neighbours = shown.map((f) => f.fov);
    told.textContent = `${shown.length} of ${number(fields.length, "field")}`;
    list.replaceChildren(...shown.slice(0, most).map((f) => make("li", {}, line(slide, f))));
    more.hidden = shown.length <= most;
  };
  const filter = make("input", { type: "search", id: "filter", value: state.filter,
    oninput: () => { state.filter = filter.value; most = SHOWN_AT_ONCE; draw(); } });
  main.replaceChildren(make("h1", {}, slide),
    make("div", { class: "bar" }, make("label", {}, "Name ", filter),
      choice("Show", ONLY, "only", draw), choice("Order", ORDERS, "order", draw)),
    told, list, more,
    make("p", { class: "keys" }, make("kbd", {}, "/"), " search, ", make("kbd", {}, "j"), " and ",
      make("kbd", {}, "k"), " down and up, ", make("kbd", {}, "Enter"), " open"));
  draw();
  keyHandler = (key) => {
    const links = [...list.querySelectorAll("a")];
    const at = links.indexOf(document.activeElement);
    if (key === "/") filter.focus();
    else if (key === "j" || key === "ArrowDown") (links[at + 1] || links[0])?.focus();
    else if (key === "k" || key === "ArrowUp") (links[at - 1] || links.at(-1))?.focus();
    else return false;
    return true;
  };
}

function line(slide, f) {
  return make("a", { href: address("field", slide, f.fov) }, make("b", {}, f.fov),
    f.status === "ok" ? make("span", {}, `${f.n_rbc} red, ${f.n_rbc_overlapping} overlapping`)
      : make("span", { class: "chip warn" }, f.reason ? `${f.status}: ${f.reason}` : f.status),
    ...f.flags.map((flag) => make("span", { class: "chip warn" }, flag)),
    f.n_doubtful ? make("span", {}, `${f.n_doubtful} doubtful`) : "",
    f.n_corrected ? make("span", { class: "chip" }, `${f.n_corrected} corrected`) : "",
    f.n_lost ? make("span", { class: "chip warn" }, `${f.n_lost} without a cell`) : "",
    f.reviewed ? make("span", { class: "chip" }, `reviewed by ${f.reviewed}`) : "");
}

// -- one field -------------------------------------------------------------------------------------------

async function showField(slide, fov) {
  field = await ask("api/field", { slide, fov });
  if (!neighbours.includes(fov)) neighbours = inOrder((await ask("api/fields", { slide })).fields).map((f) => f.fov);
  if (!who.value) who.value = (await ask("api/slides")).who;
  [chosen, adding, lastExclude] = [0, false, false];
  setPath(["Slides", "#/"], [slide, address("slide", slide)], [fov, ""]);
  const stage = make("div", { id: "stage" });
  main.replaceChildren(make("h1", {}, fov), make("div", { class: "bar", id: "counts" }),
    make("div", { id: "notes" }),
    make("div", { id: "view", role: "group", "aria-label": "The image with its cells" }, stage),
    make("div", { class: "bar", id: "tools" }), make("div", { class: "bar", id: "look" }),
    make("div", { id: "history" }));
  buildTools();
  const isBare = !field.width_px || (field.is_gone && !field.cells.length);
  if (isBare) document.getElementById("view").hidden = true;
  else await showImage(stage);
  drawField();
  watchPointer(document.getElementById("view"));
  keyHandler = fieldKey;
}

async function showImage(stage) {
  stage.style.width = `${field.width_px}px`;
  stage.style.height = `${field.height_px}px`;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${field.width_px} ${field.height_px}`);
  svg.id = "cells";
  const asked = { slide: field.slide, fov: field.fov, sha256: field.sha256 };
  const image = make("img", { alt: `image of ${field.fov}`, draggable: "false" });
  if (!field.is_gone) {
    image.src = `picture?${new URLSearchParams(asked)}`;
    image.addEventListener("error", () => { image.hidden = true; say("The image cannot be shown."); });
    stage.append(image);
  }
  stage.append(svg);
  fit();
}

function fit() {
  const view = document.getElementById("view");
  view.style.height = `${Math.min(innerHeight * 0.7, view.clientWidth * field.height_px / field.width_px)}px`;
  const k = Math.min(view.clientWidth / field.width_px, view.clientHeight / field.height_px);
  zoom = { k, x: (view.clientWidth - k * field.width_px) / 2, y: (view.clientHeight - k * field.height_px) / 2 };
  place();
}

function place() {
  document.getElementById("stage").style.transform = `translate(${zoom.x}px, ${zoom.y}px) scale(${zoom.k})`;
  for (const text of document.querySelectorAll("#cells text")) text.setAttribute("font-size", 12 / zoom.k);
}

function zoomBy(factor, x, y) {
  const view = document.getElementById("view");
  const [cx, cy] = [x ?? view.clientWidth / 2, y ?? view.clientHeight / 2];
  const k = Math.min(Math.max(zoom.k * factor, 0.02), 40);
  zoom = { k, x: cx - (cx - zoom.x) * k / zoom.k, y: cy - (cy - zoom.y) * k / zoom.k };
  place();
}

function button(text, key, action, more = {}) {
  return make("button", { type: "button", onclick: action, ...more }, text, " ", key ? make("kbd", {}, key) : "");
}

function buildTools() {
  const write = { disabled: state.readOnly };
  const kinds = Object.entries(KEYS).map(([key, what]) =>
    button(NAMES[what], key.toUpperCase(), () => correctCell(what), { ...write, class: "kind" }));
  const shapes = field.shapes.length ? make("select", { ...write, "aria-label": "Shape of the chosen cell", id: "shape",
    onchange: (e) => e.target.value && correctCell(e.target.value, "shape") },
  make("option", { value: "" }, "shape…"), ...field.shapes.map((s) => make("option", {}, s))) : "";
  document.getElementById("tools").replaceChildren(...kinds, shapes,
    button("add a cell", "A", toggleAdding, { ...write, id: "add", "aria-pressed": "false" }),
    button("undo", "U", undoLast, { ...write, id: "undo" }),
    button("reviewed", "R", review, { ...write, id: "review" }),
    button("exclude…", "E", exclude, { ...write, id: "exclude" }),
    make("span", { id: "reasons", class: "bar", hidden: true }));
  const slider = make("input", { type: "range", id: "near", min: "0", max: "0.5", step: "0.01", value: String(near),
    oninput: () => { near = Number(slider.value); drawField(); } });
  document.getElementById("look").replaceChildren(
    button("hide outlines", "H", togglePlain, { id: "plain", "aria-pressed": String(state.plain) }),
    make("label", {}, "mark calls near the threshold ", slider, " ", make("output", { id: "n-near" })),
    button("+", "", () => zoomBy(1.4), { "aria-label": "zoom in" }),
    button("−", "", () => zoomBy(1 / 1.4), { "aria-label": "zoom out" }),
    button("whole image", "0", fit), button("previous", "K", () => go(-1)), button("next", "J", () => go(1)),
    make("span", { class: "keys" }, make("kbd", {}, "."), " and ", make("kbd", {}, ","), " next and last cell, ",
      make("kbd", {}, "Space"), " single or overlapping"));
}

function isNear(cell) {
  return near > 0 && cell.overlap_score !== null && Math.abs(cell.overlap_score - field.threshold) <= near;
}

function drawField() {
  const f = field;
  const counts = document.getElementById("counts");
  counts.replaceChildren(...(f.status === "ok" ? [
    make("strong", {}, `${f.n_rbc} red cells`), make("span", {}, `${f.n_rbc_single} single`),
    make("span", {}, `${f.n_rbc_overlapping} overlapping`), make("span", {}, `${f.n_wbc} white`),
    make("span", {}, number(f.n_platelets, "platelet"))] : [make("strong", {}, f.status)]),
  ...f.flags.map((flag) => make("span", { class: "chip warn" }, flag)),
  f.n_corrected ? make("span", { class: "chip", id: "n-corrected" }, `${f.n_corrected} corrected`) : "",
  f.reviewed ? make("span", { class: "chip" }, `reviewed by ${f.reviewed}`) : "");
  const notes = [];
  if (f.is_gone) notes.push("The file of this field is gone, so there is no image to look at.");
  if (f.is_gone && f.status === "ok") notes.push("It stays counted, and it can be excluded.");
  if (f.status === "excluded") notes.push(`Excluded${f.reason ? `: ${f.reason}` : ""}. Nothing is counted here.`);
  if (f.message) notes.push(f.message);
  document.getElementById("notes").replaceChildren(...notes.map((text) => make("p", { class: "note" }, text)));
  document.getElementById("exclude").firstChild.data = f.status === "excluded" ? "count again" : "exclude…";
  document.getElementById("n-near").textContent = near ? String(f.cells.filter(isNear).length) : "";
  const svg = document.getElementById("cells");
  if (svg) {
    document.getElementById("view").hidden = f.is_gone && !f.cells.length; // nothing to see
    svg.classList.toggle("plain", state.plain);
    const area = ({ box: [x0, y0, x1, y1] }) => (x1 - x0) * (y1 - y0);
    svg.replaceChildren(...[...f.cells].sort((a, b) => area(b) - area(a)).map(outline)); // small ones on top
    place();
  }
  const can = f.cells.some((c) => c.number === chosen) && !state.readOnly;
  for (const each of document.querySelectorAll(".kind, #shape")) each.disabled = !can;
  document.getElementById("undo").disabled = state.readOnly || !(f.corrections.length || f.status === "excluded");
  drawHistory();
}

function outline(cell) {
  const [x0, y0, x1, y1] = cell.box;
  const isRound = cell.label !== "wbc";
  const shape = document.createElementNS(SVG, isRound ? "ellipse" : "rect");
  const about = isRound
    ? { cx: (x0 + x1) / 2, cy: (y0 + y1) / 2, rx: (x1 - x0) / 2, ry: (y1 - y0) / 2 }
    : { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
  for (const [name, value] of Object.entries(about)) shape.setAttribute(name, value);
  shape.classList.add("shape");
  const text = document.createElementNS(SVG, "text");
  text.setAttribute("x", x0 + (x1 - x0) * 0.15);
  text.setAttribute("y", y0 + (y1 - y0) * 0.3);
  text.textContent = cell.number;
  const group = document.createElementNS(SVG, "g");
  group.classList.add("cell", cell.label);
  group.classList.toggle("corrected", cell.label !== cell.model_label || Boolean(cell.shape));
  group.classList.toggle("near", isNear(cell));
  group.classList.toggle("chosen", cell.number === chosen);
  group.dataset.number = cell.number;
  group.append(shape, text);
  return group;
}

function drawHistory() {
  const told = (c) => `${NAMES[c.what] || c.what || "whole field"}${c.kind === "added" ? ", added" : ""}`
    + `${c.was && NAMES[c.was] ? `, was ${NAMES[c.was]}` : ""}, ${c.kind === "reviewed" ? "accepted by" : "by"}`
    + ` ${c.who || "someone"}, ${new Date(c.at).toLocaleString()}`;
  const entry = (c) => make("li", {}, told(c), " ",
    button("undo", "", () => undoKey(c.key), { disabled: state.readOnly, "aria-label": `undo: ${told(c)}` }));
  const part = (title, all) => all.length ? [make("h2", {}, title), make("ol", {}, ...all.map(entry))] : [];
  const lost = new Set(field.lost.map((c) => c.key));
  document.getElementById("history").replaceChildren(
    ...part("Corrections that find no cell any more", field.lost),
    ...part("Corrections", field.corrections.filter((c) => !lost.has(c.key)).reverse()));
}

function choose(n) {
  chosen = n;
  const cell = field.cells.find((c) => c.number === n);
  if (cell) {
    const score = cell.overlap_score === null ? "" : `, overlap score ${cell.overlap_score.toFixed(2)}`;
    const was = cell.model_label === cell.label ? "" : ` (the program: ${NAMES[cell.model_label] || "not found"})`;
    say(`cell ${n}: ${NAMES[cell.label]}${was}${score}${cell.shape ? `, ${cell.shape}` : ""}`);
  }
  drawField();
}

async function change(path, body, done) {
  if (state.readOnly) return say("This page only shows: it was started with --read-only.");
  try {
    field = await ask(path, null, { slide: field.slide, fov: field.fov, who: who.value.trim(), ...body });
    say(done);
  } catch (error) {
    say(error.message);
  }
  return drawField();
}

function correctCell(what, kind = "label") {
  const cell = field.cells.find((c) => c.number === chosen);
  if (!cell) return say("Choose a cell first: click it.");
  if (kind === "label" && cell.label === what) return say(`cell ${chosen} is ${NAMES[what]} already`);
  lastExclude = false;
  return change("api/correct", { sha256: field.sha256, kind, what, box: cell.box },
    `cell ${chosen}: ${NAMES[what] || what}`);
}

function toggleOverlap(n) {
  const cell = field.cells.find((c) => c.number === n);
  if (cell) correctCell(cell.label === "rbc_single" ? "rbc_overlapping" : "rbc_single");
}

async function addCell(box) {
  lastExclude = false;
  const n = field.cells.length;
  await change("api/correct", { sha256: field.sha256, kind: "added", what: "rbc_single", box },
    "added as a single cell: another key makes it another kind");
  if (field.cells.length > n) { chosen = field.cells.length; drawField(); }
}

const undoKey = (key) => change("api/undo", { key }, "undone");

function undoLast() {
  if (lastExclude || (field.status === "excluded" && !field.corrections.length)) return setExcluded(null);
  const last = field.corrections.at(-1);
  return last ? undoKey(last.key) : say("There is nothing to undo.");
}

async function review() {
  if (field.status !== "ok") return say("Only a counted field can be reviewed.");
  await change("api/correct", { sha256: field.sha256, kind: "reviewed" }, "reviewed");
  return undefined;
}

async function setExcluded(reason) {
  await change("api/exclude", { sha256: field.sha256, reason }, reason === null ? "counted again" : "excluded");
  lastExclude = field.status === "excluded";
}

function exclude() {
  if (field.status === "excluded") return setExcluded(null);
  const reasons = document.getElementById("reasons");
  const why = make("input", { maxlength: "300", list: "whys", id: "why", "aria-label": "Why it is excluded" });
  const form = make("form", { class: "bar", onsubmit: (event) => {
    event.preventDefault();
    reasons.hidden = true;
    setExcluded(why.value.trim());
  } }, make("label", {}, "Why? ", why),
  make("datalist", { id: "whys" }, ...["out of focus", "smear too thick", "staining", "artefact"].map((each) =>
    make("option", { value: each }))), make("button", {}, "exclude"));
  reasons.replaceChildren(form);
  reasons.hidden = false;
  why.focus();
  return undefined;
}

function togglePlain() {
  state.plain = !state.plain;
  document.getElementById("plain").setAttribute("aria-pressed", String(state.plain));
  drawField();
}

function toggleAdding() {
  adding = !adding;
  document.getElementById("add").setAttribute("aria-pressed", String(adding));
  document.getElementById("view").classList.toggle("adding", adding);
  say(adding ? "Drag a box around the cell that was missed." : "");
}

function go(step) {
  const next = neighbours[neighbours.indexOf(field.fov) + step];
  if (next !== undefined) location.hash = address("field", field.slide, next);
  else say(step > 0 ? "This is the last field of the list." : "This is the first field of the list.");
}

function fieldKey(key) {
  const shown = near ? field.cells.filter(isNear) : field.cells;
  const at = shown.findIndex((c) => c.number === chosen);
  const step = (n) => { if (shown.length) choose(shown[(at + n + shown.length) % shown.length].number); };
  const actions = {
    h: togglePlain, a: toggleAdding, u: undoLast, r: review, e: exclude, 0: fit,
    "+": () => zoomBy(1.4), "-": () => zoomBy(1 / 1.4), " ": () => toggleOverlap(chosen),
    j: () => go(1), ArrowRight: () => go(1), k: () => go(-1), ArrowLeft: () => go(-1),
    ".": () => step(1), ",": () => (at < 0 ? step(0) : step(-1)), Escape: () => (adding ? toggleAdding() : choose(0)),
  };
  if (KEYS[key]) correctCell(KEYS[key]);
  else if (actions[key]) actions[key]();
  else return false;
  return true;
}

// Click: choose a cell, and again: single or overlapping. Drag: move the image, or the box of a new cell.
function watchPointer(view) {
  let from = null;
  let box = null;
  const at = (event) => {
    const frame = view.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  };
  const inField = ([x, y]) => [
    Math.min(Math.max((x - zoom.x) / zoom.k, 0), field.width_px),
    Math.min(Math.max((y - zoom.y) / zoom.k, 0), field.height_px)];
  view.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    const cell = event.target.closest?.(".cell");
    from = { at: at(event), zoom: { ...zoom }, cell: cell ? Number(cell.dataset.number) : 0, moved: false };
    view.setPointerCapture(event.pointerId);
  });
  view.addEventListener("pointermove", (event) => {
    if (!from) return;
    const [x, y] = at(event);
    const [dx, dy] = [x - from.at[0], y - from.at[1]];
    from.moved ||= Math.hypot(dx, dy) > 4;
    if (!from.moved) return;
    if (adding && !state.readOnly) {
      const [a, b] = [inField(from.at), inField([x, y])];
      box = [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])];
      let drawn = document.getElementById("drag");
      if (!drawn) {
        drawn = document.createElementNS(SVG, "rect");
        drawn.id = "drag";
        document.getElementById("cells").append(drawn);
      }
      const about = { x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1] };
      for (const [name, value] of Object.entries(about)) drawn.setAttribute(name, value);
    } else {
      zoom = { k: from.zoom.k, x: from.zoom.x + dx, y: from.zoom.y + dy };
      place();
    }
  });
  view.addEventListener("pointerup", () => {
    const [done, drawn] = [from, box];
    [from, box] = [null, null];
    if (!done) return;
    if (drawn) {
      toggleAdding();
      addCell(drawn);
    } else if (!done.moved && done.cell) {
      if (done.cell === chosen) toggleOverlap(chosen);
      else choose(done.cell);
    }
  });
  view.addEventListener("pointercancel", () => { [from, box] = [null, null]; drawField(); });
  view.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomBy(1.0015 ** -event.deltaY, ...at(event));
  }, { passive: false });
}

// -- the whole -------------------------------------------------------------------------------------------

async function show() {
  keyHandler = null;
  const [view, ...names] = location.hash.slice(2).split("/").map(decodeURIComponent);
  try {
    say("");
    if (view === "field") await showField(...names);
    else if (view === "slide") await showFields(...names);
    else await showSlides();
    document.title = [...names, "rbc-edge review"].join(" – ");
  } catch (error) {
    main.replaceChildren(make("h1", {}, "This cannot be shown"), make("p", { class: "note" }, error.message),
      make("button", { onclick: show }, "Try again"));
  }
}

document.addEventListener("keydown", (event) => {
  const tag = event.target.tagName;
  if (event.ctrlKey || event.metaKey || event.altKey || !keyHandler) return;
  if (["INPUT", "SELECT", "TEXTAREA"].includes(tag) && event.target.type !== "range") {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if ((tag === "BUTTON" && [" ", "Enter"].includes(event.key)) || event.target.type === "range" && event.key.startsWith("Arrow")) return;
  if (keyHandler(event.key.length === 1 ? event.key.toLowerCase() : event.key)) event.preventDefault();
});
addEventListener("hashchange", show);
addEventListener("resize", () => { if (document.getElementById("cells")) fit(); });
try {
  who.value = localStorage.getItem("who") || "";
  who.addEventListener("change", () => localStorage.setItem("who", who.value));
} catch { /* a browser that keeps nothing */ }
// The secret is in the cookie now: not in the history, and in no picture of the window.
history.replaceState(null, "", location.pathname + location.hash);
(async () => {
  // Any view needs to know whether it may write.
  if (location.hash.length > 2) {
    try {
      const of = await ask("api/slides");
      state.readOnly = of.read_only;
      document.getElementById("read-only").hidden = !of.read_only;
      if (!who.value) who.value = of.who;
    } catch { /* `show` says it */ }
  }
  show();
})();
