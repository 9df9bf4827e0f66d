"""The command eval: a run's newest checkpoint, or a configuration's model before any training, held to the task."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mxdist.config import Config, load_config
from mxdist.control.batch import ScoredGroup
from mxdist.control.checkpoints import CheckpointStore
from mxdist.control.estimates import ERRORS, Estimate, mean
from mxdist.control.evaluation import Decoding, answer, estimates, per_problem
from mxdist.control.system import running
from mxdist.control.weights import WeightSync
from mxdist.errors import UserError
from mxdist.observe.console import Console
from mxdist.observe.evaluation_files import write_answers
from mxdist.observe.run_directory import TOKENIZER, RunDirectory
from mxdist.seeds import derive_seed
from mxdist.tasks.base import Task
from mxdist.tasks.registry import make_task

Results = dict[str, dict[str, Estimate]]  # by recipe, then by measure


@dataclass(frozen=True)
class _Subject:
    """What is evaluated. ``learner_folder`` is None for a model that no step has trained."""

    config: Config
    task: Task
    path: Path  # where results go
    step: int
    learner_folder: Path | None


def evaluate(path: Path, samples: int, temperature: float | None, overrides: list[str]) -> Results:
    """Answer the held-out problems with the configured recipe and with BF16 weights, print and keep what came of it.

    Args:
        path: a run directory (its newest checkpoint), or a configuration file (its model as it starts).
        temperature: None is greedy for one sample, and ``rollout.temperature`` for several.
    """
    with _subject(path, overrides) as subject, Console(subject.path) as console:
        config, task = subject.config, subject.task
        decoding = _decoding(config, samples, temperature)
        plain = config.model_copy(update={"recipe": "bf16", "recipe_overrides": ()})
        answers: dict[str, list[ScoredGroup]] = {}
        files: list[Path] = []
        for recipe, variant in {_recipe_in_words(config): config, "bf16": plain}.items():
            scored = answers[recipe] = _answers(subject, variant, decoding, console)
            files.append(
                write_answers(subject.path, subject.step, recipe, decoding.temperature, scored, task.tokenizer)
            )
            console.note(f"step {subject.step}, recipe {recipe}: {_in_a_line(task, scored, decoding)}")
        results = {recipe: estimates(task, scored, decoding) for recipe, scored in answers.items()}
        console.note(f"step {subject.step}, {len(task.eval_prompts())} problems, {decoding}")
        for line in table(results, paired_differences(answers, decoding)):
            console.note(line)
        console.note(ERRORS)
        for file in files:
            console.note(f"answers: {file}")
        return results


@contextmanager
def _subject(path: Path, overrides: list[str]) -> Iterator[_Subject]:
    if path.is_dir():
        with RunDirectory.open(path) as run_dir:
            config = load_config(run_dir.config_path, overrides)
            checkpoint = CheckpointStore(run_dir.path).existing(lambda line: print(line, file=sys.stderr))
            task = make_task(config, run_dir.path / TOKENIZER)
            yield _Subject(config, task, run_dir.path, checkpoint.state.step, checkpoint.learner_folder)
        return
    config = load_config(path, overrides)
    task = make_task(config)
    with RunDirectory.create(config) as run_dir:
        task.tokenizer.save(run_dir.path / TOKENIZER)
        try:
            yield _Subject(config, task, run_dir.path, 0, None)
        except UserError:
            run_dir.discard()  # nothing is lost, and the mended command can be repeated
            raise


def _decoding(config: Config, samples: int, temperature: float | None) -> Decoding:
    if temperature is None:
        temperature = 0.0 if samples == 1 else config.rollout.temperature
    if samples > 1 and temperature == 0:
        raise UserError(
            f"--samples {samples} with --temperature 0 would give the same answer {samples} times; raise the "
            f"temperature, or leave --samples out"
        )
    # The same seeds for every recipe, so that their answers differ by the recipe as little else as can be.
    return Decoding(samples, temperature, derive_seed(config.run.seed, "evaluation"))


def _answers(subject: _Subject, variant: Config, decoding: Decoding, console: Console) -> list[ScoredGroup]:
    """All processes up with the weights of one recipe, asked, and stopped again."""
    problems = len(subject.task.eval_prompts())
    with running(variant, subject.task, subject.path, console, subject.learner_folder) as system:
        if subject.learner_folder is not None:
            system.learners.load(subject.learner_folder)
        sync = WeightSync(system.learners, system.pool, system.transport, variant)
        sync.push(subject.step)
        sync.check_all()
        console.working(f"answering {problems} problems")
        return answer(
            variant,
            subject.task,
            system.pool,
            system.rewards,
            decoding,
            lambda done: console.working(f"answered {done} of {problems} problems"),
        )


def _in_a_line(task: Task, scored: list[ScoredGroup], decoding: Decoding) -> str:
    found = estimates(task, scored, decoding)
    ends = [next(iter(found)), *(name for name in found if name == f"maj@{decoding.samples}")]
    shown = ", ".join(f"{name} {found[name]}" for name in ends)
    samples = [sample for group in scored for sample in group.group.samples]
    tokens = sum(len(sample.tokens) for sample in samples) / len(samples)
    cut_off = sum(not sample.finished for sample in samples) / len(samples)
    return (
        f"{'greedy ' if decoding.temperature == 0 else ''}{shown} on {len(scored)} problems; {tokens:.1f} tokens an "
        f"answer, {cut_off:.1%} cut off"
    )


def paired_differences(answers: dict[str, list[ScoredGroup]], decoding: Decoding) -> dict[str, Estimate]:
    """The configured recipe less bf16, problem by problem: a far smaller error than that of two separate means."""
    if len(answers) < 2:
        return {}
    ours, plain = (per_problem(scored, decoding) for scored in answers.values())
    return {name: mean(ours[name] - plain[name], width=2) for name in ours}


def table(results: Results, differences: dict[str, Estimate]) -> list[str]:
    """Lines of at most 60 columns: a recipe, and below it its measures with their standard errors."""
    blocks = dict(results)
    if differences:
        first, second = results
        blocks[f"{first} less {second}, paired by problem"] = differences
    lines = []
    for heading, measures in blocks.items():
        lines.append(heading)
        lines += [f"  {name:<18} {found.value:>7.3f} +- {found.error:.3f}" for name, found in measures.items()]
    return lines


def _recipe_in_words(config: Config) -> str:
    return config.recipe + ("+overrides" if config.recipe_overrides else "")
