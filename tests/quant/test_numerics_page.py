"""NUMERICS.md supports its statements by tests: the names it gives exist."""

import re
from pathlib import Path

import mxdist.quant

TESTS = Path(__file__).parent


def test_every_test_that_the_page_names_exists() -> None:
    page = (Path(next(iter(mxdist.quant.__path__))) / "NUMERICS.md").read_text()
    defined = set(re.findall(r"def test_(\w+)", "".join(path.read_text() for path in TESTS.glob("test_*.py"))))
    *_, claims = page.split("\n## 8.")
    quoted = set(re.findall(r"test_(\w+)(?!\.py)\b", page.replace("\n", " "))) - {"claims", "decompose"}
    quoted |= set(re.findall(r"\*([a-z0-9_]{20,})\*", claims))
    assert len(quoted) > 25
    missing = {name for name in quoted if not any(test.startswith(name) for test in defined)}
    assert not missing
