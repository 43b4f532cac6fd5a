// Recordings: read, recorded, written, drawn.

// Read a recording as one channel of float32 samples at a rate.
export async function readSound(file, rate) {
  let sound;
  try {
    // A context resamples what it decodes to its own rate.
    sound = await new OfflineAudioContext(1, 1, rate).decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} is not a recording that this browser can read.`);
  }
  const mixed = sound.getChannelData(0).slice();
  for (let channel = 1; channel < sound.numberOfChannels; channel++)
    sound.getChannelData(channel).forEach((value, i) => (mixed[i] += value));
  return mixed.map((value) => value / sound.numberOfChannels);
}

// Begin to record the microphone. Returns a function that ends it and gives the file.
export async function record() {
  if (!navigator.mediaDevices)
    throw new Error("Browsers give the microphone to pages of https and localhost only.");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: true },
    });
  } catch (error) {
    if (error.name === "NotFoundError") throw new Error("There is no microphone.");
    if (error.name === "NotAllowedError")
      throw new Error("This page may not use the microphone: allow it in the browser's settings for it.");
    throw new Error(`The microphone cannot be used: ${error.message}`);
  }
  const recorder = new MediaRecorder(stream, { audioBitsPerSecond: 256_000 });
  const parts = [];
  recorder.ondataavailable = ({ data }) => parts.push(data);
  recorder.start();
  return () =>
    new Promise((resolve) => {
      recorder.onstop = () => {
        stream.getTracks().forEach((track) => track.stop());
        resolve(new File(parts, "The recording", { type: recorder.mimeType }));
      };
      recorder.stop();
    });
}

// Samples as a WAV file of 16 bits.
export function toWav(samples, rate) {
  const bytes = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, word) => [...word].forEach((letter, i) => bytes.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  bytes.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  bytes.setUint32(16, 16, true);
  bytes.setUint16(20, 1, true); // integers
  bytes.setUint16(22, 1, true); // one channel
  bytes.setUint32(24, rate, true);
  bytes.setUint32(28, 2 * rate, true);
  bytes.setUint16(32, 2, true);
  bytes.setUint16(34, 16, true);
  text(36, "data");
  bytes.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, i) =>
    bytes.setInt16(44 + 2 * i, Math.max(-32768, Math.min(32767, Math.round(32768 * value))), true),
  );
  return new Blob([bytes.buffer], { type: "audio/wav" });
}

const WINDOW = 512; // samples of a column, a power of two
const RANGE = 80; // dB below the loudest that are drawn
const COLOURS = [[13, 8, 45], [84, 15, 109], [187, 55, 84], [249, 142, 9], [252, 255, 164]];

// Draw a spectrogram from 0 Hz, at the bottom, to half the rate.
export function drawSpectrogram(canvas, samples, columns = 600) {
  const rows = WINDOW / 2;
  const levels = new Float32Array(columns * rows);
  const [real, imaginary] = [new Float64Array(WINDOW), new Float64Array(WINDOW)];
  for (let column = 0; column < columns; column++) {
    const start = Math.round((column / (columns - 1)) * samples.length - WINDOW / 2);
    for (let i = 0; i < WINDOW; i++) {
      real[i] = (samples[start + i] ?? 0) * (0.5 - 0.5 * Math.cos((2 * Math.PI * i) / WINDOW));
      imaginary[i] = 0;
    }
    fourier(real, imaginary);
    for (let row = 0; row < rows; row++)
      levels[row * columns + column] = 10 * Math.log10(real[row] ** 2 + imaginary[row] ** 2 + 1e-12);
  }
  const loudest = levels.reduce((most, level) => Math.max(most, level), -Infinity);
  canvas.width = columns;
  canvas.height = rows;
  const drawn = new ImageData(columns, rows);
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      const share = Math.max(0, 1 + (levels[row * columns + column] - loudest) / RANGE);
      drawn.data.set([...colour(share), 255], 4 * ((rows - 1 - row) * columns + column));
    }
  canvas.getContext("2d").putImageData(drawn, 0, 0);
}

function colour(share) {
  const at = share * (COLOURS.length - 1);
  const below = Math.min(Math.floor(at), COLOURS.length - 2);
  return COLOURS[below].map((value, i) => value + (at - below) * (COLOURS[below + 1][i] - value));
}

// Fast Fourier transform in place, of a power of two of values.
function fourier(real, imaginary) {
  const length = real.length;
  for (let i = 1, j = 0; i < length; i++) {
    let bit = length >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [real[i], real[j]] = [real[j], real[i]];
      [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
    }
  }
  for (let half = 1; half < length; half *= 2)
    for (let k = 0; k < half; k++) {
      const [cosine, sine] = [Math.cos((Math.PI * k) / half), -Math.sin((Math.PI * k) / half)];
      for (let i = k; i < length; i += 2 * half) {
        const j = i + half;
        const turnedReal = real[j] * cosine - imaginary[j] * sine;
        const turnedImaginary = real[j] * sine + imaginary[j] * cosine;
        [real[j], imaginary[j]] = [real[i] - turnedReal, imaginary[i] - turnedImaginary];
        real[i] += turnedReal;
        imaginary[i] += turnedImaginary;
      }
    }
}
