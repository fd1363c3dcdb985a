"""What a run writes of itself for looking at; what is in it `test_loop.py` holds."""

import os
import subprocess
import sys


def test_no_command_imports_torch_for_tensorboards_files(tmp_path):
    """Where it is installed it would take seconds of each."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    there = os.pathsep.join([str(tmp_path), *sys.path])
    code = "import sys, ldm_scaling.training.events; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": there},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
