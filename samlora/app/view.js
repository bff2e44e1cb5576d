"use strict";
// The canvas: one slice with its labels, in the shape of the pixels, zoomed and moved; it knows nothing of the server.

const ARRAYS = { uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array, float32: Float32Array };
const MOST_ZOOM = 40;

const sheet = (width, height) => Object.assign(document.createElement("canvas"), { width, height });

export class View {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.image = null;
    this.at = null; // the slice that is shown
    this.window = [0, 1];
    this.opacity = 0.35;
    this.hidden = false;
    this.marks = null; // {points: [[x, y, positive]], box}
    this.drag = null; // box being drawn, [x0, y0, x1, y1] in pixels of the slice
    this.traces = []; // {at, path, radius, colour} of each stroke that is drawn or awaits its answer; at: its slice
    this.cursor = null; // {x, y, radius} of the brush
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  open(image) {
    const same = this.image && String(this.image.shape) === String(image.shape) && this.image.plane === image.plane;
    this.image = image;
    const [, height, width] = image.shape;
    this.base = sheet(width, height);
    this.overlay = sheet(width, height);
    this.at = this.values = this.labels = null;
    this.outlines = new Map();
    if (!same) this.fit();
  }

  // --- what is shown

  show(at, values, labels, colours) {
    this.at = at;
    if (values !== this.values) {
      this.values = values;
      this.develop();
    }
    if (labels !== this.labels || colours !== this.colours) {
      this.labels = labels;
      this.colours = colours;
      this.tint();
    }
    this.draw();
  }

  setWindow(low, high) {
    this.window = [low, Math.max(high, low + 1e-6)];
    if (this.values) this.develop();
    this.draw();
  }

  // Values -> gray, by a table where they are whole numbers: a change of the window costs no request.
  develop() {
    const { dtype, colours } = this.image;
    const [low, high] = this.window;
    const picture = new ImageData(this.base.width, this.base.height);
    const pixels = new Uint32Array(picture.data.buffer);
    const gray = (value) => Math.max(0, Math.min(255, Math.round(((value - low) / (high - low)) * 255)));
    const values = this.values;
    if (colours) {
      const table = Uint8Array.from({ length: 256 }, (_, value) => gray(value));
      for (let at = 0, from = 0; at < pixels.length; at++, from += 3) {
        pixels[at] =
          0xff000000 | (table[values[from + 2]] << 16) | (table[values[from + 1]] << 8) | table[values[from]];
      }
    } else if (dtype === "float32") {
      for (let at = 0; at < pixels.length; at++) pixels[at] = 0xff000000 | (gray(values[at]) * 0x010101);
    } else {
      const first = dtype === "int16" ? -32768 : 0;
      const table = Uint32Array.from(
        { length: dtype === "uint8" ? 256 : 65536 },
        (_, n) => 0xff000000 | (gray(n + first) * 0x010101),
      );
      for (let at = 0; at < pixels.length; at++) pixels[at] = table[values[at] - first];
    }
    this.base.getContext("2d").putImageData(picture, 0, 0);
  }

  // Labels -> colours, and the outline of each: the edges between its pixels and others.
  tint() {
    const { width, height } = this.overlay;
    const labels = this.labels;
    const picture = new ImageData(width, height);
    const pixels = new Uint32Array(picture.data.buffer);
    const table = new Uint32Array(256);
    for (const [value, colour] of this.colours) {
      const [r, g, b] = [1, 3, 5].map((n) => parseInt(colour.slice(n, n + 2), 16));
      table[value] = (255 << 24) | (b << 16) | (g << 8) | r;
    }
    for (let at = 0; at < pixels.length; at++) pixels[at] = table[labels[at]];
    this.overlay.getContext("2d").putImageData(picture, 0, 0);

    this.outlines = new Map();
    const line = (value, x0, y0, x1, y1) => {
      if (!value) return;
      if (!this.outlines.has(value)) this.outlines.set(value, new Path2D());
      const path = this.outlines.get(value);
      path.moveTo(x0, y0);
      path.lineTo(x1, y1);
    };
    // Runs along the lines between rows, then between columns, where the labels of both sides are the same two.
    const scan = (lines, length, step, along, put) => {
      for (let n = 0; n <= lines; n++) {
        for (let m = 0, start = 0, a = 0, b = 0; m <= length; m++) {
          const one = m < length && n > 0 ? labels[(n - 1) * step + m * along] : 0;
          const other = m < length && n < lines ? labels[n * step + m * along] : 0;
          if (m < length && one === a && other === b) continue;
          if (a !== b) {
            put(a, n, start, m);
            put(b, n, start, m);
          }
          start = m;
          a = one;
          b = other;
        }
      }
    };
    scan(height, width, width, 1, (value, y, from, to) => line(value, from, y, to, y));
    scan(width, height, 1, width, (value, x, from, to) => line(value, x, from, x, to));
  }

  // --- places: pixels of the slice (edges at whole numbers) and of the canvas (CSS pixels)

  get scales() {
    const { aspect, flip_lr, flip_ud } = this.image.display;
    return [this.zoom * (flip_lr ? -1 : 1), this.zoom * aspect * (flip_ud ? -1 : 1)];
  }

  toCanvas(x, y) {
    const [, height, width] = this.image.shape;
    const [sx, sy] = this.scales;
    return [this.centre[0] + (x - width / 2) * sx, this.centre[1] + (y - height / 2) * sy];
  }

  toSlice(u, v) {
    const [, height, width] = this.image.shape;
    const [sx, sy] = this.scales;
    return [(u - this.centre[0]) / sx + width / 2, (v - this.centre[1]) / sy + height / 2];
  }

