// The worker as promises: load a tokenizer, encode, decode.

const BROKEN = "This browser cannot run the tokenizer.";

export class Engine {
  // about: models.json of this page.
  constructor(about) {
    this.about = about;
    this.waiting = new Map();
    this.number = 0;
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => this.answered(data);
    // The worker itself did not start, perhaps before anyone asked.
    this.worker.onerror = () => {
      this.broken = true;
      for (const id of this.waiting.keys()) this.answered({ id, error: BROKEN });
    };
  }

  answered({ id, progress, result, error }) {
    if (!this.waiting.has(id)) return; // bytes of a load that failed elsewhere
    const { resolve, reject, report } = this.waiting.get(id);
    if (progress) return report(progress);
    this.waiting.delete(id);
    if (error) reject(new Error(error));
    else resolve(result);
  }

  ask(message, report = () => {}, transferred = []) {
    if (this.broken) return Promise.reject(new Error(BROKEN));
    const id = this.number++;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject, report });
      this.worker.postMessage({ id, ...message }, transferred);
    });
  }

  // Load encoder and decoder of "image" or "speech"; `report` is told {done, total} in bytes, then {starting}.
  load(kind, report) {
    return this.ask({ kind, model: this.about[kind], runtime: this.about.runtime }, report);
  }

  // Float32Array of a shape to {values: Int32Array, shape, seconds}. The values are given away.
  encode(kind, values, shape) {
    return this.ask({ kind, part: "encoder", values, shape }, undefined, [values.buffer]);
  }

  // Integers of a shape to {values: Float32Array, shape, seconds}.
  decode(kind, values, shape) {
    return this.ask({ kind, part: "decoder", values, shape });
  }
}
