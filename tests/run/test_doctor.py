"""The doctor looks at the machine it is on; what it says must be true of it, and a fault must be told with a remedy."""

import json
import os
import subprocess
import sys

import pytest

from lapilli.run import doctor


def findings():
    return {(one.group, one.name): one for one in doctor.examine()}


def test_what_it_finds_is_what_python_imports():
    import torch
    import transformers

    found = findings()
    assert found["versions", "torch"].value == torch.__version__
    assert found["versions", "transformers"].value == transformers.__version__
    assert found["network", "gloo"].value == "connects"
    assert found["disk", "here"].value.startswith(os.getcwd())
    assert all(one.remedy for one in found.values() if one.level != "ok")


def test_an_old_or_missing_package_is_a_problem_with_its_command(monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda: {"torch": ">=99", "peft": ""})
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    found = findings()
    assert found["versions", "torch"].level == "problem"
    assert found["versions", "torch"].remedy == 'pip install "torch>=99"'
    assert found["versions", "no-such-package"].value == "missing"


def test_an_interface_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    found = findings()["network", "gloo"]
    assert found.level == "problem"
    assert "nosuch0" in found.value
    assert "GLOO_SOCKET_IFNAME" in found.remedy


@pytest.mark.slow
def test_the_command_prints_json_and_its_status(tmp_path):
    command = [sys.executable, "-m", "lapilli.cli", "doctor", "--json"]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(good.stdout)
    assert good.returncode == int(any(one["level"] == "problem" for one in found))
    assert {"versions", "devices", "kernels", "network", "memory", "disk"} <= {one["group"] for one in found}
    bad = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"GLOO_SOCKET_IFNAME": "nosuch0"}
    )
    assert bad.returncode == 1, bad.stdout