  fit() {
    if (!this.image) return;
    const [, height, width] = this.image.shape;
    const { clientWidth, clientHeight } = this.canvas;
    this.zoom = 0.97 * Math.min(clientWidth / width, clientHeight / (height * this.image.display.aspect));
    this.centre = [clientWidth / 2, clientHeight / 2];
    this.fitted = true;
    this.draw();
  }

  zoomBy(factor, u, v) {
    if (!this.image) return;
    const [x, y] = this.toSlice(u, v);
    this.zoom = Math.max(0.05, Math.min(MOST_ZOOM, this.zoom * factor));
    const [nu, nv] = this.toCanvas(x, y);
    this.move(u - nu, v - nv);
  }

  move(du, dv) {
    this.centre = [this.centre[0] + du, this.centre[1] + dv];
    this.fitted = false;
    this.draw();
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const size = [this.canvas.clientWidth, this.canvas.clientHeight];
    if (this.image && this.size && !this.fitted) this.move((size[0] - this.size[0]) / 2, (size[1] - this.size[1]) / 2);
    this.size = size;
    [this.canvas.width, this.canvas.height] = size.map((length) => Math.round(length * ratio));
    if (this.fitted) this.fit();
    else this.draw();
  }

  // --- drawing

  // The stroke is among the labels by now, or nothing came of it.
  forget(trace) {
    this.traces = this.traces.filter((one) => one !== trace);
    this.draw();
  }

  draw() {
    if (this.asked) return;
    this.asked = requestAnimationFrame(() => {
      this.asked = null;
      this.paint();
    });
  }

  paint() {
    const { context: c, canvas } = this;
    const ratio = window.devicePixelRatio || 1;
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.clearRect(0, 0, canvas.width, canvas.height);
    if (!this.image || !this.values) return;
    const [sx, sy] = this.scales;
    const [left, top] = this.toCanvas(0, 0);
    const place = new DOMMatrix([sx * ratio, 0, 0, sy * ratio, left * ratio, top * ratio]);
    c.setTransform(place);
    c.imageSmoothingEnabled = this.zoom < 16; // closer, one wants to see the pixels
    c.imageSmoothingQuality = "high";
    c.drawImage(this.base, 0, 0);
    if (!this.hidden && this.labels) {
      c.imageSmoothingEnabled = false;
      c.globalAlpha = this.opacity;
      c.drawImage(this.overlay, 0, 0);
      c.globalAlpha = 1;
      c.setTransform(1, 0, 0, 1, 0, 0);
      c.lineWidth = 1.5 * ratio;
      for (const [value, path] of this.outlines) {
        const placed = new Path2D();
        placed.addPath(path, place);
        c.strokeStyle = this.colours.get(value) || "#ffffff";
        c.stroke(placed);
      }
    }
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    for (const trace of this.traces) if (trace.at === this.at) this.paintTrace(trace);
    if (this.marks) this.paintMarks();
    if (this.drag) this.paintBox(this.drag, [5, 4]);
    if (this.cursor) {
      const [u, v] = this.toCanvas(this.cursor.x, this.cursor.y);
      c.strokeStyle = "#ffffffcc";
      c.lineWidth = 1;
      c.beginPath();
      c.arc(u, v, this.cursor.radius * this.zoom, 0, 2 * Math.PI);
      c.stroke();
    }
  }

  paintTrace(trace) {
    const c = this.context;
    c.strokeStyle = c.fillStyle = trace.colour;
    c.globalAlpha = 0.6;
    c.lineCap = c.lineJoin = "round";
    c.lineWidth = 2 * trace.radius * this.zoom;
    c.beginPath();
    const places = trace.path.map(([x, y]) => this.toCanvas(x + 0.5, y + 0.5));
    places.forEach(([u, v]) => c.lineTo(u, v));
    if (places.length === 1) c.lineTo(places[0][0] + 0.01, places[0][1]);
    c.stroke();
    c.globalAlpha = 1;
  }

  paintMarks() {
    const c = this.context;
    if (this.marks.box)
      this.paintBox([...this.marks.box.slice(0, 2), ...this.marks.box.slice(2).map((n) => n + 1)], []);
    for (const [x, y, positive] of this.marks.points) {
      const [u, v] = this.toCanvas(x + 0.5, y + 0.5);
      c.beginPath();
      c.arc(u, v, 6, 0, 2 * Math.PI);
      c.fillStyle = positive ? "#2fbf71" : "#e5484d";
      c.fill();
      c.lineWidth = 1.5;
      c.strokeStyle = "#ffffff";
      c.stroke();
      c.beginPath();
      c.moveTo(u - 3, v);
      c.lineTo(u + 3, v);
      if (positive) {
        c.moveTo(u, v - 3);
        c.lineTo(u, v + 3);
      }
      c.stroke();
    }
  }

  paintBox([x0, y0, x1, y1], dash) {
    const c = this.context;
    const [u0, v0] = this.toCanvas(x0, y0);
    const [u1, v1] = this.toCanvas(x1, y1);
    for (const [colour, width] of [
      ["#000000aa", 3],
      ["#ffffff", 1.5],
    ]) {
      c.strokeStyle = colour;
      c.lineWidth = width;
      c.setLineDash(dash);
      c.strokeRect(Math.min(u0, u1), Math.min(v0, v1), Math.abs(u1 - u0), Math.abs(v1 - v0));
    }
    c.setLineDash([]);
  }

  // The value under a pixel, as text.
  valueAt(x, y) {
    const [, height, width] = this.image.shape;
    if (!this.values || x < 0 || y < 0 || x >= width || y >= height) return "";
    const at = y * width + x;
    if (this.image.colours) return [...this.values.slice(3 * at, 3 * at + 3)].join(" ");
    return String(Math.round(this.values[at] * 1000) / 1000);
  }
}

export const typed = (dtype, buffer) => new ARRAYS[dtype](buffer);
