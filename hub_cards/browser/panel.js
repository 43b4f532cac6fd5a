// What image and speech share: input, progress, errors, figures, files of codes.

import { writeCodes } from "./codes.js";

const MOST_BYTES = 40e6; // of a file: a browser holds all of it, decoded

export class Panel {
  // kind: "image" or "speech". Subclasses have encode(file) and decode(text, name).
  constructor(kind, engine) {
    this.kind = kind;
    this.engine = engine;
    this.model = engine.about[kind];
    this.root = document.getElementById(kind);
    this.busy = false;
    for (const input of this.root.querySelectorAll("input[type=file]"))
      input.onchange = () => {
        const [file] = input.files;
        input.value = ""; // so that the same file can be chosen again
        this.take(file);
      };
    const example = this.find(".example");
    example.hidden = !this.model.example;
    example.onclick = () => this.run(async () => this.encode(await fetched(this.model.example)));
    this.root.ondragover = (event) => {
      event.preventDefault();
      this.root.classList.add("over");
    };
    this.root.ondragleave = () => this.root.classList.remove("over");
    this.root.ondrop = (event) => {
      event.preventDefault();
      this.root.classList.remove("over");
      this.take(event.dataTransfer.files[0]);
    };
  }

  // Take an image or a recording, or codes.
  take(file) {
    if (!file) return;
    this.run(async () => {
      if (file.size > MOST_BYTES)
        throw new Error(`${file.name} has more than ${MOST_BYTES / 1e6} MB, the most that fits here.`);
      if (file.name.toLowerCase().endsWith(".json")) await this.decode(await file.text(), file.name);
      else await this.encode(file);
    });
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  // Do one piece of work at a time; its error is shown in words.
  async run(work) {
    if (this.busy) return;
    this.allow(false);
    this.find(".error").hidden = true;
    try {
      await work();
    } catch (error) {
      this.find(".error").textContent = error.message;
      this.find(".error").hidden = false;
    } finally {
      this.say("");
      this.allow(true);
    }
  }

  // Take input, or none while there is work.
  allow(input) {
    this.busy = !input;
    this.find(".results").setAttribute("aria-busy", this.busy);
    for (const control of this.root.querySelectorAll(".source :is(button, input, select)"))
      control.disabled = this.busy;
  }

  // Say what is under way and how far it is, from 0 to 1 if that is known.
  say(text, share = null) {
    const status = this.find(".status");
    if (status.textContent !== text) status.textContent = text; // screen readers tell each change
    const progress = this.find("progress");
    progress.hidden = !text;
    if (share === null) progress.removeAttribute("value");
    else progress.value = share;
  }

  async load() {
    const megabytes = (bytes) => Math.round(bytes / 1e6);
    await this.engine.load(this.kind, ({ done, total, starting }) => {
      if (starting) this.say("Starting the tokenizer");
      else this.say(`Loading the tokenizer: ${megabytes(done)} of ${megabytes(total)} MB`, done / total);
    });
  }

  // Load, encode the values (given away), decode their codes: {codes, made}.
  async reconstruct(values, shape) {
    await this.load();
    this.say("Encoding");
    const codes = await this.engine.encode(this.kind, values, shape);
    this.say("Decoding");
    return { codes, made: await this.engine.decode(this.kind, codes.values, codes.shape) };
  }

  // Show pairs of a name and a value; a value of null is left out.
  figures(pairs) {
    this.find(".figures").replaceChildren(
      ...pairs
        .filter(([, value]) => value !== null)
        .map(([name, value]) => {
          const box = document.createElement("div");
          for (const [tag, text] of [["dt", name], ["dd", value]])
            box.appendChild(document.createElement(tag)).textContent = text;
          return box;
        }),
    );
  }

  // Show the results, the original only if there is one, and offer codes and reconstruction as files.
  // note: what was done to the original.
  show(codes, sizes, made, hasOriginal, note) {
    this.find(".note").textContent = note;
    this.find(".note").hidden = !note;
    this.offer(".save-codes", new Blob([writeCodes(this.model, codes, sizes)], { type: "application/json" }));
    this.offer(".save-made", made);
    this.find(".of-original").hidden = !hasOriginal;
    this.find(".results").hidden = false;
  }

  // Put a blob behind a link or a player, in place of the one before. Returns the element.
  offer(selector, blob) {
    const element = this.find(selector);
    const attribute = element.tagName === "A" ? "href" : "src";
    if (element[attribute]) URL.revokeObjectURL(element[attribute]);
    element[attribute] = URL.createObjectURL(blob);
    return element;
  }
}

export function seconds(value) {
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

export function kilobytes(bytes) {
  return bytes < 1000 ? `${bytes} bytes` : `${(bytes / 1000).toFixed(bytes < 10_000 ? 2 : 1)} kB`;
}

async function fetched(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path} could not be loaded (${response.status}).`);
  return new File([await response.blob()], path.split("/").at(-1));
}
