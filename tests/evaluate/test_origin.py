"""What tells one model from another before it is loaded."""

import json
import shutil

import pytest
from tests.support.llava import restore_piece
from tests.support.tiny import build_tiny

from lapilli.base.errors import ModelError
from lapilli.evaluate.origin import describe_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("origin") / "tiny")


def test_the_same_model_elsewhere_is_the_same(model, tmp_path):
    run = tmp_path / "my-run"
    shutil.copytree(model, run / "model")
    first, moved = describe_model(model), describe_model(run)
    assert (first["name"], moved["name"]) == ("tiny", "my-run")
    assert {k: v for k, v in first.items() if k not in ("name", "path")} == {
        k: v for k, v in moved.items() if k not in ("name", "path")
    }
    assert describe_model(run / "model")["name"] == "my-run/model"


def test_other_weights_another_template_and_another_type_are_not(model, tmp_path):
    first = describe_model(model)
    other = build_tiny(tmp_path / "other", seed=7)
    assert describe_model(other)["fingerprint"] != first["fingerprint"]
    edited = shutil.copytree(model, tmp_path / "edited")
    spec = json.loads((edited / "lapilli.json").read_text())
    (edited / "lapilli.json").write_text(json.dumps({**spec, "note": "another template"}))
    assert describe_model(edited)["settings"] != first["settings"]
    assert describe_model(model, template="plain")["template"] != first["template"]
    assert describe_model(model, dtype="bfloat16")["dtype"] != first["dtype"]
    with pytest.raises(ModelError, match="no such folder"):
        describe_model(tmp_path / "nowhere")


def test_an_adapter_is_known_with_its_base(tmp_path):
    adapter = restore_piece("tiny-llava-lora", tmp_path)
    made = describe_model(adapter, tmp_path / "tiny-llava-v1.5")
    assert made["base_fingerprint"] == describe_model(tmp_path / "tiny-llava-v1.5")["fingerprint"]
    assert made["fingerprint"] != made["base_fingerprint"]
