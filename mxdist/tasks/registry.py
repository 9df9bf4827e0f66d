"""From the configuration to its task, with every mistake in the data found before Ray starts."""

from pathlib import Path

from mxdist.config import Config
from mxdist.config.schema import ArithmeticData
from mxdist.errors import UserError
from mxdist.tasks.arithmetic import ArithmeticTask
from mxdist.tasks.base import Task
from mxdist.tasks.gsm8k import Gsm8kTask
from mxdist.tasks.tokenizer import TaskTokenizer


def make_task(config: Config, tokenizer_directory: Path | None = None) -> Task:
    """The task of a run.

    Args:
        tokenizer_directory: of a run that goes on: the tokenizer its model learned with, where the task trains one.
    Raises:
        UserError: the data is missing or malformed, too little for a batch, or a prompt does not fit the context.
    """
    data, seed = config.data, config.run.seed
    task: Task
    if isinstance(data, ArithmeticData):
        task = ArithmeticTask(data, seed)
    else:
        saved = None if tokenizer_directory is None else TaskTokenizer.load(tokenizer_directory)
        task = Gsm8kTask(data, seed, config.context, saved)
    if config.algorithm.prompts_per_step > task.training_size:
        raise UserError(
            f"algorithm.prompts_per_step={config.algorithm.prompts_per_step} is more than the {task.training_size} "
            f"training problems of data.task={data.task}; lower it"
        )
    _require_prompts_fit(task, config)
    return task


def _require_prompts_fit(task: Task, config: Config) -> None:
    context, answer = config.context, config.rollout.max_new_tokens
    longest = task.longest_prompt()
    length, limit = len(longest.tokens), context - answer
    if length > limit:
        raise UserError(
            f"the prompt of {task.describe(longest)} has {length} tokens, but {config.context_key}={context} "
            f"less rollout.max_new_tokens={answer} leaves {limit}; raise {config.context_key} to at least "
            f"{length + answer}"
        )
