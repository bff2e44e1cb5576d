"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// Viewers: a slider over slices; every layer is one image whose source changes.
for (const viewer of document.querySelectorAll(".viewer")) {
  const frames = data.frames[viewer.dataset.frames];
  const slider = viewer.querySelector("input[type=range]");
  const output = viewer.querySelector("output");
  const stack = viewer.querySelector(".stack");
  const layers = ["background", "prediction", "reference", "difference"]
    .map((name) => [stack.querySelector("." + name), frames[name]])
    .filter(([image, sources]) => image && sources.length);
  const show = () => {
    const number = Number(slider.value);
    for (const [image, sources] of layers) image.src = sources[number];
    const text = `slice ${frames.slices[number] + 1} of ${frames.depth}`;
    output.textContent = text;
    slider.setAttribute("aria-valuetext", text);
  };
  if (slider) slider.addEventListener("input", show);
  for (const radio of viewer.querySelectorAll("input[type=radio]")) {
    radio.addEventListener("change", () => { stack.dataset.mode = radio.value; });
  }
}

// The table of cases: any measure, sorted by any column. Undefined values stay at the end.
const table = document.getElementById("cases");
if (table) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const choice = document.getElementById("measure");
  const key = (number) => data.measures[choice.value].better === "zero" ? Math.abs(number) : number;
  const byName = (a, b) => a.cells[0].textContent.localeCompare(b.cells[0].textContent, undefined, { numeric: true });

  const sort = (head, ascending) => {
    const column = heads.indexOf(head);
    const rows = [...body.rows];
    rows.sort((a, b) => {
      if (column === 0) return ascending ? byName(a, b) : byName(b, a);
      const [x, y] = [a, b].map((row) => row.cells[column].number);
      if (x === null || y === null) return (x === null) - (y === null) || byName(a, b);
      return (ascending ? key(x) - key(y) : key(y) - key(x)) || byName(a, b);
    });
    body.append(...rows);
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  };

  const fill = () => {
    const { values, scale, digits, better } = data.measures[choice.value];
    // A missed class has the diagonal as distance; beside it everything else would look alike.
    const sizes = values.flat().filter((number) => number !== null).map(Math.abs).sort((a, b) => a - b);
    const most = Math.max(sizes[Math.floor(0.9 * (sizes.length - 1))] || 0, 1e-9);
    for (const row of body.rows) {
      values[row.dataset.case].forEach((number, index) => {
        const cell = row.cells[index + 1];
        const mark = index && ["missed", "added"].includes(cell.dataset.state) ? "\u2020" : "";
        cell.number = number;
        cell.textContent = number === null ? "\u2013" : (number * scale).toFixed(digits) + mark;
        cell.classList.toggle("undefined", number === null);
        // Squared, so that small faults stay pale. Volumes are neither good nor bad.
        const fault = number === null ? 0 : better === "high" ? (scale === 100 ? 1 - number : 0) : Math.min(Math.abs(number) / most, 1);
        cell.style.setProperty("--heat", (fault * fault).toFixed(3));
      });
    }
  };

  for (const head of heads) {
    head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const worstUp = data.measures[choice.value].better === "high";
      sort(head, now ? now !== "ascending" : head === heads[0] || worstUp);
    });
  }
  choice.addEventListener("change", () => {
    fill();
    sort(heads[1], data.measures[choice.value].better === "high");
  });
  fill();
}
