"""What every test has: a data index of its own, never the user's."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAPILLI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
