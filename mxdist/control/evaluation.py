"""How good a policy is on the held-out problems: within a run, and as a command of its own."""

from pathlib import Path

import numpy as np

from mxdist.config import Config, load_config
from mxdist.control.checkpoints import CheckpointStore
from mxdist.control.collect import RewardPool
from mxdist.control.groups import RolloutPool, merge_results
from mxdist.control.system import running
from mxdist.control.weights import WeightSync
from mxdist.messages import Noise, SamplingSettings
from mxdist.observe.console import Console
from mxdist.observe.run_directory import TOKENIZER, RunDirectory
from mxdist.tasks.base import Task
from mxdist.tasks.registry import make_task


def evaluate(run_path: Path, overrides: list[str]) -> dict[str, float]:
    """Greedy accuracy of the newest checkpoint on the held-out problems, with quantised and with BF16 weights."""
    with RunDirectory.open(run_path) as run_dir:
        config = load_config(run_dir.config_path, overrides)
        state, learner_folder = CheckpointStore(run_dir.path).newest()
        task = make_task(config, run_dir.path / TOKENIZER)
        problems = len(task.eval_prompts())
        accuracies: dict[str, float] = {}
        with Console(run_dir.path) as console:
            plain = config.model_copy(update={"recipe": "bf16", "recipe_overrides": ()})
            for recipe, variant in {_recipe_in_words(config): config, "bf16": plain}.items():
                with running(variant, task, run_dir.path, console) as system:
                    system.learners.load(learner_folder)
                    sync = WeightSync(system.learners, system.pool, variant)
                    sync.push(state.step)
                    sync.check_all()
                    accuracies[recipe] = greedy_accuracy(variant, task, system.pool, system.rewards)
                console.note(f"step {state.step}, recipe {recipe}: {in_words(accuracies[recipe], problems)}")
        return accuracies


def greedy_accuracy(config: Config, task: Task, pool: RolloutPool, rewards: RewardPool) -> float:
    """Share of the held-out problems whose greedy answer is right, with clean weights."""
    prompts = task.eval_prompts()
    sampling = SamplingSettings(1, temperature=0.0, max_new_tokens=config.rollout.max_new_tokens, seed=0)
    calls = pool.generate(-1, prompts, sampling, Noise(0.0, 0), "evaluation")
    result = merge_results(pool.wait(calls, config.deadlines.evaluate, "evaluate"))
    scored = rewards.score(result.groups, "reward of the evaluation")
    return float(np.mean([group.parts["accuracy"] for group in scored]))


def in_words(accuracy: float, problems: int) -> str:
    """An accuracy with its standard error."""
    error = (accuracy * (1 - accuracy) / problems) ** 0.5
    return f"greedy accuracy {accuracy:.3f} +- {error:.3f} on {problems} problems"


def _recipe_in_words(config: Config) -> str:
    return config.recipe + (" with recipe_overrides" if config.recipe_overrides else "")
