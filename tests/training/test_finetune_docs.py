"""The fine-tuning lines of README and docs run as written, with a small model in the place of the ones made before."""

import re
import shutil
import subprocess

import pytest

from rigpt_hf.training import finetune as program
from tests.processes import ROOT


# The program, or the verb that is the same.
LINE = r"(?:training/finetune\.py|rigpt finetune) (.*)"
QUICK = ["--max-steps", "1", "--context-length", "24", "--cpu", "--quiet"]


@pytest.mark.parametrize(("page", "count"), [("docs/training.md", 3)])
def test_lines_run_as_written(page, count, model_folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "README.md", "README.md")
    text = (ROOT / page).read_text(encoding="utf-8").replace('"vocab_size": 2048', f'"vocab_size": {len(tokenizer)}')
    outputs = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        if not re.search(LINE, block):
            continue
        # Files that the block itself makes, and models that its other lines and the preset `smoke` make.
        subprocess.run(["bash", "-ec", "\n".join(re.findall(r"^cat > .*?^END$", block, re.DOTALL | re.MULTILINE))])
        for line in re.findall(LINE, block.replace("\\\n", "")):
            model, data, output, *options = line.partition(" #")[0].split()
            assert model in ("runs/smoke/model", "runs/digits/model") and output not in outputs
            shutil.copytree(model_folder, model, dirs_exist_ok=True)
            assert program.main([model, data, output, *options, *QUICK]) == 0
            assert (tmp_path / output / "config.json").is_file()
            outputs.append(output)
    assert len(outputs) == count
