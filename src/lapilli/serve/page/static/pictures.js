// Pictures from the user's files: read, measured against what the server takes, and made smaller where the user says so.
// What is sent is the file as it is, unless it was scaled down, which its thumbnail then says.

import { size } from "./dom.js";

const QUALITY = 0.9;
const SMALLEST = 64;

/** A file as a picture {name, url, type, bytes, width, height, problem, scaled}; `problem` says why it can't be sent. */
export async function readPicture(file, limits) {
  const picture = {
    name: file.name || "pasted picture",
    url: "",
    type: file.type,
    bytes: file.size,
    width: 0,
    height: 0,
    problem: null,
    canScale: false,
    scaled: null,
  };
  try {
    picture.url = await dataUrl(file);
    [picture.width, picture.height] = await measure(picture.url);
  } catch {
    picture.url = "";
    picture.problem = "not a picture that this browser can open; JPEG, PNG and WebP always work";
    return picture;
  }
  return check(picture, limits);
}

/** A picture from a data URL, as an imported file holds it. Rejects if it can't be opened. */
export async function fromDataUrl(url, name, limits) {
  const bytes = Math.floor(((url.length - url.indexOf(",") - 1) * 3) / 4);
  const [width, height] = await measure(url);
  const type = url.slice(5, url.indexOf(";"));
  return check({ name, url, type, bytes, width, height, problem: null, canScale: false, scaled: null }, limits);
}

function check(picture, limits) {
  const pixels = picture.width * picture.height;
  picture.problem = null;
  picture.canScale = true;
  if (pixels > limits.image_pixels) {
    picture.problem = `${picture.width} × ${picture.height} are ${mega(pixels)}; this server takes ${mega(limits.image_pixels)}`;
  } else if (picture.bytes > limits.image_bytes) {
    picture.problem = `${size(picture.bytes)}; this server takes ${size(limits.image_bytes)} a picture`;
  }
  return picture;
}

const mega = (pixels) =>
  pixels < 1e5
    ? `${pixels.toLocaleString("en")} pixels`
    : `${(pixels / 1e6).toFixed(2).replace(/\.?0+$/, "")} megapixels`;

/** The same picture small enough for the limits, as JPEG (PNG where it stays small, so that drawings keep their edges). */
export async function scaleDown(picture, limits) {
  const image = await load(picture.url);
  let factor = Math.min(1, Math.sqrt(limits.image_pixels / (picture.width * picture.height)));
  for (;;) {
    const width = Math.max(1, Math.floor(picture.width * factor));
    const height = Math.max(1, Math.floor(picture.height * factor));
    const types = picture.type === "image/png" ? ["image/png", "image/jpeg"] : ["image/jpeg"];
    for (const type of types) {
      const blob = await drawn(image, width, height, type);
      if (blob.size <= limits.image_bytes) {
        const url = await dataUrl(blob);
        const scaled = `${picture.width} × ${picture.height}`;
        return { ...picture, url, type, bytes: blob.size, width, height, problem: null, canScale: false, scaled };
      }
    }
    if (Math.max(width, height) < SMALLEST) throw new Error("can't be made small enough");
    factor *= 0.7;
  }
}

function drawn(image, width, height, type) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const brush = canvas.getContext("2d");
  if (type === "image/jpeg") {
    brush.fillStyle = "#fff";
    brush.fillRect(0, 0, width, height);
  }
  brush.imageSmoothingQuality = "high";
  brush.drawImage(image, 0, 0, width, height);
  return new Promise((resolve, reject) =>
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("too large for this browser"))), type, QUALITY),
  );
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function measure(url) {
  if (!/^data:image\/[a-z0-9.+-]+;base64,/i.test(url)) throw new Error("not a picture");
  const image = await load(url);
  return [image.naturalWidth, image.naturalHeight];
}

async function load(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

/** Pictures in what was pasted or dropped. */
export function filesIn(transfer) {
  return [...(transfer?.files ?? [])];
}
