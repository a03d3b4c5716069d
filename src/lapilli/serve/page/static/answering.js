// One answer from question to end: what is sent, what comes back, and how it is counted.

import { Problem } from "./api.js";

/** The request for an answer. `repeat` asks for other draws where a seed is set, as `lapilli chat` does. */
export function requestOf(settings, messages, repeat = 0) {
  const body = {
    model: settings.model,
    messages,
    temperature: settings.temperature,
    top_p: settings.top_p,
    max_tokens: settings.max_tokens,
  };
  if (settings.seed !== null) body.seed = (settings.seed + repeat) % Number.MAX_SAFE_INTEGER;
  return body;
}

/** Fill `version` with the answer. Never rejects: what went wrong is part of the version. `changed` follows every piece. */
export async function answer(api, version, body, signal, changed) {
  const begun = performance.now();
  let first = null;
  let last = null;
  const hear = ({ content, thought, finish, usage }) => {
    if (content || thought) {
      last = performance.now();
      first ??= last;
      version.state = "streaming";
      version.text += content ?? "";
      version.thought += thought ?? "";
    }
    if (finish) version.finish = finish;
    if (usage) {
      version.promptTokens = usage.prompt_tokens;
      version.tokens = usage.completion_tokens;
    }
    changed();
  };
  try {
    await api.chat(body, signal, hear);
    version.state = "done";
  } catch (error) {
    if (error.name === "AbortError") version.state = "stopped";
    else {
      version.state = "failed";
      version.problem =
        error instanceof Problem ? error : new Problem("Something failed in this page.", { detail: String(error) });
    }
  }
  version.ended = Date.now();
  if (first !== null) {
    version.firstSeconds = (first - begun) / 1000;
    const seconds = (last - first) / 1000;
    if (version.tokens > 1 && seconds > 0.01) version.rate = (version.tokens - 1) / seconds;
  }
  changed();
}
