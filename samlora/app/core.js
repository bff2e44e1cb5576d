"use strict";
// What all parts share: the state as the server tells it, requests, the queue of actions, and the slice that is shown.
import { View, typed } from "./view.js";
import { render, setWindow } from "./panel.js";

export const $ = (id) => document.getElementById(id);
export const view = new View($("canvas"));

export const now = {
  about: null, // models, images, device
  state: null, // the session
  index: 0, // the slice
  tool: "prompt",
  held: null, // what the pressed mouse button does on the slice, which stays as long
  colours: new Map(), // of the labels, by value
  epoch: 0, // counts images and the ways they are cut
};

const CACHE_BYTES = 256 * 2 ** 20;
const encoded = new Set(); // slices
const slices = new Map(); // "channel:index" -> values, the oldest first
const drawn = new Map(); // index -> labels, of one revision
let drawnRevision = -1;
let polling = false;

// --- the server ------------------------------------------------------------------------------------------

export class Failure extends Error {}

export async function ask(method, path, body, kind = "json") {
  const headers = { "X-Session": sessionStorage.getItem("session") || "none" };
  // What is changed or exported is of the image that is seen, even if another page used this session meanwhile.
  if ((method === "POST" || kind === "blob") && now.state && now.state.image)
    headers["X-Image"] = now.state.image.number;
  const raw = body instanceof Blob;
  if (body !== undefined && !raw) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: body === undefined || raw ? body : JSON.stringify(body) });
  } catch {
    throw new Failure("the server does not answer; is samlora app still running?");
  }
  if (!answer.ok) {
    const text = await answer.text();
    let message = text;
    try {
      message = JSON.parse(text).error || text;
    } catch {
      /* not JSON: the text is the message */
    }
    throw Object.assign(new Failure(message), { status: answer.status });
  }
  return kind === "json" ? answer.json() : kind === "blob" ? answer : answer.arrayBuffer();
}

export function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// The image and the way it is cut: what the numbers of slices, rows and columns are counted in.
const cut = (state) => JSON.stringify(state && state.image);

// Actions go one after the other, in the order in which they were asked for.
let queue = Promise.resolve();
let waiting = 0;

function inTurn(work) {
  queue = queued().then(work); // what failed was told and stops nothing
  return queue;
}

export function act(what, path, body, done) {
  waiting += 1;
  const shown = setTimeout(() => working(`${what}…`), 150);
  const seen = cut(now.state);
  return inTurn(async () => {
    try {
      if (body && "index" in body && seen !== cut(now.state))
        throw new Failure("another image or model came first: nothing was drawn");
      const answer = await ask("POST", path, body);
      if (answer.image !== undefined) await take(answer);
      say(typeof done === "function" ? done(answer) : done || "");
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      say(error.message, true);
      if (now.state) render();
    } finally {
      clearTimeout(shown);
      waiting -= 1;
      if (!waiting && !jobRunning()) working(null);
    }
  });
}

// The state anew, where something else than an action has changed it.
export const refresh = () => inTurn(async () => take(await ask("GET", "/api/state")));

// Settled when all actions asked for so far are done.
export const queued = () => queue.catch(() => {});

// Whether the model in use was trained with boxes, so that points alone find little.
export const boxesFirst = () => now.about.models[now.state.model].boxes_first;

export const imageIsOpen = () =>
  `${now.state.image.name} is open${boxesFirst() ? "; drag a box around an object" : ""}`;

export const jobRunning = () => Boolean(now.state && now.state.job && now.state.job.running);

export function working(text, done, total) {
  $("working").hidden = text === null;
  if (text === null) return;
  $("progress-shown").textContent = text;
  $("cancel").hidden = total === undefined;
  if (total === undefined) $("progress").removeAttribute("value");
  else Object.assign($("progress"), { max: total, value: done });
}

// --- the state -----------------------------------------------------------------------------------------------

export async function take(next) {
  const before = now.state;
  now.state = next;
  const shape = (one) => JSON.stringify([one.image, one.model]);
  if (cut(before) !== cut(next)) {
    now.held = view.drag = null; // it was meant for the slice before
    view.traces = [];
  }
  if (now.state.image && (!before || shape(before) !== shape(now.state))) {
    const same = before && before.image && before.image.number === now.state.image.number;
    now.epoch += 1;
    slices.clear();
    drawn.clear();
    encoded.clear();
    view.open(now.state.image);
    if (!same) {
      now.index = Math.floor(now.state.image.shape[0] / 2);
      setWindow(...now.state.image.window);
      view.fit();
    }
    now.index = Math.min(now.index, now.state.image.shape[0] - 1);
  }
  now.colours = new Map(now.state.labels.map((label) => [label.value, label.colour]));
  if (drawnRevision !== now.state.revision) {
    drawn.clear();
    drawnRevision = now.state.revision;
  }
  render();
  await show();
  if (jobRunning() && !polling) follow();
}

