import re
from pathlib import Path

import blocksparse_compiler as bsc

DOCS = Path(__file__).parents[2] / "docs"


def test_the_examples_in_training_md_run():
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "training.md").read_text(), re.M | re.S)
    assert len(blocks) == 14
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/training.md", "exec"), namespace)
    assert "block=16x16, kept=36/72" in repr(namespace["pruned"])
    assert namespace["accuracy"] > 0.9
    assert bsc.sparsity_report(namespace["model"])["2"].kept_tiles <= 36  # half, and more
