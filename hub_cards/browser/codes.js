// Codes in a file, in numbers and as a picture.

const FORMAT = "simvq-codes";
const MOST_AXES = 4; // that are looked at: codes have up to three

// Text of a file of codes, with the fields of the files that `simvq encode` writes.
// codes: {values, shape}, the shape with a batch of one; sizes: what decoding needs besides.
export function writeCodes(model, { values, shape }, sizes) {
  const lengths = shape.slice(1).filter((length, axis) => axis || length > 1); // a single quantizer has no axis
  const codes = nested(values, lengths);
  return JSON.stringify({ format: FORMAT, model: model.name, digest: model.digest, sizes, codes });
}

function nested(values, [length, ...rest]) {
  if (!rest.length) return Array.from(values);
  const step = values.length / length;
  return Array.from({ length }, (_, i) => nested(values.subarray(i * step, (i + 1) * step), rest));
}

// Read such a file: {values, lengths, sizes}, lengths of all axes, that of several quantizers first.
// axes: of a quantizer's codes. Throws an error that says what is wrong with it.
export function readCodes(model, text, name, axes) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error(`${name} is not a file of codes: it is not JSON.`);
  }
  if (file?.format !== FORMAT || !Array.isArray(file.codes) || !file.codes.length)
    throw new Error(`${name} is not a file of codes.`);
  if (file.digest !== model.digest)
    throw new Error(`${name} was made by another tokenizer, ${file.model}; this is ${model.name}.`);
  const lengths = [];
  for (let part = file.codes; Array.isArray(part) && lengths.length < MOST_AXES; part = part[0])
    lengths.push(part.length);
  const several = model.num_quantizers > 1;
  if (lengths.length !== axes + several || (several && lengths[0] !== model.num_quantizers))
    throw new Error(
      `${name} holds ${lengths.join(" × ")} codes; this tokenizer has ` +
        `${several ? `${model.num_quantizers} codes` : "one code"} a position.`,
    );
  checkLengths(file.codes, lengths, name);
  const values = file.codes.flat(MOST_AXES);
  for (const code of values)
    if (!Number.isInteger(code) || code < 0 || code >= model.codebook_size)
      throw new Error(
        `${name}: ${code} is not a code; codes are integers from 0 to ${model.codebook_size - 1}.`,
      );
  return { values: Int32Array.from(values), lengths, sizes: file.sizes ?? {} };
}

function checkLengths(part, [length, ...rest], name) {
  if (Array.isArray(part) !== (length !== undefined) || (length !== undefined && part.length !== length))
    throw new Error(`${name}: rows differ in length.`);
  if (length !== undefined) for (const inner of part) checkLengths(inner, rest, name);
}

// How many codes there are for each place, in words.
export function codesEach(model) {
  const size = model.codebook_size.toLocaleString("en");
  return model.num_quantizers > 1 ? `${model.num_quantizers} codes, each of ${size},` : `one of ${size} codes`;
}

// Bytes that codes need, packed.
export function packedBytes(model, count) {
  return Math.ceil((count * Math.log2(model.codebook_size)) / 8);
}

// Colour [red, green, blue] of a code: always the same one. Odd factors and shifts permute the 24-bit numbers,
// so that neighbouring codes get unrelated colours.
export function colourOfCode(code) {
  let mixed = code % 0x1000000;
  for (const factor of [0x9e3779, 0x85ebcb]) {
    mixed = ((mixed + 0x5bd1e9) * factor) % 0x1000000;
    mixed ^= mixed >> 11;
  }
  return [(mixed >> 16) & 255, (mixed >> 8) & 255, mixed & 255];
}

// Draw codes, `width` of them in a line, one pixel each: the style sheet enlarges them.
export function drawCodes(canvas, values, width) {
  canvas.width = width;
  canvas.height = Math.ceil(values.length / width);
  const drawn = new ImageData(canvas.width, canvas.height);
  values.forEach((code, i) => drawn.data.set([...colourOfCode(code), 255], 4 * i));
  canvas.getContext("2d").putImageData(drawn, 0, 0);
}