async function follow() {
  polling = true;
  while (jobRunning()) {
    working(
      `${now.state.job.what}: ${now.state.job.done} of ${now.state.job.total}`,
      now.state.job.done,
      now.state.job.total,
    );
    await new Promise((done) => setTimeout(done, 200));
    try {
      await take(await ask("GET", "/api/state"));
    } catch (error) {
      say(error.message, true);
      break;
    }
  }
  polling = false;
  working(null);
  if (now.state.job && !now.state.job.running)
    say(now.state.job.error || now.state.job.message, Boolean(now.state.job.error));
}

// --- slices ----------------------------------------------------------------------------------------------

async function valuesOf(at) {
  const key = `${now.state.channel}:${at}`;
  if (!slices.has(key)) {
    const { image, channel } = now.state;
    slices.set(
      key,
      ask("GET", `/api/slice/${at}?channel=${channel}`, undefined, "bytes").then((b) => typed(image.dtype, b)),
    );
    slices.get(key).catch(() => slices.delete(key));
    const [, height, width] = image.shape;
    const most = Math.max(16, Math.floor(CACHE_BYTES / (4 * height * width)));
    while (slices.size > most) slices.delete(slices.keys().next().value);
  }
  return slices.get(key);
}

async function labelsOf(at) {
  if (!drawn.has(at)) {
    drawn.set(
      at,
      ask("GET", `/api/labels/${at}`, undefined, "bytes").then((bytes) => new Uint8Array(bytes)),
    );
    drawn.get(at).catch(() => drawn.delete(at));
  }
  return drawn.get(at);
}

export async function show() {
  if (!now.state || !now.state.image) return;
  const [at, when, revision] = [now.index, now.epoch, drawnRevision];
  $("slice").value = at;
  $("number").textContent = `${at + 1} / ${now.state.image.shape[0]}`;
  try {
    const [values, labels] = await Promise.all([valuesOf(at), labelsOf(at)]);
    // Another slice was chosen meanwhile, or newer labels came: they are shown by another call.
    if (at !== now.index || when !== now.epoch || revision !== drawnRevision) return;
    const here = now.state.prompts && now.state.prompts.index === at ? now.state.prompts : null;
    view.marks = here;
    view.show(at, values, labels, now.colours);
    $("canvas").dataset.slice = at; // what is really shown by now
    $("canvas").dataset.revision = now.state.revision;
    settle(at);
    for (const beside of [1, -1, 2, -2, 3]) {
      if (at + beside >= 0 && at + beside < now.state.image.shape[0]) {
        valuesOf(at + beside).catch(() => {});
        labelsOf(at + beside).catch(() => {});
      }
    }
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (when === now.epoch) say(error.message, true);
  }
}

// Where a person stays for a moment, the slice is encoded before the first click.
let resting = null;

function settle(at) {
  const light = $("encoded");
  const told = {
    ready: "This slice is encoded: clicks are answered at once",
    "": "Not encoded yet: the first click takes longer",
    working: "This slice is being encoded",
  };
  const set = (kind) => Object.assign(light, { className: kind, title: told[kind] });
  const model = now.about.models[now.state.model];
  set(encoded.has(at) ? "ready" : "");
  clearTimeout(resting);
  if (encoded.has(at) || !model.promptable || now.tool !== "prompt" || jobRunning()) return;
  const when = now.epoch;
  resting = setTimeout(async () => {
    set("working");
    const answer = await ask("POST", "/api/warm", { index: at }).catch(() => ({}));
    if (when !== now.epoch) return;
    if (answer.encoded) encoded.add(at);
    if (at === now.index) set(encoded.has(at) ? "ready" : "");
  }, 400);
}

export const markEncoded = (at) => encoded.add(at);

export function go(to) {
  if (!now.state || !now.state.image || now.held) return;
  const next = Math.max(0, Math.min(now.state.image.shape[0] - 1, to));
  if (next === now.index) return;
  now.index = next;
  show();
}
