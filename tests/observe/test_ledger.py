"""The ledger adds up, or says what does not."""

from pathlib import Path

import pytest

from mxdist.observe.ledger import Account, Ledger, check_ledger


def write(run_dir: Path, *steps: tuple[list[str], list[str]], version: int | None = None) -> None:
    ledger = Ledger(run_dir, None)
    for step, (trained, dropped) in enumerate(steps, start=1):
        ledger.append(step, trained, dropped, [step - 1 if version is None else version] * len(trained))


def test_groups_trained_on_once_each_add_up_over_epochs(tmp_path: Path) -> None:
    write(tmp_path, (["0:0", "0:1"], []), (["0:3", "0:2"], ["0:4"]), (["1:1", "1:0"], []))
    assert check_ledger(tmp_path, 0) == Account(steps=3, trained=6, dropped=1)


def test_a_group_trained_on_twice_is_named_with_both_steps(tmp_path: Path) -> None:
    write(tmp_path, (["0:0", "0:1"], []), (["0:1", "0:2"], []))
    with pytest.raises(ValueError, match="group 0:1 is in step 1 and in step 2"):
        check_ledger(tmp_path, 0)


def test_a_lost_group_is_named(tmp_path: Path) -> None:
    write(tmp_path, (["0:0"], []), (["0:2"], []))
    with pytest.raises(ValueError, match=r"groups \[1\] of epoch 0 were drawn and are nowhere"):
        check_ledger(tmp_path, 0)


def test_a_stale_group_is_named(tmp_path: Path) -> None:
    write(tmp_path, (["0:0"], []), (["0:1"], []), version=0)
    check_ledger(tmp_path, 1)
    with pytest.raises(ValueError, match="step 2 was trained on groups of version 0"):
        check_ledger(tmp_path, 0)


def test_a_resumed_run_replaces_the_lines_of_the_steps_it_takes_again(tmp_path: Path) -> None:
    write(tmp_path, (["0:0"], []), (["0:1"], []), (["0:2"], []))
    Ledger(tmp_path, 1).append(2, ["0:1"], [], [1])
    assert check_ledger(tmp_path, 0).steps == 2
    Ledger(tmp_path, 1).append(3, ["0:1"], [], [1])
    with pytest.raises(ValueError, match="steps of the ledger"):
        check_ledger(tmp_path, 0)
