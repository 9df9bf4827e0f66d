"""From the configuration to its task, with every mistake in the data found before Ray starts."""

from pathlib import Path

from mxdist.config import Config
from mxdist.config.schema import ArithmeticData, Gsm8kData
from mxdist.errors import UserError
from mxdist.tasks.arithmetic import ArithmeticTask
from mxdist.tasks.base import Task
from mxdist.tasks.checkpoint_tokenizer import CheckpointTokenizer
from mxdist.tasks.gsm8k import Gsm8kTask
from mxdist.tasks.tokenizer import TaskTokenizer


def make_task(config: Config, tokenizer_directory: Path | None = None) -> Task:
    """The task of a run.

    Args:
        tokenizer_directory: of a run that goes on: the tokenizer its model learned with; arithmetic has its own.
    Raises:
        UserError: the data is missing or malformed, too little for a batch, or a prompt does not fit the context.
    """
    data, seed = config.data, config.run.seed
    task: Task
    if isinstance(data, ArithmeticData):
        task = ArithmeticTask(data, seed)
    else:
        task = Gsm8kTask(data, seed, config.context, _given_tokenizer(config, data, tokenizer_directory))
    _require_rows(task.tokenizer, config)
    if config.algorithm.prompts_per_step > task.training_size:
        raise UserError(
            f"algorithm.prompts_per_step={config.algorithm.prompts_per_step} is more than the {task.training_size} "
            f"training problems of data.task={data.task}; lower it"
        )
    _require_prompts_fit(task, config)
    return task


def _given_tokenizer(config: Config, data: Gsm8kData, saved: Path | None) -> TaskTokenizer | None:
    """The tokenizer of the run or of the checkpoint; None when one is to be trained."""
    if config.model.path is None:
        return None if saved is None else TaskTokenizer.load(saved)
    chat = data.template == "chat"
    if saved is not None:
        return CheckpointTokenizer(saved, chat, data.chat_arguments)
    return CheckpointTokenizer.of_model(config.model.path, chat, data.chat_arguments)


def _require_rows(tokenizer: TaskTokenizer, config: Config) -> None:
    """Each id needs a row of the embedding. More rows than ids are usual: checkpoints pad theirs."""
    rows, ids = config.model.vocab_size, tokenizer.vocab_size
    if rows is not None and ids > rows:
        origin = "the task" if config.model.path is None else f"model.path={config.model.path}"
        raise UserError(
            f"the tokenizer of {origin} has ids up to {ids - 1}, but the embedding has {rows} rows "
            f"(model.vocab_size); give the tokenizer that belongs to the model"
        )


def _require_prompts_fit(task: Task, config: Config) -> None:
    context, answer = config.context, config.rollout.max_new_tokens
    longest = task.longest_prompt()
    length, limit = len(longest.tokens), context - answer
    if length > limit:
        fewer = ", or lower data.few_shot" if isinstance(config.data, Gsm8kData) and config.data.few_shot else ""
        raise UserError(
            f"the prompt of {task.describe(longest)} has {length} tokens, but {config.context_key}={context} "
            f"less rollout.max_new_tokens={answer} leaves {limit}; raise {config.context_key} to at least "
            f"{length + answer}{fewer}"
        )
