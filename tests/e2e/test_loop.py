"""The loop with every real process, started once for all of these: algorithms, asynchrony, sync, parity."""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray

from mxdist.aqn.controller import AqnController
from mxdist.config import Config, load_config
from mxdist.control.batch import ScoredGroup
from mxdist.control.checkpoints import CheckpointStore
from mxdist.control.collect import Collector, SavedBatch
from mxdist.control.guards import Guards
from mxdist.control.loop import Trainer
from mxdist.control.records import read_records, write_records
from mxdist.control.saving import CheckpointWriter
from mxdist.control.stopping import StopRequests
from mxdist.control.system import System, running
from mxdist.control.waits import wait_for
from mxdist.control.weights import WeightSync
from mxdist.errors import ParityError
from mxdist.messages import SharedBuckets, WeightPayload
from mxdist.observe.console import Console
from mxdist.observe.ledger import Ledger, check_ledger
from mxdist.observe.loggers import Loggers
from mxdist.observe.rollout_files import RolloutFiles
from mxdist.sync.parity import compare_checksums
from mxdist.sync.payload import learner_checksums
from mxdist.tasks.base import Cursor, Task
from mxdist.tasks.registry import make_task
from tests.e2e.command import QUICKSTART, SHORT
from tests.sync.entries import payload_of


@dataclass(frozen=True)
class Up:
    task: Task
    system: System


# Of the processes: an engine takes weights in flight where a test asks for it, and is slow enough to get some.
ABLE = ["rollout.max_lag=1", "sync.update=in_flight", "rollout.max_sequences=8"]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    config = load_config(QUICKSTART, [*SHORT, *ABLE])
    task, path = make_task(config), tmp_path_factory.mktemp("loop")
    with Console(path) as console, running(config, task, path, console) as system:
        up = Up(task, system)
        # Far enough that some answers are right and some are wrong: without that no reward differs.
        train(up, path, "warm_start.steps=150", "warm_start.sequences=64", "run.steps=1", fresh=True)
        yield up


def train(up: Up, tmp_path: Path, *settings: str, fresh: bool = False) -> list[dict[str, float]]:
    """Train with these settings on the running processes, from the weights the learner has; the metrics by step."""
    config: Config = load_config(QUICKSTART, [*SHORT, *settings])
    aqn = AqnController(config.aqn, config.run.steps)
    system = up.system
    store = CheckpointStore(tmp_path)
    with (
        Console(tmp_path, config.run.steps) as console,
        Loggers(tmp_path, config) as loggers,
        CheckpointWriter(store, system.learners, config, console.note, lambda: None) as checkpoints,
    ):
        trainer = Trainer(
            config=config,
            task=up.task,
            shape=system.shape,
            learners=system.learners,
            pool=system.pool,
            rewards=system.rewards,
            sync=WeightSync(system.learners, system.pool, system.transport, config),
            collector=Collector(config, up.task, system.pool, system.rewards, aqn, Cursor()),
            aqn=aqn,
            checkpoints=checkpoints,
            ledger=Ledger(tmp_path, None),
            guards=Guards(config.guards, config.algorithm.prompts_per_step, console.note),
            stop=StopRequests(),
            loggers=loggers,
            rollouts=RolloutFiles(tmp_path, 1, up.task.tokenizer),
            console=console,
        )
        trainer.run(0, fresh)
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "rloo"])
def test_every_algorithm_learns_from_rewards_that_differ(up: Up, tmp_path: Path, name: str) -> None:
    for metrics in train(up, tmp_path, f"algorithm.name={name}"):
        assert metrics["critic/rewards/min"] < metrics["critic/rewards/max"]
        assert np.isfinite(metrics["actor/grad_norm"])
        assert metrics["actor/grad_norm"] > 0
        assert metrics["off_policy/staleness/max"] == 0
        assert metrics["parity/checked_tensors"] > 0


def test_dapo_samples_extra_batches_up_to_its_cap(up: Up, tmp_path: Path) -> None:
    settings = ["algorithm.name=dapo", "algorithm.max_extra_batches=2", "rollout.max_new_tokens=1"]
    for metrics in train(up, tmp_path, *settings):  # one token is never a whole answer: no group has signal
        assert metrics["rollout/extra_batches"] == 2
        assert metrics["rollout/groups_without_signal"] == 8
        assert metrics["actor/grad_norm"] == 0


def test_several_updates_of_one_batch_move_the_policy_away_from_it(up: Up, tmp_path: Path) -> None:
    settings = ["algorithm.minibatches=4", "optimizer.warmup_steps=0", "optimizer.lr=0.003", "aqn.mode=disabled"]
    metrics = train(up, tmp_path, *settings)
    assert any(step["actor/ppo_kl"] != 0 for step in metrics)
    assert all(step["timing_s/old_logprobs"] > 0 for step in metrics)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_no_answer_is_staler_than_the_bound_and_the_bound_is_used(up: Up, tmp_path: Path, lag: int) -> None:
    metrics = train(up, tmp_path, f"rollout.max_lag={lag}", "run.steps=5")
    staleness = [step["off_policy/staleness/max"] for step in metrics]
    assert staleness == [min(step, lag) for step in range(5)]


