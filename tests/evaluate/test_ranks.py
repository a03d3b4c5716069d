"""Several processes: shares without gaps, markers of this start only, and a lost process named."""

import pytest

from lapilli.base.errors import RunError
from lapilli.evaluate.ranks import Rank
from lapilli.evaluate.task import Question


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_cover_everything_once_and_are_about_equal(world):
    sizes = [1, 30, 2, 2, 17, 1, 1, 8, 40, 3, 5, 5, 9, 1, 1, 20]
    groups = [[Question(id=f"{i}.{j}", text="") for j in range(size)] for i, size in enumerate(sizes)]
    shares = [Rank(rank, world).share(groups) for rank in range(world)]
    assert [q.id for share in shares for group in share for q in group] == [q.id for group in groups for q in group]
    counts = [sum(map(len, share)) for share in shares]
    assert max(counts) - sum(sizes) / world <= max(sizes)


def test_what_torchrun_says():
    made = Rank.from_environment(
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x", "MASTER_PORT": "9"}
    )
    assert (made.rank, made.world, made.local, made.answers) == (3, 4, 1, "answers-03-of-04.jsonl")
    assert Rank.from_environment({}) == Rank(run=":::")
    assert Rank().answers == "answers.jsonl"
    with pytest.raises(RunError, match='RANK="x"'):
        Rank.from_environment({"RANK": "x"})
    with pytest.raises(RunError, match="RANK=4 with WORLD_SIZE=4"):
        Rank.from_environment({"RANK": "4", "WORLD_SIZE": "4"})


def test_the_first_waits_for_markers_of_this_start(tmp_path):
    first = Rank(0, 3, run="now")
    Rank(1, 3, run="now").finish(tmp_path, {"7": "damaged"})
    Rank(2, 3, run="before").finish(tmp_path, {"8": "of an earlier start"})
    with pytest.raises(RunError, match="no sign of rank 2 for 1s"):
        first.gather(tmp_path, lambda: False, wait_seconds=0.6)
    assert first.gather(tmp_path, lambda: True) == {"7": "damaged"}  # a wish to stop ends the waiting
    Rank(2, 3, run="now").finish(tmp_path, {})
    assert first.gather(tmp_path, lambda: False) == {"7": "damaged"}
    Rank(1, 3, run="now").begin(tmp_path)
    assert not (tmp_path / "done-01-of-03.json").exists()
