// The tokenizers, off the page's thread: onnxruntime-web, and the encoder and decoder of each kind.
import * as ort from "./runtime/ort.js";

const NAMES = { image: ["image_codes", "pixel_values"], speech: ["audio_codes", "audio_values"] };
const opened = {};
let runtime = null;

// Fetch a file of known size, and report the bytes that have come so far.
async function read({ path, bytes }, arrived) {
  // Ask whether a kept copy is still right: a newer Space has other files under the same names.
  const response = await fetch(path, { cache: "no-cache" });
  if (!response.ok) throw new Error(`${path} could not be loaded (${response.status}).`);
  const content = new Uint8Array(bytes);
  let at = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > bytes) throw new Error(`${path} is longer than it should be.`);
    content.set(value, at);
    at += value.length;
    arrived(value.length);
  }
  if (at < bytes) throw new Error(`${path} broke off after ${at} of ${bytes} bytes. Try again.`);
  return content;
}

// Load the runtime, once, and encoder and decoder of a kind.
async function open(model, runtimeFile, report) {
  const files = [...(runtime ? [] : [runtimeFile]), model.encoder, model.decoder];
  const total = files.reduce((sum, file) => sum + file.bytes, 0);
  let done = 0;
  const arrived = (bytes) => report({ done: (done += bytes), total });
  const contents = await Promise.all(files.map((file) => read(file, arrived)));
  if (!runtime) {
    runtime = contents.shift();
    ort.env.wasm.wasmBinary = runtime;
    // Threads share memory, which browsers allow to isolated pages only.
    ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  }
  report({ starting: true });
  const options = { executionProviders: ["wasm"] };
  const [encoder, decoder] = [
    await ort.InferenceSession.create(contents[0], options),
    await ort.InferenceSession.create(contents[1], options),
  ];
  return { encoder, decoder };
}

async function run({ kind, part, values, shape }) {
  const session = opened[kind][part];
  const encoding = part === "encoder";
  // Codes are int64 in the graphs and plain integers on the page.
  const given = encoding
    ? new ort.Tensor("float32", values, shape)
    : new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
  const started = performance.now();
  const made = (await session.run({ [session.inputNames[0]]: given }))[NAMES[kind][encoding ? 0 : 1]];
  const seconds = (performance.now() - started) / 1000;
  const found = encoding ? Int32Array.from(made.data, Number) : Float32Array.from(made.data);
  made.dispose();
  return { values: found, shape: made.dims, seconds };
}

self.onmessage = async ({ data }) => {
  const report = (progress) => self.postMessage({ id: data.id, progress });
  try {
    if (data.part) {
      const result = await run(data);
      self.postMessage({ id: data.id, result }, [result.values.buffer]);
    } else {
      opened[data.kind] ??= await open(data.model, data.runtime, report);
      self.postMessage({ id: data.id, result: true });
    }
  } catch (error) {
    self.postMessage({ id: data.id, error: String(error.message ?? error) });
  }
};
