"""The shell scripts, which a GPU machine or CI sees first: do they parse, and refuse what is wrong?"""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_parses(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_gpu_report_names_its_stages_and_refuses_others():
    report = ROOT / "scripts" / "gpu_report.sh"
    help_ = subprocess.run([report, "--help"], capture_output=True, text=True)
    assert help_.returncode == 0
    for stage in ("conformance", "tests", "sanitizer", "tune", "bench", "generation", "training"):
        assert f"  {stage} " in help_.stdout
    wrong = subprocess.run([report, "--stage", "warp"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no stage named warp" in wrong.stderr
