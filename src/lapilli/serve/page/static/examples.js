// What the operator offers to begin with.

import { note } from "./dialogs.js";
import { plural } from "./dom.js";
import { readPicture } from "./pictures.js";

/** The examples with their pictures; those that can't be had are left out, which is said. */
export async function openExamples(api, settings) {
  const open = async (path, i) => {
    const blob = await api.picture(path);
    return readPicture(new File([blob], `example ${i + 1}`, { type: blob.type }), settings);
  };
  const opened = await Promise.allSettled(
    settings.examples.map(async ({ text, images }) => ({ text, pictures: await Promise.all(images.map(open)) })),
  );
  const lost = opened.filter((one) => one.status === "rejected").length;
  if (lost) {
    const reason = opened.find((one) => one.reason).reason.message;
    note(`${plural(lost, "example")} can't be shown: ${reason}`, { bad: true });
  }
  return opened.filter((one) => one.status === "fulfilled").map((one) => one.value);
}
