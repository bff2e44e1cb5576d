"use strict";
// The panel at the right, the tools at the left, the window of values.
import { $, act, boxesFirst, jobRunning, now, say, view } from "./core.js";
import { name } from "./files.js";

const PRESETS = [
  ["Soft", -160, 240],
  ["Lung", -1350, 150],
  ["Bone", -500, 1300],
  ["Brain", 0, 80],
];

// --- the panel -------------------------------------------------------------------------------------------

export const element = (name, text = "", attributes = {}) => {
  const made = Object.assign(document.createElement(name), attributes);
  made.textContent = text;
  return made;
};

// The first click of two may have drawn the list anew, so that the second one meets another item: the place counts.
export function rename({ clientX, clientY }) {
  const item = document.elementFromPoint(clientX, clientY).closest("li");
  const label = item && now.state.labels.find(({ value }) => value === Number(item.dataset.value));
  if (!label) return;
  name(`Rename ${label.name}`, label.name, (to) => act("renaming", `/api/labels/${label.value}`, { name: to }));
}

function volumeOf(label) {
  if (!label.voxels) return "";
  const { spacing, has_thickness: hasThickness } = now.state.image || {};
  if (!spacing || !hasThickness) return `${label.voxels} px`;
  const millilitres = (label.voxels * spacing[0] * spacing[1] * spacing[2]) / 1000;
  return `${millilitres < 10 ? millilitres.toFixed(2) : millilitres.toFixed(0)} ml`;
}

let scrolledTo = null; // the active label: the list stays where a person scrolled it until there is another one

export function render() {
  const { image } = now.state;
  const model = now.about.models[now.state.model];
  const busy = jobRunning();
  $("empty").hidden = Boolean(image);
  $("models").value = now.state.model;
  $("note").hidden = !model.note;
  $("note").textContent = model.note;
  const facts = [["Model", model.detail]];
  if (image) {
    const [depth, height, width] = image.shape;
    facts.unshift(["Size", `${width} × ${height}${depth > 1 ? ` × ${depth}` : ""}`]);
    if (image.spacing) {
      const sizes = image.has_thickness ? [...image.spacing] : image.spacing.slice(1);
      facts.splice(1, 0, ["Voxel", `${sizes.reverse().join(" × ")} mm`]);
    }
  }
  $("about").firstElementChild.replaceChildren(
    ...facts.flatMap(([name, text]) => [element("dt", name), element("dd", text)]),
  );
  document.title = image ? `${image.name} – samlora` : "samlora";

  $("labels").replaceChildren(
    ...now.state.labels.map((label, n) => {
      const item = element("li", "", { title: "Click: draw this label. Double click: rename" });
      const swatch = element("i");
      swatch.style.background = label.colour;
      item.append(
        swatch,
        element("span", label.name),
        element("small", volumeOf(label)),
        element("kbd", n < 9 ? n + 1 : ""),
      );
      item.setAttribute("aria-selected", label.value === now.state.active);
      item.onclick = () =>
        label.value === now.state.active || act("label", `/api/labels/${label.value}`, { name: null });
      item.dataset.value = label.value;
      return item;
    }),
  );
  if (scrolledTo !== now.state.active) {
    scrolledTo = now.state.active;
    $("labels").querySelector("[aria-selected=true]").scrollIntoView({ block: "nearest" });
  }
  $("keep").checked = now.state.keep;

  for (const id of ["undo", "redo"]) {
    $(id).disabled = busy || !now.state[id];
    const [word, letter] = id === "undo" ? ["Undo", "Z"] : ["Redo", "Y"];
    $(id).title = `${word}${now.state[id] ? `: ${now.state[id]}` : ""} (Ctrl+${letter})`;
  }
  $("export").disabled = !image || busy;
  $("images").disabled = $("models").disabled = $("open").disabled = busy;
  $("automatic-section").classList.toggle("off", !image || busy || !model.automatic);
  $("automatic-section").classList.toggle("without", !model.automatic);
  $("automatic-why").hidden = model.automatic;
  $("carry-section").classList.toggle("off", !image || busy || !model.promptable || image.shape[0] < 2);
  for (const id of ["clear-slice", "clear-label", "clear-all"]) $(id).disabled = !image || busy;
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.setAttribute("aria-checked", button.dataset.tool === now.tool);
    button.disabled = button.dataset.tool === "prompt" && !model.promptable;
  }
  $("brush-section").hidden = now.tool === "prompt";
  $("finish").disabled = !now.state.prompts;
  $("hide").setAttribute("aria-pressed", view.hidden);

  $("slice").max = image ? image.shape[0] - 1 : 0;
  $("slice").disabled = !image || image.shape[0] < 2;
  const edges = image ? image.edges : {};
  for (const side of ["left", "right", "top", "bottom"]) $(`edge-${side}`).textContent = edges[side] || "";
  $("title").textContent = image ? `${image.name}${image.plane ? `\n${image.plane}` : ""}` : "";
  renderWindow();
}

function renderWindow() {
  const image = now.state && now.state.image;
  if (!image) return;
  const [low, high] = view.window;
  const [level, width] = [(low + high) / 2, high - low];
  const span = Math.max(image.limits[1] - image.limits[0], 1e-6);
  const step = span > 50 ? 1 : span / 500;
  const digits = span > 50 ? 0 : 3;
  const set = (id, min, max, value) => {
    Object.assign($(id), { min, max, step, value });
    $(`${id}-shown`).textContent = value.toFixed(digits);
  };
  set("level", Math.min(image.limits[0], level), Math.max(image.limits[1], level), level);
  set("width", step, Math.max(span, width), width);
  $("windowed").textContent = `L ${level.toFixed(digits)}  W ${width.toFixed(digits)}`;
  const same = String(image.window) === String(image.limits);
  const chips = image.ct ? PRESETS : same ? [] : [["Usual", ...image.window]];
  $("presets").replaceChildren(
    ...[...chips, ["Full", ...image.limits]].map(([name, from, to]) => {
      const chip = element("button", name, { title: `${name === "Soft" ? "Soft tissue" : name}: ${from} to ${to}` });
      chip.setAttribute("aria-pressed", Math.abs(from - low) < step && Math.abs(to - high) < step);
      chip.onclick = () => setWindow(from, to);
      return chip;
    }),
  );
  $("channels-field").hidden = image.channels < 2;
  if (image.channels > 1) {
    $("channels").replaceChildren(
      ...Array.from({ length: image.channels }, (_, n) => element("option", n + 1, { value: n })),
    );
    $("channels").value = now.state.channel;
  }
}

export function setWindow(low, high) {
  view.setWindow(low, high);
  renderWindow();
}

export function choose(next) {
  if (!now.state || (next === "prompt" && !now.about.models[now.state.model].promptable)) return;
  now.tool = next;
  view.cursor = null;
  view.draw();
  render();
  const prompt = boxesFirst()
    ? "drag: box around the object; then left click: belongs to it; right click: does not"
    : "left click: belongs to the object; right click: does not; drag: box";
  const told = {
    prompt,
    brush: "paint the active label; [ and ] change the size",
    eraser: "erase the active label; [ and ] change the size",
  };
  say(told[now.tool]);
}
