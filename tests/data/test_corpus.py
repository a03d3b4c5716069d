"""A run sees the same conversations whether they were written or prepared."""

import io

import pytest
from tests.data.test_loader import flat

from lapilli.base.errors import DataError
from lapilli.data.check import index
from lapilli.data.loader import TrainLoader
from lapilli.data.prepare.job import prepare
from lapilli.recipe.schema import Source


@pytest.fixture
def make_steps(make_encoder, make_spec):
    def make(sources, **options):
        encoder, spec = make_encoder(), make_spec()
        corpus = index(sources, encoder, spec, stream=io.StringIO())
        loader = TrainLoader(corpus, encoder, spec, global_batch_size=5, tokens_per_micro_batch=700, **options)
        return [flat(step) for step in loader]

    return make


@pytest.mark.parametrize("layout", ["ours", "cerebras"])
@pytest.mark.parametrize("workers", [0, 2])
def test_prepared_rows_train_as_their_records_do(world, make_encoder, make_spec, make_steps, tmp_path, layout, workers):
    out = tmp_path / "prepared"
    length = int(index([world], make_encoder(), make_spec(), stream=io.StringIO()).index.lengths.max())
    encoder = make_encoder(max_length=length)
    prepare([world], encoder, make_spec(), out, layout=layout, max_images=2, shard_records=5, stream=io.StringIO())
    for subset in (None, "3:9"):
        rows = Source(path=str(out), subset=subset)
        records = Source(path=world.path, images=world.images, subset=subset)
        assert make_steps([rows], workers=workers) == make_steps([records])


def test_rows_and_records_do_not_mix(world, make_encoder, make_spec, make_steps, tmp_path):
    prepare([world], make_encoder(), make_spec(), tmp_path / "prepared", stream=io.StringIO())
    with pytest.raises(DataError, match=r"chat\.json is not: run `lapilli data prepare`"):
        make_steps([Source(path=str(tmp_path / "prepared")), world])


def test_a_picture_that_goes_bad_is_named_by_its_row(world, make_encoder, make_spec, make_steps, tmp_path):
    prepare([world], make_encoder(), make_spec(), tmp_path / "prepared", stream=io.StringIO())
    (tmp_path / "images" / "12_0.png").unlink()
    with pytest.raises(DataError, match=r'record 13 \(id r12\).*image "12_0.png": there is no file'):
        make_steps([Source(path=str(tmp_path / "prepared"))])
