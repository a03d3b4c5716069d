// The server, as the page speaks with it. Every way in which a request can fail becomes a `Problem` that says in words
// what happened and whether asking again may help.

const KEY = "lapilli.key";

const WORDS = {
  401: "The server wants a key, and this one is missing or wrong.",
  403: "The server does not answer to this address.",
  408: "The request took too long to reach the server.",
  413: "This is more than the server takes in one request.",
  429: "The server is busy.",
  500: "Something failed in the server.",
  502: "What stands between this page and the model gave no proper answer.",
  503: "The model is not ready.",
  504: "The server gave up: the answer took too long.",
};

/** What went wrong, in words; `retrySeconds` is what the server asked to wait. */
export class Problem extends Error {
  constructor(message, { status = 0, detail = "", retrySeconds = null } = {}) {
    super(message);
    this.status = status;
    this.detail = detail;
    this.retrySeconds = retrySeconds;
  }
}

export class Api {
  /** `askKey(wrong)` shows a dialog and resolves to a key, or null if the user has none. */
  constructor(askKey) {
    this.askKey = askKey;
    this.asking = null;
    this.held = null;
  }

  /** The key, kept in this tab; by the page alone where the browser lets it keep nothing. */
  get key() {
    try {
      return sessionStorage.getItem(KEY) ?? this.held;
    } catch {
      return this.held;
    }
  }

  set key(key) {
    this.held = key;
    try {
      sessionStorage.setItem(KEY, key);
    } catch {
      // Then it is asked for again after a reload.
    }
  }

  settings() {
    return this.#json("/page/settings");
  }

  /** A picture of an example, which needs the key and so can't be an `<img src>`. */
  async picture(path) {
    return (await this.#fetch(path)).blob();
  }

  /** Send something that is only to be kept: a finished turn, a vote. */
  async keep(path, body) {
    await this.#fetch(path, body);
  }

  /**
   * Ask, and hand every event of the answer to `hear`: {content}, {thought}, {finish}, {usage}.
   * Rejects with a Problem, or with an AbortError when `signal` was used.
   */
  async chat(body, signal, hear) {
    const asked = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await this.#fetch("/v1/chat/completions", asked, signal);
    let done = false;
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") {
          done = true;
          break;
        }
        tell(JSON.parse(data), hear);
      }
    } catch (error) {
      if (error instanceof Problem || error.name === "AbortError") throw error;
      if (error instanceof SyntaxError) throw new Problem("The server sent something that can't be read.");
      throw new Problem("The connection was lost before the answer ended.");
    }
    if (!done) throw new Problem("The connection was lost before the answer ended.");
  }

  async #json(path) {
    const response = await this.#fetch(path);
    try {
      return await response.json();
    } catch {
      throw new Problem("The server sent something that can't be read.", { status: response.status });
    }
  }

  async #fetch(path, body, signal) {
    for (let wrong = false; ; wrong = true) {
      const key = this.key;
      const response = await this.#send(path, body, signal, key);
      if (response.ok) return response;
      if (response.status !== 401) throw await refusal(response);
      if (this.key !== key) continue; // somebody has given another one in the meantime
      this.asking ??= this.askKey(wrong || key !== null).finally(() => {
        this.asking = null;
      });
      const given = await this.asking;
      if (signal?.aborted) throw new DOMException("stopped", "AbortError");
      if (given === null) throw await refusal(response);
      this.key = given;
    }
  }

  async #send(path, body, signal, key) {
    const headers = key === null ? {} : { authorization: `Bearer ${key}` };
    const options = { headers, signal, cache: "no-store", credentials: "omit", referrerPolicy: "no-referrer" };
    if (body !== undefined) {
      options.method = "POST";
      options.body = JSON.stringify(body);
      headers["content-type"] = "application/json";
    }
    try {
      return await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server can't be reached.", { detail: "Is it still running, and this device online?" });
    }
  }
}

function tell(event, hear) {
  if (event.error) {
    throw new Problem("The server broke the answer off.", { detail: String(event.error.message ?? "") });
  }
  for (const choice of event.choices ?? []) {
    if (choice.delta?.reasoning_content) hear({ thought: choice.delta.reasoning_content });
    if (choice.delta?.content) hear({ content: choice.delta.content });
    if (choice.finish_reason) hear({ finish: choice.finish_reason });
  }
  if (event.usage) hear({ usage: event.usage });
}

/** The data of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split(/\r?\n/);
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}

async function refusal(response) {
  let detail = "";
  try {
    const body = await response.json();
    detail = String(body.error?.message ?? body.detail ?? "");
  } catch {
    // A proxy's page, or nothing: the status says enough.
  }
  const wait = parseInt(response.headers.get("retry-after") ?? "", 10);
  const words = WORDS[response.status] ?? (response.status >= 500 ? WORDS[500] : "The server refused this question.");
  return new Problem(words, { status: response.status, detail, retrySeconds: Number.isFinite(wait) ? wait : null });
}
