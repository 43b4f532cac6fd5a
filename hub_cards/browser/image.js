// Images: pixels to codes and back.

import { codesEach, drawCodes, packedBytes, readCodes } from "./codes.js";
import { Panel, kilobytes, seconds } from "./panel.js";

const LEAST_CODES = 2; // a side; the graphs take no fewer
const MOST_CODES = 256; // a side

export class ImagePanel extends Panel {
  constructor(engine) {
    super("image", engine);
    const side = this.model.downsample_factor;
    this.find(".about").textContent =
      `${this.model.name}: ${codesEach(this.model)} for each ${side} × ${side} pixels.`;
    this.file = null;
    this.find(".long-side").onchange = () => this.file && this.run(() => this.encode(this.file));
  }

  async encode(file) {
    const longSide = Number(this.find(".long-side").value);
    const { original, note } = await readImage(file, longSide, this.model.downsample_factor);
    this.file = file;
    const { width, height } = original;
    const { codes, made } = await this.reconstruct(toValues(original), [1, 3, height, width]);
    put(this.find(".original"), original);
    await this.showDecoded(codes, made, original, note);
  }

  async decode(text, name) {
    const { values, lengths } = readCodes(this.model, text, name, 2);
    for (const side of lengths.slice(-2))
      if (side < LEAST_CODES || side > MOST_CODES)
        throw new Error(
          `${name} holds ${lengths.join(" × ")} codes; from ${LEAST_CODES} to ${MOST_CODES} a side fit.`,
        );
    await this.load();
    this.say("Decoding");
    const codes = { values, shape: [1, ...lengths] };
    await this.showDecoded(codes, await this.engine.decode(this.kind, codes.values, codes.shape));
  }

  // original: ImageData, if there is one.
  async showDecoded(codes, made, original = null, note = "") {
    const [rows, columns] = codes.shape.slice(-2);
    const levels = this.model.num_quantizers; // drawn one below the other
    const decoded = toImage(made.values, made.shape);
    const { width, height } = decoded;
    put(this.find(".made"), decoded);
    drawCodes(this.find(".drawn"), codes.values, columns);
    this.find(".drawn").style.aspectRatio = `${width} / ${height * levels}`;
    const bytes = packedBytes(this.model, codes.values.length);
    this.figures([
      ["pixels", `${width} × ${height}`],
      [`codes, ${columns} × ${rows}${levels > 1 ? ` × ${levels}` : ""}`, codes.values.length.toLocaleString("en")],
      ["of codes", kilobytes(bytes)],
      ["bits per pixel", ((8 * bytes) / (width * height)).toFixed(3)],
      ["smaller than raw pixels", `${Math.round((3 * width * height) / bytes)} ×`],
      ["PSNR", original && `${psnr(original, decoded).toFixed(2)} dB`],
      ["to encode", original && seconds(codes.seconds)],
      ["to decode", seconds(made.seconds)],
    ]);
    const picture = await new Promise((resolve) => this.find(".made").toBlob(resolve));
    this.show(codes, { height, width }, picture, original !== null, note);
  }
}

// Read an image: ImageData whose long side is at most `longSide`, cropped at the centre to whole codes; and a
// note of what was done.
async function readImage(file, longSide, factor) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name} is not an image that this browser can read.`);
  }
  const full = `${bitmap.width} × ${bitmap.height}`;
  const scale = Math.min(1, longSide / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const [whole, high] = [width, height].map((side) => side - (side % factor));
  if (Math.min(whole, high) < LEAST_CODES * factor)
    throw new Error(
      `The image is too small or too narrow: it has ${width} × ${height} pixels here, and at least ` +
        `${LEAST_CODES * factor} × ${LEAST_CODES * factor} are needed.`,
    );
  const canvas = new OffscreenCanvas(whole, high);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // behind transparent pixels
  context.fillRect(0, 0, whole, high);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, -Math.floor((width - whole) / 2), -Math.floor((height - high) / 2), width, height);
  bitmap.close();
  const changed = scale < 1 ? "Scaled down" : "Cropped";
  const note = full === `${whole} × ${high}` ? "" : `${changed} from ${full} pixels.`;
  return { original: context.getImageData(0, 0, whole, high), note };
}

// ImageData to float32 values (3, H, W) from -1 to 1.
function toValues({ data, width, height }) {
  const plane = width * height;
  const values = new Float32Array(3 * plane);
  for (let i = 0; i < plane; i++)
    for (let channel = 0; channel < 3; channel++)
      values[channel * plane + i] = data[4 * i + channel] / 127.5 - 1;
  return values;
}

// Values (1, 3, H, W) to ImageData.
function toImage(values, [, , height, width]) {
  const image = new ImageData(width, height);
  const plane = width * height;
  for (let i = 0; i < plane; i++) {
    // The array clamps and rounds.
    for (let channel = 0; channel < 3; channel++)
      image.data[4 * i + channel] = (values[channel * plane + i] + 1) * 127.5;
    image.data[4 * i + 3] = 255;
  }
  return image;
}

function put(canvas, image) {
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Peak signal-to-noise ratio in dB of two ImageData of one size.
function psnr(one, other) {
  let squares = 0;
  for (let i = 0; i < one.data.length; i++) squares += (one.data[i] - other.data[i]) ** 2; // alpha adds nothing
  return 10 * Math.log10((255 ** 2 * 3 * one.width * one.height) / squares);
}
