"use strict";
// Files come and go: opening, handing in, exporting; and the dialogs.
import { $, act, ask, Failure, imageIsOpen, jobRunning, now, queued, refresh, say, view, working } from "./core.js";
import { element } from "./panel.js";

const FORMATS = [
  ["nii.gz", "NIfTI", ".nii.gz", () => true],
  ["nrrd", "NRRD", ".nrrd", (image) => image.spacing],
  ["dicom-seg", "DICOM segmentation", ".dcm", (image) => image.dicom],
  ["png", "PNG, a number per label, in colours", ".png", (image) => !image.spacing && image.shape[0] === 1],
  ["tif", "TIFF, a page per slice", ".tif", (image) => !image.spacing && image.shape[0] > 1],
  ["names", "Names of the labels, for samlora evaluate --names", ".json", () => true],
];

// --- dialogs ---------------------------------------------------------------------------------------------

export function name(title, value, done) {
  $("naming-title").textContent = title;
  $("naming-name").value = value;
  $("naming").onclose = () => {
    if ($("naming").returnValue === "ok" && $("naming-name").value.trim()) done($("naming-name").value);
  };
  $("naming").returnValue = "";
  $("naming").showModal();
  $("naming-name").select();
}

function chooseSeries(series, open) {
  $("series").replaceChildren(
    ...series.map((text, n) => {
      const button = element("button", text);
      button.onclick = () => {
        $("choosing").close();
        open(String(n + 1));
      };
      return button;
    }),
  );
  $("choosing").showModal();
}

export function offerFormats() {
  if ($("export").disabled) return;
  $("formats").replaceChildren(
    ...FORMATS.filter(([, , , fits]) => fits(now.state.image)).map(([format, text, ending]) => {
      const button = element("button", text, { value: format });
      button.append(element("small", ending));
      button.onclick = () => {
        $("saving").close();
        save(format);
      };
      return button;
    }),
  );
  $("saving").showModal();
}

async function save(format) {
  working("writing…");
  try {
    await queued(); // with the strokes that are seen
    const answer = await ask("GET", `/api/export?format=${format}`, undefined, "blob");
    const named = /filename\*?=(?:utf-8'')?"?([^"]+)"?/i.exec(answer.headers.get("Content-Disposition"));
    const link = element("a", "", {
      href: URL.createObjectURL(await answer.blob()),
      download: decodeURIComponent(named[1]),
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    await refresh(); // by now the labels are not unsaved
    say(`saved as ${link.download}`);
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    say(error.message, true);
  } finally {
    working(null);
  }
}

export const unsaved = () => Boolean(now.state && (now.state.unsaved || view.traces.length));
export const sure = () => !unsaved() || confirm("The labels were not exported. Open another image and lose them?");

function opened(answer) {
  return answer.series ? "several series: choose one" : imageIsOpen();
}

let listed = ""; // the image that is open, as the list names it; "" for none of the list

// The list names what is open, also after another image could not be opened.
export function list(name = listed) {
  listed = name;
  $("images").value = name;
}

export function openListed(image, series = null) {
  say("");
  $("images").value = image;
  return act(`reading ${image}`, "/api/open", { name: image, series }, (answer) => {
    if (answer.series) chooseSeries(answer.series, (number) => openListed(image, number));
    else listed = image;
    return opened(answer);
  }).finally(list);
}

function openUploaded(series = null) {
  return act("reading", "/api/upload/open", { series }, (answer) => {
    if (answer.series) chooseSeries(answer.series, openUploaded);
    else list("");
    return opened(answer);
  });
}

export async function upload(files) {
  if (!files.length || jobRunning() || !sure()) return;
  const size = [...files].reduce((sum, file) => sum + file.size, 0);
  if (size > now.about.max_upload) {
    const [is, most] = [size, now.about.max_upload].map((bytes) => Math.round(bytes / 2 ** 20));
    return say(`${is} MB, and ${most} can be handed in: open it with samlora app FILE, or --max_upload_mb`, true);
  }
  const { revision } = now.state;
  try {
    await queued();
    await ask("POST", "/api/upload");
    for (const [n, file] of [...files].entries()) {
      working(`${file.name}`, n, files.length);
      $("cancel").hidden = true;
      await ask("PUT", `/api/upload/${encodeURIComponent(file.name)}`, file);
    }
    if (now.state.revision === revision || sure()) await openUploaded();
    else working(null);
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    say(error.message, true);
    working(null);
  }
}
