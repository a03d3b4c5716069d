"""A benchmark's files as a test writes them, read and scored the way the command line does."""

import json
from pathlib import Path

from lapilli.evaluate.catalogue import load_task
from lapilli.evaluate.job import open_job
from lapilli.evaluate.scorers import SCORERS
from lapilli.evaluate.submissions import SUBMISSIONS

REFERENCE = Path(__file__).parents[1] / "reference" / "eval"
SHORT = "\nAnswer the question using a single word or phrase."


def reference(name):
    return json.loads((REFERENCE / name).read_text(encoding="utf-8"))


def write(path, value):
    """Write a JSON file, or a list of objects as JSON lines where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one) for one in value] if path.suffix == ".jsonl" else [json.dumps(value)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def open_task(name, data):
    """A task by name over the files in `data`; its folder of pictures is made, and stays empty."""
    task = load_task(name)
    (data / task.files["images"]).mkdir(parents=True, exist_ok=True)
    return open_job(task, data, ("llava", "official"))


def score(job, answers, protocol="llava"):
    """The scores of answers by id, of every question that has one and whose truth is known."""
    asked = [q for q in job.read[protocol] if q.truth is not None and q.id in answers]
    options = {**job.task.options_for(protocol), "files": job.files, "missing": []}
    return SCORERS[job.task.scorer].call(asked, answers, options)


def submit(job, answers, folder):
    """What the submission file holds."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = [q for q in job.questions if q.id in answers]
    given = {**job.task.options_for("llava"), "files": job.files}
    (path,) = SUBMISSIONS[job.task.submission].call(asked, answers, given, folder)
    return json.loads(Path(path).read_text(encoding="utf-8"))
