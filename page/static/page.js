"use strict";
// Replaces the parts of the page that have changed, and shows the values under the pointer.

const policy = window.trustedTypes
  ? trustedTypes.createPolicy("page", { createHTML: (html) => html })
  : { createHTML: (html) => html };
const live = document.getElementById("live");
const announce = document.getElementById("announce");
let lastEvent = 0;
let lastTime = "";
/** Time without an event after which the data is old. The server sends one each second. */
const SILENCE = 4000;

/** Makes `old` like `fresh`, and keeps the elements that stay: focus, scroll positions and open details survive. */
function morph(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName || old.id !== fresh.id) {
    old.replaceWith(fresh);
    return;
  }
  // The reader looks at the values of this graph.
  if (old.classList && old.classList.contains("hover")) return;
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  for (const { name, value } of [...fresh.attributes]) {
    if (old.getAttribute(name) !== value && !keeps(old, name)) old.setAttribute(name, value);
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !keeps(old, name)) old.removeAttribute(name);
  }
  children(old, fresh);
}

/** Whether an attribute is the reader's own. */
function keeps(element, name) {
  return name === "open" && element.nodeName === "DETAILS";
}

function children(old, fresh) {
  const next = [...fresh.childNodes];
  const now = [...old.childNodes];
  next.forEach((node, i) => (i < now.length ? morph(now[i], node) : old.append(node)));
  now.slice(next.length).forEach((node) => node.remove());
}

function show(part, html) {
  const template = document.createElement("template");
  template.innerHTML = policy.createHTML(html);
  const target = document.querySelector(`[data-part="${part}"]`);
  if (target) children(target, template.content);
}

function title() {
  const headline = document.querySelector("[data-headline]");
  if (!headline) return;
  const text = headline.dataset.headline;
  const fleet = document.body.dataset.fleet;
  const works = headline.classList.contains("good");
  document.title = works ? `${fleet} – Bakehouse` : `${text} – ${fleet}`;
  if (announce.textContent !== text) announce.textContent = text;
}

function state(name, text) {
  live.classList.toggle("on", name === "on");
  live.classList.toggle("lost", name === "lost");
  if (live.textContent !== text) live.textContent = text;
}

function connect() {
  const source = new EventSource("events?range=" + encodeURIComponent(document.body.dataset.range));
  source.addEventListener("parts", (event) => {
    const message = JSON.parse(event.data);
    if (message.build !== document.documentElement.dataset.build) {
      // The monitor has another version now.
      location.reload();
      return;
    }
    for (const [part, html] of Object.entries(message.parts)) show(part, html);
    lastTime = message.time;
    alive();
    title();
  });
  source.addEventListener("beat", alive);
  source.addEventListener("error", () => {
    // The browser connects again by itself, but not after a refusal.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 2000);
  });
}

function alive() {
  lastEvent = Date.now();
  state("on", "Live");
}

// A connection may be dead without an error, and a short loss is not worth a word.
const started = Date.now();
setInterval(() => {
  if (Date.now() - (lastEvent || started) > SILENCE) {
    state("lost", lastTime ? `Connection lost. Data of ${lastTime.slice(11, 19)}` : "No connection");
  }
}, 500);

/** Shows the values of a graph at the pointer. */
function point(event) {
  const graph = event.target.closest ? event.target.closest(".graph") : null;
  for (const other of document.querySelectorAll(".graph.hover")) if (other !== graph) leave(other);
  if (!graph || !event.target.closest("svg")) {
    if (graph) leave(graph);
    return;
  }
  const box = graph.querySelector("svg").getBoundingClientRect();
  const scale = 412 / box.width;
  const share = ((event.clientX - box.left) * scale - 52) / 356;
  const count = Number(graph.dataset.points);
  const index = Math.min(count - 1, Math.max(0, Math.round(share * (count - 1))));
  graph.classList.add("hover");
  graph.querySelector(".cursor").setAttribute("d", `M${52 + (356 * index) / (count - 1)},10V128`);
  for (const line of graph.querySelectorAll(".legend li")) {
    const value = line.querySelector(".value");
    if (value.dataset.now === undefined) value.dataset.now = value.textContent;
    value.textContent = line.dataset.values.split("|")[index] || "–";
  }
  let when = graph.querySelector(".when");
  if (!when) {
    when = document.createElement("span");
    when.className = "when";
    graph.append(when);
  }
  const time = new Date((Number(graph.dataset.start) + index * Number(graph.dataset.step)) * 1000);
  when.textContent = time.toISOString().slice(5, 16).replace("T", " ");
}

function leave(graph) {
  graph.classList.remove("hover");
  for (const value of graph.querySelectorAll(".legend .value")) {
    if (value.dataset.now !== undefined) value.textContent = value.dataset.now;
    delete value.dataset.now;
  }
  const when = graph.querySelector(".when");
  if (when) when.remove();
}

document.addEventListener("pointermove", point, { passive: true });
document.addEventListener("pointerdown", point, { passive: true });
// A menu closes when the reader clicks elsewhere, or presses Escape.
function closeMenus(except) {
  for (const menu of document.querySelectorAll("details.menu[open]")) if (menu !== except) menu.open = false;
}
document.addEventListener("click", (event) => closeMenus(event.target.closest("details.menu")));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closeMenus(null);
});
title();
connect();
