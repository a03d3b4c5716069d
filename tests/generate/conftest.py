"""Models of generation's tests, built once for each test process."""

import pytest
from tests.support.tiny import build_parrot, build_tiny, make_picture

import lapilli


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="session")
def picture(models):
    return make_picture(models / "wide.jpg")


@pytest.fixture(scope="session")
def tiny(models):
    """LLaVA's shape in small; random, so its answers are noise that depends on every token and pixel."""
    return lapilli.load(build_tiny(models / "tiny"))


@pytest.fixture(scope="session")
def parrot(models):
    """Says `a red dog 음식` and ends."""
    return lapilli.load(build_parrot(models / "parrot", " a red dog 음식"))


@pytest.fixture(scope="session")
def endless(models):
    """Says ` one blue bird` again and again."""
    return lapilli.load(build_parrot(models / "endless", " one blue bird", endless=True))
