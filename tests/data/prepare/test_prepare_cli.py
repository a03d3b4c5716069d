"""`lapilli data prepare` as a user has it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lapilli.cli.main import main
from lapilli.data.read.prepared import PreparedStore

REFERENCE = Path(__file__).parents[2] / "reference"
PICTURES = REFERENCE / "training" / "images"


def lapilli(*arguments):
    """Run the command line in this process; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lapilli", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return end.code or 0
    return 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "base"
    parts = REFERENCE / "checkpoints"
    model = ["--vision-encoder", parts / "vision-tower", "--language-model", parts / "llama-base"]
    assert lapilli("build", *model, "--out", folder) == 0
    return folder


@pytest.fixture
def records(tmp_path):
    records = json.loads((REFERENCE / "training/instruct.json").read_text())[:12]
    records[3]["image"] = "nowhere.png"
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(records))
    return file


def test_writes_counts_and_lists(base, records, tmp_path, capsys):
    command = ("data", "prepare", records, "--images", PICTURES, "--model", base, "--template", "v1")
    assert lapilli(*command, "--out", tmp_path / "out", "--processes", 1) == 0
    said = capsys.readouterr()
    assert f"{tmp_path / 'out'}: 11 conversations" in said.out
    assert "left out 1 of 12 records (1 bad, 0 dropped as too long): quarantine.jsonl" in said.err
    assert len(PreparedStore(tmp_path / "out")) == 11
    assert lapilli(*command, "--out", tmp_path / "two", "--layout", "cerebras", "--max-bad", 0.01) == 1
    assert "1 of 12 records are bad, more than --max-bad 0.01" in capsys.readouterr().err
    assert len(PreparedStore(tmp_path / "two")) == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layout", "cerebra"), 'unknown --layout "cerebra" (did you mean "cerebras"?)'),
        (("--template", "vicuna"), 'unknown template "vicuna"'),
        (("--images", "a", "--images", "b"), "--images stands 2 times for 1 sources"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(records, tmp_path, capsys, arguments, message):
    code = lapilli("data", "prepare", records, "--model", "nowhere", "--out", tmp_path / "out", *arguments)
    assert code == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_goes_on_after_a_kill(base, tmp_path):
    """Killed with two workers busy, started again: the same bytes as without the kill."""
    one = json.loads((REFERENCE / "training/instruct.json").read_text())[0]
    with open(tmp_path / "many.jsonl", "w") as file:
        for i in range(3000):
            file.write(json.dumps({**one, "id": f"r{i}"}) + "\n")
    command = [sys.executable, "-m", "lapilli.cli", "data", "prepare", str(tmp_path / "many.jsonl"), "--images",
               str(PICTURES), "--model", str(base), "--shard-records", "100", "--processes", "2", "--out"]  # fmt: skip
    out = tmp_path / "out"
    child = subprocess.Popen([*command, str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while len(list(out.glob("shard-*.h5"))) < 4:
        assert child.poll() is None
        time.sleep(0.05)
    child.kill()
    child.wait()
    before = len(list(out.glob("shard-*.h5")))
    assert before < 30
    done = subprocess.run([*command, str(out)], capture_output=True, text=True, check=True)
    assert "of 30 shards were there from before" in done.stderr
    subprocess.run([*command[:-2], "1", "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    written = [{f.name: f.read_bytes() for f in folder.iterdir()} for folder in (out, tmp_path / "whole")]
    assert written[0] == written[1]
