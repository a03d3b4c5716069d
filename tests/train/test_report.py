"""The report of a run says what is in its metrics: every curve has its chart, and marks stand where things happened."""

import re

from tests.support.runs import train_alone

from lapilli.train.report import loss_section, machine_section


def row(step, **more):
    fixed = {"loss": 3.0 / step, "tokens": 1000, "seconds": 2.0, "wait_seconds": 0.5, "memory_bytes": 3 * 2**30}
    return {"step": step, **fixed, **more}


def test_throughput_memory_and_waiting_are_drawn():
    shown = machine_section([row(1), row(2), row(3, save_seconds=0.25)])
    labels = re.findall(r'aria-label="([^"]*)"', shown)
    assert labels == [
        "tokens/s by step: tokens per second",
        "seconds by step: whole step, waiting to save",
        "GiB by step: peak so far",
        "% of a step by step: waiting for data",
    ]
    assert ">500<" in shown  # tokens per second on the axis
    assert ">25<" in shown  # percent of a step


def test_skipped_and_saved_steps_are_marked_on_the_loss():
    rows = [row(1), row(2), row(3, loss=None, skipped="loss is nan"), row(4), row(5, save_seconds=0.1)]
    shown = loss_section("Loss", rows)
    assert shown.count('stroke-width:2"') == 2  # one mark each
    assert ">skipped<" in shown
    assert ">saved<" in shown
    assert shown.count("<polyline") == 2  # the skipped step breaks the curve
    assert ">skipped<" not in loss_section("Loss", [row(1), row(2)])


def test_a_runs_page_has_every_section(recipe_file):
    folder = train_alone(recipe_file(), "data.validation=held-out.json", "train.validate_every=2")
    page = (folder / "report.html").read_text()
    headings = re.findall(r"<h2>([^<]*)</h2>", page)
    assert headings[:4] == ["Loss", "Learning rate and gradient norm", "Throughput, memory, waiting", "Totals"]
    assert "http" not in page.replace("http-equiv", "")


def test_a_run_that_goes_on_after_its_last_step_is_exported_all_the_same(recipe_file):
    path = recipe_file()
    folder = train_alone(path)
    (last,) = (folder / "checkpoints").glob("step-*")
    again = train_alone(path, resume=str(last), out=folder.parent / "again")
    assert "No loss was recorded." in (again / "report.html").read_text()
    assert (again / "model" / "config.json").is_file()
