"use strict";
// Begins; keys and buttons, each bound to what it does.
import { $, act, ask, go, imageIsOpen, jobRunning, now, say, take, view } from "./core.js";
import { list, name, offerFormats, openListed, sure, unsaved, upload } from "./files.js";
import { drop, hover, keys, leave, press, release, unheld, wheel } from "./mouse.js";
import { choose, element, rename, render, setWindow } from "./panel.js";

// --- keys ------------------------------------------------------------------------------------------------

const steps = () => Math.max(1, Math.min(999, Math.round(Number($("steps").value)) || 1));
const pressed = (id) => !$(id).disabled && !$(id).closest(".off") && $(id).click();
const resizeBrush = (factor) => {
  $("radius").value = Math.max(0.5, Number($("radius").value) * factor);
  $("radius").oninput();
};
const middle = () => [$("canvas").clientWidth / 2, $("canvas").clientHeight / 2];

const KEYS = {
  ArrowUp: () => go(now.index + 1),
  ArrowRight: () => go(now.index + 1),
  ArrowDown: () => go(now.index - 1),
  ArrowLeft: () => go(now.index - 1),
  PageUp: () => go(now.index + 10),
  PageDown: () => go(now.index - 10),
  Home: () => go(0),
  End: () => go(Infinity),
  c: () => choose("prompt"),
  b: () => choose("brush"),
  e: () => choose("eraser"),
  Enter: () => pressed("finish"),
  h: () => pressed("hide"),
  f: () => pressed("fit"),
  "+": () => view.zoomBy(1.25, ...middle()),
  "-": () => view.zoomBy(0.8, ...middle()),
  "[": () => resizeBrush(1 / 1.25),
  "]": () => resizeBrush(1.25),
  a: () => pressed("auto-slice"),
  A: () => pressed("auto-all"),
  p: () => pressed("carry"),
  P: () => pressed("carry-all"),
  l: () => pressed("add-label"),
  o: () => pressed("open"),
  s: () => pressed("export"),
  Delete: () => pressed("clear-slice"),
  "?": () => pressed("help"),
  Escape: () => jobRunning() && pressed("cancel"),
};

function key(event) {
  const typing = event.target.matches("input:not([type=range]):not([type=checkbox]), select, textarea");
  if (typing || document.querySelector("dialog[open]") || !now.state) return;
  if (event.repeat && now.held) return;
  if (event.ctrlKey || event.metaKey) {
    const letter = event.key.toLowerCase();
    const which = letter === "z" && !event.shiftKey ? "undo" : letter === "y" || letter === "z" ? "redo" : null;
    if (!which) return;
    event.preventDefault();
    return unheld(() => pressed(which));
  }
  if (event.key === " ") {
    keys.space = true;
    return event.preventDefault();
  }
  const on = event.target.matches("button") && ["Enter", " "].includes(event.key);
  const number = /^[1-9]$/.test(event.key) ? now.state.labels[Number(event.key) - 1] : null;
  if (number) unheld(() => act("label", `/api/labels/${number.value}`, { name: null }, number.name));
  else if (KEYS[event.key] && !on && !event.altKey) {
    event.preventDefault();
    unheld(KEYS[event.key]);
  }
}

// --- wiring ----------------------------------------------------------------------------------------------

