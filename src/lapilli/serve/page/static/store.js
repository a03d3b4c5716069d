// What survives a reload, in this tab alone: the unsent question and the settings. Conversations are never kept.

export function remember(name, value) {
  try {
    sessionStorage.setItem(`lapilli.${name}`, JSON.stringify(value));
  } catch {
    // A browser that keeps nothing, or is full: then it does not survive.
  }
}

export function recall(name) {
  try {
    return JSON.parse(sessionStorage.getItem(`lapilli.${name}`) ?? "null");
  } catch {
    return null;
  }
}
