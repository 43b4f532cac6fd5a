// Codes in a file, in numbers and as a picture.

const FORMAT = "simvq-codes";

// Text of a file of codes, with the fields of the files that `simvq encode` writes.
// codes: {values, shape}; sizes: what decoding needs besides.
export function writeCodes(model, { values, shape }, sizes) {
  const width = shape.at(-1);
  const rows = [];
  for (let at = 0; at < values.length; at += width) rows.push(Array.from(values.slice(at, at + width)));
  const codes = rows.length > 1 || shape.length < 3 || shape[1] > 1 ? rows : rows[0];
  return JSON.stringify({ format: FORMAT, model: model.name, digest: model.digest, sizes, codes });
}

// Read such a file: {rows, sizes}. Throws an error that says what is wrong with it.
export function readCodes(model, text, name) {
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
  const rows = Array.isArray(file.codes[0]) ? file.codes : [file.codes];
  for (const row of rows) {
    if (!Array.isArray(row) || row.length !== rows[0].length)
      throw new Error(`${name}: rows differ in length.`);
    for (const code of row)
      if (!Number.isInteger(code) || code < 0 || code >= model.codebook_size)
        throw new Error(
          `${name}: ${code} is not a code; codes are integers from 0 to ${model.codebook_size - 1}.`,
        );
  }
  return { rows, sizes: file.sizes ?? {} };
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
