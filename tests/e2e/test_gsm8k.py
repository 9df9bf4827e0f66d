"""The real data path: GSM8K's own format from files to reward, with the configuration that the README names."""

import json
from pathlib import Path

from tests.e2e.command import ROOT, metrics_of, mxdist


def write_problems(path: Path, count: int, first: int) -> Path:
    """Word problems in GSM8K's form; the project ships none of the real ones."""
    with path.open("w") as stream:
        for number in range(first, first + count):
            left, right = 3 + number % 40, 5 + number % 17
            question = f"Mara has {left} pears and buys {right} more. How many pears does Mara have?"
            answer = f"Mara has {left} + {right} = <<{left}+{right}={left + right}>>{left + right} pears.\n"
            stream.write(json.dumps({"question": question, "answer": answer + f"#### {left + right}"}) + "\n")
    return path


def test_a_short_run_on_files_in_the_form_of_gsm8k(tmp_path: Path) -> None:
    train = write_problems(tmp_path / "train.jsonl", 300, 0)
    held_out = write_problems(tmp_path / "test.jsonl", 20, 1000)
    settings = [
        "run.steps=2",
        "warm_start.steps=4",
        "data.vocab_size=400",
        "rollout.max_new_tokens=32",
        "data.eval_problems=8",
    ]
    run_dir = tmp_path / "run"
    outcome = mxdist(
        "train", ROOT / "configs" / "gsm8k_tiny.yaml", f"data.train={train}", f"data.eval={held_out}",
        f"run.dir={run_dir}", *settings, cwd=tmp_path,
    )  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")
    metrics = metrics_of(run_dir)
    assert 0 <= metrics[2]["eval/accuracy"] <= 1
    assert {"reward/accuracy", "reward/format"} <= set(metrics[1])
    assert (run_dir / "tokenizer" / "tokenizer.json").is_file()