function wire() {
  const canvas = $("canvas");
  canvas.addEventListener("pointerdown", press);
  canvas.addEventListener("pointermove", hover);
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", drop);
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("wheel", wheel, { passive: false });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  // After the mouse has pressed a button, keys are meant for the slice again.
  document.addEventListener("click", ({ target, detail }) => {
    if (detail && target.closest("button") && !document.querySelector("dialog[open]")) canvas.focus();
  });
  document.addEventListener("keydown", key);
  document.addEventListener("keyup", (event) => {
    if (event.key === " ") keys.space = false;
  });
  window.addEventListener("beforeunload", (event) => {
    if (unsaved()) event.preventDefault();
  });

  const stage = $("stage");
  stage.addEventListener("dragover", (event) => {
    event.preventDefault();
    stage.classList.add("over");
  });
  stage.addEventListener("dragleave", () => stage.classList.remove("over"));
  stage.addEventListener("drop", (event) => {
    event.preventDefault();
    stage.classList.remove("over");
    upload(event.dataTransfer.files);
  });
  $("open").onclick = $("open-too").onclick = () => $("files").click();
  $("files").onchange = async () => {
    await upload($("files").files);
    $("files").value = "";
  };
  $("images").onchange = () => {
    if (sure()) openListed($("images").value);
    else list();
    $("images").blur();
  };
  $("models").onchange = () => {
    $("models").blur();
    act("changing the model", "/api/model", { number: Number($("models").value) }, (answer) => {
      if (!now.about.models[answer.model].promptable && now.tool === "prompt") choose("brush");
      return `${now.about.models[answer.model].name} is in use`;
    });
  };
  for (const button of document.querySelectorAll("[data-tool]")) button.onclick = () => choose(button.dataset.tool);
  $("finish").onclick = () => act("", "/api/finish", undefined, "object done; the next click begins another");
  $("hide").onclick = () => {
    view.hidden = !view.hidden;
    view.draw();
    render();
  };
  $("fit").onclick = () => view.fit();
  // What was undone is shown, also where that was on another slice.
  const moved =
    (word) =>
    ({ moved }) => {
      if (!moved) return "nothing left";
      if (moved.slices && !(moved.slices[0] <= now.index && now.index < moved.slices[1])) go(moved.slices[0]);
      return `${word}: ${moved.what}`;
    };
  $("undo").onclick = () => act("undoing", "/api/undo", undefined, moved("undone"));
  $("redo").onclick = () => act("doing again", "/api/redo", undefined, moved("done again"));
  $("export").onclick = offerFormats;
  $("naming-cancel").onclick = () => $("naming").close();
  $("labels").ondblclick = rename;
  $("help").onclick = () => $("keys").showModal();
  $("cancel").onclick = () => ask("POST", "/api/cancel").catch(() => {});
  $("slice").oninput = () => go(Number($("slice").value));
  $("add-label").onclick = () =>
    name("New label", "", (text) => act("label", "/api/labels", { name: text }, `${text} is drawn now`));
  $("keep").onchange = () => act("", "/api/keep", { keep: $("keep").checked });
  $("opacity").oninput = () => {
    view.opacity = $("opacity").value / 100;
    view.draw();
  };
  $("radius").oninput = () => {
    $("radius-shown").textContent = Number($("radius").value);
    if (view.cursor) view.cursor.radius = Number($("radius").value);
    view.draw();
  };
  const levels = () => {
    const [level, width] = [Number($("level").value), Number($("width").value)];
    setWindow(level - width / 2, level + width / 2);
  };
  $("level").oninput = $("width").oninput = levels;
  $("channels").onchange = () => act("channel", "/api/channel", { channel: Number($("channels").value) }, "");
  $("auto-slice").onclick = () =>
    act("segmenting this slice", "/api/automatic", { index: now.index }, "this slice is segmented");
  $("auto-all").onclick = () => act("", "/api/automatic", { index: null });
  $("carry").onclick = () => act("", "/api/propagate", { index: now.index, steps: steps(), way: $("way").value });
  $("carry-all").onclick = () => act("", "/api/propagate", { index: now.index, steps: null, way: $("way").value });
  $("clear-slice").onclick = () => act("", "/api/clear", { index: now.index, every: false }, "cleared on this slice");
  $("clear-label").onclick = () => act("", "/api/clear", { index: null, every: false }, "cleared everywhere");
  $("clear-all").onclick = () => act("", "/api/clear", { index: null, every: true }, "all labels cleared");
  // A range keeps the arrow keys to itself; slices are what they are for.
  for (const range of document.querySelectorAll("input[type=range]"))
    range.addEventListener("change", () => range.blur());
}

// A duplicated tab begins with a copy of sessionStorage, and so with the session of another page. Pages tell each other
// which one they use; of two with the same the one of the lower rank keeps it, and that is 0 once a page has begun.
const pages = new BroadcastChannel("samlora");
const own = () => sessionStorage.getItem("session");
let rank = Math.random();
let taken = false;
const claim = () => pages.postMessage({ session: own(), rank });
pages.onmessage = ({ data }) => {
  if (data.session !== own()) return;
  if (rank < data.rank) claim();
  else taken ||= data.rank < rank;
};

async function free() {
  if (!own()) return false;
  claim();
  await new Promise((done) => setTimeout(done, 150));
  return !taken;
}

async function begin() {
  try {
    const anew = async () => sessionStorage.setItem("session", (await ask("POST", "/api/session")).session);
    if (!(await free())) await anew();
    rank = 0;
    now.about = await ask("GET", "/api/about").catch(async (error) => {
      if (error.status !== 410) throw error;
      await anew();
      return ask("GET", "/api/about");
    });
  } catch (error) {
    return say(error.message, true);
  }
  $("device").textContent = now.about.device;
  $("device").title = "Where the model computes";
  $("models").replaceChildren(
    ...now.about.models.map((model, n) => element("option", model.name, { value: n, title: model.detail })),
  );
  const listed = now.about.images.map((image) => element("option", image, { value: image }));
  $("images").replaceChildren(
    element("option", now.about.images.length ? "choose…" : "none", { value: "", disabled: true }),
    ...listed,
  );
  wire();
  await take(await ask("GET", "/api/state"));
  if (!now.about.models[now.state.model].promptable) now.tool = "brush";
  if (now.state.image) {
    list(now.about.images.includes(now.state.image.name) ? now.state.image.name : "");
    say(imageIsOpen());
  } else if (now.about.images.length) {
    await openListed(now.about.images[0]);
  } else say("open an image to begin");
  render();
}

begin();
