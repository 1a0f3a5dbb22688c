"""The examples with every family, over two ranks."""

from __future__ import annotations

import re
import sys
from importlib import import_module, util
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import launcher

EXAMPLES = Path(__file__).parents[2] / "examples"
WORKER = Path(__file__).parent / "workers" / "run_example.py"


@pytest.mark.parametrize("package", ["paddlenlp", "paddleformers"])
def test_generate(package, tmp_path):
    if util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: see docs/integrations.md")
    names = [family.name for family in import_module(f"{package}_models").FAMILIES]
    script = EXAMPLES / f"{package}_generate.py"
    command = [script] if package == "paddlenlp" else [WORKER, script]
    job = launcher.launch(
        tmp_path, *command, "--family", *names, "--ep", 2, "--length", 4, ranks=2, seconds=200
    )
    assert job.returncode == 0, job
    line = r"^(\w+), rank (\d).*: (\d+) blocks, ([\d,]+) expert weights here, .*: (\[.*\])$"
    first, second = (re.findall(line, log, re.MULTILINE) for log in job.logs)
    assert [name for name, *_ in first] == names, job
    for (name, _, blocks, held, tokens), (_, _, *others) in zip(first, second):
        assert [blocks, held, tokens] == others, name
        assert int(blocks) >= 2 and len(re.findall(r"\d+", tokens)) == 4, (name, tokens)
