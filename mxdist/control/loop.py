"""The training loop. Everything a run does, top to bottom; synchronous training is ``rollout.max_lag`` 0.

    submit prompts -> rollouts -> rewards -> advantages -> update -> sync -> (evaluate) -> (checkpoint)

The loop waits in three places, each with a deadline: for the oldest rollout batch, for the learner's update, and for
the check of the last weight sync. With ``max_lag`` k it has k batches being sampled while the learner trains.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mxdist.aqn.controller import AqnController
from mxdist.config import Config
from mxdist.config.schema import Supervised
from mxdist.control.batch import Answered, build_batch, pad_sequences, token_weights
from mxdist.control.checkpoints import ControllerState
from mxdist.control.collect import Collected, Collector, RewardPool
from mxdist.control.evaluation import greedy_accuracy
from mxdist.control.groups import LearnerGroup, RolloutPool
from mxdist.control.guards import Guards
from mxdist.control.saving import CheckpointWriter, versions
from mxdist.control.schedule import learning_rate, warm_start_learning_rate
from mxdist.control.step_metrics import cost_metrics, step_metrics
from mxdist.control.stopping import StopRequests
from mxdist.control.weights import WeightSync
from mxdist.errors import NotFinite, Preempted
from mxdist.learner.losses import get_objective
from mxdist.messages import EntropyStatistics, UpdateReport
from mxdist.model.shape import ModelShape
from mxdist.observe.console import Console
from mxdist.observe.ledger import Ledger
from mxdist.observe.loggers import Loggers
from mxdist.observe.rollout_files import RolloutFiles
from mxdist.seeds import derive_seed
from mxdist.tasks.base import Task


@dataclass(frozen=True)
class Measurement:
    """A run for its speed alone: no evaluation, no checkpoint."""

    trace: Path | None = None  # file for a profiler's trace of the last step's update


@dataclass
class Trainer:
    """One run. All processes are up and hold the same modules; see ``control.system`` for how they got there."""

    config: Config
    task: Task
    shape: ModelShape
    learners: LearnerGroup
    pool: RolloutPool
    rewards: RewardPool
    sync: WeightSync
    collector: Collector
    aqn: AqnController
    checkpoints: CheckpointWriter
    ledger: Ledger
    guards: Guards
    stop: StopRequests
    loggers: Loggers
    rollouts: RolloutFiles
    console: Console
    measurement: Measurement | None = None
    _seconds: dict[str, float] = field(default_factory=dict)  # by phase, of the step under way

    def run(self, first_step: int, fresh: bool) -> None:
        """Train from ``first_step``. ``fresh`` is False when a checkpoint was loaded."""
        run = self.config.run
        if fresh:
            self._warm_start()
        self.sync.push(first_step)
        metrics = self.sync.check_all()
        if fresh and not self.measurement:
            self.loggers.log(0, metrics | self._evaluate(0))
            self._checkpoint(0)
        self.stop.patient = True
        for step in range(first_step, run.steps):
            metrics = self._train_step(step)
            done = step + 1
            if self._due(done, run.eval_every):
                metrics |= self._evaluate(done)
            metrics |= {f"timing_s/{name}": seconds for name, seconds in self._seconds.items()}
            self.loggers.log(done, metrics)
            self.ledger.append(done, *self._collected.account())
            self.console.step(done, metrics)
            self.rollouts.write(done, self._collected.scored)
            self.guards.check(done, metrics)
            self._seconds = {}  # a checkpoint's seconds stand in the next step's line
            # After its line in the log: a run that resumes from here will not write that line again.
            if self.stop.asked or self._due(done, run.checkpoint_every):
                self._checkpoint(done)
            if self.stop.asked and done < run.steps:
                self.checkpoints.finish()
                raise Preempted(f"asked to stop (SIGTERM) and stopped after step {done}; go on with 'mxdist resume'")
        self.checkpoints.finish()

    def _due(self, done: int, every: int) -> bool:
        """Whether what is done ``every`` so many steps and at the end is to be done after ``done`` steps."""
        return not self.measurement and (done == self.config.run.steps or (every > 0 and done % every == 0))

    def _train_step(self, step: int) -> dict[str, float]:
        """One optimizer step (or ``algorithm.minibatches`` of them) on one batch of groups."""
        config, started = self.config, time.monotonic()
        self.checkpoints.look()
        self.console.working(f"sampling for step {step + 1}")
        with self._timed("rollout"):
            self.collector.submit_through(min(step + config.rollout.max_lag, config.run.steps - 1))
            self._collected = collected = self.collector.collect(step)
        self.console.working(f"learning from step {step + 1}")
        with self._timed("update"):
            reports = self._update(step, collected)
        self.checkpoints.look()
        with self._timed("sync"):
            self.sync.push(step + 1)
            # The newest push that no batch under way stands before; with max_lag 0 the one just made.
            sync_metrics = self.sync.check_through(step + 1 - config.rollout.max_lag)
        entropy = sum((report.entropy for report in reports), EntropyStatistics())
        self.aqn.observe(step, entropy)
        seconds = self._seconds["step"] = time.monotonic() - started
        costs = cost_metrics(self.shape, collected, reports, config.learner.ranks)
        return step_metrics(step, collected, reports, entropy, seconds) | costs | sync_metrics

    def _update(self, step: int, collected: Collected) -> list[UpdateReport]:
        config = self.config
        batch = build_batch(
            collected.scored,
            get_objective(config.algorithm),
            config.algorithm.minibatches,
            config.rollout.max_new_tokens,
            self.shape.pad_token_id,
            config.rollout.temperature,
        )
        lr = learning_rate(config.optimizer, step)
        watch = config.log.quant_every > 0 and step % config.log.quant_every == 0
        trace = self.measurement.trace if self.measurement and step == config.run.steps - 1 else None
        try:
            return self.learners.update(batch, config.algorithm, lr, f"update of step {step}", watch, trace)
        except NotFinite as found:
            raise self.guards.not_finite(found) from None

    def _warm_start(self) -> None:
        """Supervised steps on the task's demonstrations, by the same learner."""
        section, pad = self.config.warm_start, self.shape.pad_token_id
        algorithm = Supervised(prompts_per_step=section.sequences)
        objective = get_objective(algorithm)
        if section.steps and (left_out := self.task.left_out()):
            self.console.note(left_out)
        for step in range(section.steps):
            pairs = self.task.demonstrations(derive_seed(self.config.run.seed, "warm start", step), section.sequences)
            sequences = [
                Answered(prompt, np.asarray(answer), np.zeros(len(answer), dtype=np.float32))
                for prompt, answer in pairs
            ]
            lengths = np.array([len(sequence.response) for sequence in sequences])
            weights = token_weights(objective, lengths, 1, int(lengths.max()))
            batch = pad_sequences(sequences, np.zeros(len(sequences)), weights, pad, temperature=1.0)
            lr = warm_start_learning_rate(section, step)
            reports = self.learners.update(batch, algorithm, lr, f"warm start step {step}")
            loss = sum((report.means["warm_start/loss"] for report in reports[1:]), reports[0].means["warm_start/loss"])
            self.console.warm_start(step + 1, section.steps, loss.value)

    def _evaluate(self, step: int) -> dict[str, float]:
        """Greedy accuracy on the held-out problems, with the quantised weights and no noise."""
        self.console.working("evaluating")
        with self._timed("eval"):
            self.sync.check_all()
            accuracy = greedy_accuracy(self.config, self.task, self.pool, self.rewards)
        self.console.note(f"step {step}: greedy accuracy {accuracy} on {accuracy.problems} problems")
        return {"eval/accuracy": accuracy.value}

    def _checkpoint(self, step: int) -> None:
        """Begin one; it is written while training goes on."""
        self.console.working("taking a checkpoint")
        with self._timed("checkpoint"):
            state = ControllerState(
                step=step,
                cursor=self.collector.cursor.state(),
                aqn=self.aqn.state(),
                aqn_steps=self.aqn.total_steps,
                recipe=self.config.recipe,
                versions=versions(),
            )
            self.checkpoints.begin(state, self.collector.ahead())

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - started
