// Recordings: samples to codes and back.

import { codesEach, drawCodes, packedBytes, readCodes } from "./codes.js";
import { Panel, kilobytes, seconds } from "./panel.js";
import { drawSpectrogram, readSound, record, toWav } from "./sound.js";

const LEAST_FRAMES = 7; // the graphs take no fewer
const MOST_SECONDS = 30;
const MOST_RECORDED = 15; // seconds

export class SpeechPanel extends Panel {
  constructor(engine) {
    super("speech", engine);
    const { sampling_rate: rate, hop_length: hop } = this.model;
    this.find(".about").textContent =
      `${this.model.name}: ${codesEach(this.model)} for each ${hop} samples ` +
      `at ${rate.toLocaleString("en")} Hz, ${(this.model.num_quantizers * rate) / hop} codes a second.`;
    this.stop = null;
    this.find(".record").onclick = () => (this.stop ? this.stop() : this.run(() => this.listen()));
  }

  // Record until the button is pressed again or the time is over, then encode.
  async listen() {
    const button = this.find(".record");
    const end = await record();
    const started = performance.now();
    const clock = setInterval(() => {
      const gone = (performance.now() - started) / 1000;
      this.say(`Recording: ${Math.floor(gone)} of ${MOST_RECORDED} seconds`, gone / MOST_RECORDED);
    }, 100);
    button.textContent = "Stop";
    button.disabled = false;
    await new Promise((resolve) => {
      this.stop = resolve;
      setTimeout(resolve, 1000 * MOST_RECORDED);
    });
    clearInterval(clock);
    this.stop = null;
    button.textContent = "Record";
    button.disabled = true;
    await this.encode(await end());
  }

  async encode(file) {
    const { sampling_rate: rate, hop_length: hop } = this.model;
    this.say("Reading the recording");
    const read = await readSound(file, rate);
    if (!read.length) throw new Error(`${file.name} is empty.`);
    const original = read.slice(0, MOST_SECONDS * rate);
    const frames = Math.max(LEAST_FRAMES, Math.ceil(original.length / hop));
    const padded = new Float32Array(frames * hop); // with silence
    padded.set(original);
    const { codes, made } = await this.reconstruct(padded, [1, 1, padded.length]);
    drawSpectrogram(this.find(".original"), original);
    this.offer(".hear-original", toWav(original, rate));
    const cut = read.length > original.length;
    const whole = (read.length / rate).toFixed(1);
    const note = cut ? `Only the first ${MOST_SECONDS} of ${whole} seconds were taken.` : "";
    this.showDecoded(codes, made, original.length, note);
  }

  async decode(text, name) {
    const { values, lengths, sizes } = readCodes(this.model, text, name, 1);
    const { sampling_rate: rate, hop_length: hop } = this.model;
    const frames = lengths.at(-1);
    const most = (MOST_SECONDS * rate) / hop;
    if (frames < LEAST_FRAMES || frames > most)
      throw new Error(`${name} holds ${frames} codes a quantizer; from ${LEAST_FRAMES} to ${most} fit.`);
    await this.load();
    this.say("Decoding");
    const codes = { values, shape: [1, this.model.num_quantizers, frames] };
    const samples = Number.isInteger(sizes.samples) && sizes.samples > 0 ? sizes.samples : frames * hop;
    this.showDecoded(codes, await this.engine.decode(this.kind, codes.values, codes.shape), samples);
  }

  // samples: length of the original.
  showDecoded(codes, made, samples, note = "") {
    const { sampling_rate: rate, hop_length: hop } = this.model;
    const decoded = made.values.slice(0, samples);
    drawSpectrogram(this.find(".made"), decoded);
    const wav = toWav(decoded, rate);
    this.offer(".hear-made", wav);
    // A second in a line, or the codes of a quantizer.
    const line = this.model.num_quantizers > 1 ? codes.shape.at(-1) : Math.round(rate / hop);
    drawCodes(this.find(".drawn"), codes.values, Math.min(codes.values.length, line));
    const bytes = packedBytes(this.model, codes.values.length);
    const length = decoded.length / rate;
    this.figures([
      ["long", seconds(length)],
      ["codes", codes.values.length.toLocaleString("en")],
      ["of codes", kilobytes(bytes)],
      ["kbit/s", ((8 * bytes) / length / 1000).toFixed(2)],
      ["smaller than raw samples", `${Math.round((2 * decoded.length) / bytes)} ×`],
      ["to encode", codes.seconds === undefined ? null : seconds(codes.seconds)],
      ["to decode", seconds(made.seconds)],
    ]);
    this.show(codes, { samples: decoded.length, sampling_rate: rate }, wav, codes.seconds !== undefined, note);
  }
}