def test_in_flight_a_batch_has_tokens_of_several_versions_and_none_beyond_the_bound(up: Up, tmp_path: Path) -> None:
    lag = 2
    settings = ["sync.update=in_flight", f"rollout.max_lag={lag}", "run.steps=6", "algorithm.samples_per_prompt=32"]
    metrics = train(up, tmp_path, *settings, "aqn.stages=2", "log.rollout_groups=8")
    assert max(step["off_policy/staleness/max"] for step in metrics) <= lag
    assert [step["sync/version"] for step in metrics[lag:]] == list(range(1, 7 - lag))  # every push is compared
    mixed = [step for step in metrics if step["off_policy/versions"] > 1]
    assert mixed, "no weights reached the engine while it sampled"
    assert all(step["off_policy/staleness/token_mean"] < lag for step in mixed)
    assert all(step["aqn/perturbed_modules"] == 2 for step in metrics[3:])
    assert check_ledger(tmp_path, max_lag=lag).trained == 6 * 8
    lines = [line for file in (tmp_path / "rollouts").iterdir() for line in file.read_text().splitlines()]
    runs = [run for line in lines for run in json.loads(line)["drawn_by"]]
    assert {version for version, _ in runs} >= {0, 1, 2}


def test_the_entropy_band_sets_sigma_from_what_the_learner_reports(up: Up, tmp_path: Path) -> None:
    band = ["aqn.mode=entropy_band", "aqn.entropy_low=50", "aqn.entropy_high=60", "aqn.stages=2", "aqn.sigma_end=0.001"]
    sigmas = [step["aqn/sigma"] for step in train(up, tmp_path, *band, "run.steps=6")]
    assert sigmas[:4] == [0, 0, 0, 0]  # half the run is silent, and the first step after it has seen nothing yet
    assert sigmas[4:] == pytest.approx([0.001, 0.00125])


def test_a_resumed_run_has_what_was_sampled_ahead_and_samples_no_prompt_twice(up: Up, tmp_path: Path) -> None:
    settings = ["algorithm.name=dapo", "algorithm.max_extra_batches=1", "rollout.max_new_tokens=1"]
    config = load_config(QUICKSTART, [*SHORT, *settings, "run.steps=4", "rollout.max_lag=1"])

    def collector(cursor: Cursor, step: int, again: list[SavedBatch]) -> Collector:
        aqn, system = AqnController(config.aqn, 4), up.system
        return Collector(config, up.task, system.pool, system.rewards, aqn, cursor, step, deque(again))

    sync = WeightSync(up.system.learners, up.system.pool, up.system.transport, config)
    sync.push(1000)  # not too old for any step
    sync.check_all()
    killed = collector(Cursor(), 0, [])
    killed.submit_through(1)
    first = killed.collect(0)  # and an extra batch, drawn behind the batch ahead
    assert killed.cursor.position == 3 * 8
    sync.push(1001)
    sync.check_all()  # engines get there when the batch ahead is finished
    write_records(tmp_path / "ahead", killed.ahead())
    [again] = read_records(tmp_path / "ahead", SavedBatch)
    [whole] = again.results
    assert len(whole.groups) == 8
    half = replace(whole, groups=whole.groups[::2])  # as if a second engine had been slower
    resumed = collector(killed.cursor, 1, [replace(again, results=(half,))])
    resumed.submit_through(2)
    found, unkilled = resumed.collect(1), killed.collect(1)
    assert found.places == unkilled.places
    assert all(found.scored[2 * index].group is group for index, group in enumerate(half.groups))  # not sampled again
    assert [answers(group) for group in found.scored] == [answers(group) for group in unkilled.scored]
    last = resumed.collect(2)
    places = [*first.places, *first.dropped, *found.places, *found.dropped, *last.places, *last.dropped]
    assert len(places) == len(set(places)) == 6 * 8


def answers(scored: ScoredGroup) -> list[list[int]]:
    return [sample.tokens.tolist() for sample in scored.group.samples]


def test_one_flipped_bit_on_the_way_is_named_and_stops_the_run(up: Up) -> None:
    learners, pool = up.system.learners, up.system.pool
    payloads: list[WeightPayload] = wait_for(learners.export(7), 60, "sync")
    [first, *rest] = payloads
    victim = next(index for index, entry in enumerate(first.entries) if entry.kind == "mx")
    entry = first.entries[victim]
    codes = entry.parts["codes"].copy()
    codes.reshape(-1)[5] ^= 1
    damaged = replace(entry, parts={**entry.parts, "codes": codes})
    entries = (*first.entries[:victim], damaged, *first.entries[victim + 1 :])
    spoilt = payload_of(first.version, first.recipes, entries)
    references = [ray.put(payload) for payload in (spoilt, *rest)]
    with pytest.raises(ParityError, match=f"{entry.name}, part codes, changed on its way"):
        pool.wait(pool.load_weights(references, 7), 60, "sync")
    # The gate behind it: an engine whose live bytes are not what the learner says.
    [found] = pool.wait(pool.load_weights([ray.put(payload) for payload in payloads], 7), 60, "sync")
    expected = learner_checksums(payloads)
    compare_checksums(expected, found)
    parts = expected[entry.name]
    with pytest.raises(ParityError, match=f"{entry.name}, part codes"):
        compare_checksums(dict(expected) | {entry.name: {**parts, "codes": parts["codes"] ^ 1}}, found)


def test_engines_say_why_they_cannot_read_what_a_learner_shares_of_its_gpu(up: Up) -> None:
    shared = SharedBuckets("learner rank 0", "a process", (), b"")
    assert up.system.pool.cannot_map([shared], 60) == "the engine has no GPU"


def test_the_learners_ranks_hold_the_whole_model_between_them_each_tensor_once(up: Up) -> None:
    payloads: list[WeightPayload] = wait_for(up.system.learners.export(8), 60, "sync")
    names = [entry.name for payload in payloads for entry in payload.entries]
    assert len(names) == len(set(names))
    experts = [sum("experts" in entry.name for entry in payload.entries) for payload in payloads]
    assert experts == [2 * 4 * 3, 2 * 4 * 3]  # layers x experts of the rank x projections
