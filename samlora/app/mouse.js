"use strict";
// Mouse and pen on the canvas: points, boxes, strokes, window, slices, zoom.
import { $, act, boxesFirst, go, jobRunning, markEncoded, now, show, view } from "./core.js";
import { setWindow } from "./panel.js";

export const keys = { space: false }; // held down

// --- mouse -----------------------------------------------------------------------------------------------

const later = []; // what keys asked for while the button was pressed

// Done once the button is up: neither the slice nor the label changes in the midst of a stroke.
export function unheld(what) {
  if (now.held) later.push(what);
  else what();
}

function ended() {
  now.held = view.drag = null;
  view.draw();
  for (const what of later.splice(0)) what();
}

function placeOf(event) {
  const box = $("canvas").getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

export function press(event) {
  if (!now.state || !now.state.image || view.at === null || now.held) return;
  $("canvas").focus();
  $("canvas").setPointerCapture(event.pointerId);
  go(view.at); // what is seen is meant: a slice that is still on its way does not come
  const [u, v] = placeOf(event);
  const [x, y] = view.toSlice(u, v);
  const held = { at: view.at, u, v, x, y, moved: false, window: view.window };
  if (event.button === 1 || keys.space) held.does = "move";
  else if (event.button === 2) held.does = "window";
  else if (now.tool === "prompt") held.does = "prompt";
  else if (!jobRunning()) {
    held.does = "stroke";
    held.erase = now.tool === "eraser";
    const colour = held.erase ? "#000000" : now.colours.get(now.state.active);
    held.trace = { at: held.at, path: [[x - 0.5, y - 0.5]], radius: Number($("radius").value), colour };
    view.traces.push(held.trace);
    view.draw();
  }
  held.negative = event.button === 2 || event.shiftKey || event.ctrlKey;
  now.held = held;
  event.preventDefault();
}

export function hover(event) {
  if (!now.state || !now.state.image) return;
  const [u, v] = placeOf(event);
  const [x, y] = view.toSlice(u, v);
  const [column, row] = [Math.floor(x), Math.floor(y)];
  const value = view.valueAt(column, row);
  $("cursor").textContent = value === "" ? "" : `x ${column}  y ${row}   ${value}${now.state.image.ct ? " HU" : ""}`;
  if (now.tool !== "prompt") {
    view.cursor = { x, y, radius: Number($("radius").value) };
    view.draw();
  }
  const { held } = now;
  if (!held) return;
  held.moved ||= Math.hypot(u - held.u, v - held.v) > 4;
  if (held.does === "move") {
    view.move(u - (held.last || held).u, v - (held.last || held).v);
    held.last = { u, v };
  } else if (held.does === "window" && held.moved) {
    const [low, high] = held.window;
    const scale = Math.max(high - low, (now.state.image.limits[1] - now.state.image.limits[0]) / 100) / 300;
    const level = (low + high) / 2 - (held.v - v) * scale;
    const width = Math.max((high - low) / 100, high - low + (u - held.u) * scale);
    setWindow(level - width / 2, level + width / 2);
  } else if (held.does === "prompt" && held.moved && !held.negative) {
    view.drag = [held.x, held.y, x, y];
    view.draw();
  } else if (held.does === "stroke") {
    held.trace.path.push([x - 0.5, y - 0.5]);
    view.draw();
  }
}

export function release(event) {
  const { held } = now;
  if (held) {
    const { at, does, moved, negative, x, y, erase, trace } = held;
    if (does === "prompt" || (does === "window" && !moved && now.tool === "prompt")) {
      if (view.drag) box(at, view.drag);
      else if (!moved) point(at, Math.floor(x), Math.floor(y), !negative);
    } else if (does === "stroke") {
      const { path, radius } = trace;
      const stroke = { index: at, path, radius, erase };
      act(erase ? "erasing" : "painting", "/api/brush", stroke).finally(() => view.forget(trace));
    }
    event.preventDefault();
  }
  ended();
}

const scored = (answer) => {
  const score = answer.prompts && answer.prompts.score;
  return score === null || score === undefined ? "" : `the model expects an overlap (IoU) of ${score.toFixed(2)}`;
};

const clicked = (answer) =>
  boxesFirst() && answer.prompts && !answer.prompts.box
    ? "this model was trained with boxes: drag one around the object"
    : scored(answer);

function point(at, x, y, positive) {
  const [, height, width] = now.state.image.shape;
  if (x < 0 || y < 0 || x >= width || y >= height) return;
  const here = view.marks || { points: [], box: null };
  if (positive || here.points.length || here.box) view.marks = { ...here, points: [...here.points, [x, y, positive]] };
  view.draw(); // the point is seen before the answer comes
  act("asking the model", "/api/click", { index: at, x, y, positive }, clicked).then(() => {
    markEncoded(at);
    show();
  });
}

function box(at, [x0, y0, x1, y1]) {
  const [, height, width] = now.state.image.shape;
  const clip = (value, most) => Math.max(0, Math.min(most, Math.round(value)));
  const corners = [
    clip(Math.min(x0, x1), width),
    clip(Math.min(y0, y1), height),
    clip(Math.max(x0, x1), width) - 1,
    clip(Math.max(y0, y1), height) - 1,
  ];
  view.marks = { points: [], box: corners };
  act("asking the model", "/api/box", { index: at, box: corners }, scored).then(() => {
    markEncoded(at);
    show();
  });
}

export function wheel(event) {
  event.preventDefault();
  if (!now.state || !now.state.image) return;
  if (event.ctrlKey || event.metaKey) return view.zoomBy(Math.exp(-event.deltaY / 300), ...placeOf(event));
  turned += event.deltaY;
  const steps = Math.trunc(turned / 40) || 0;
  if (!steps) return;
  turned = 0;
  go(now.index + Math.sign(steps));
}
let turned = 0;

// The pointer is taken away: nothing of what it began is done.
export function drop() {
  if (now.held && now.held.trace) view.forget(now.held.trace);
  ended();
}

export function leave() {
  view.cursor = null;
  $("cursor").textContent = "";
  view.draw();
}
