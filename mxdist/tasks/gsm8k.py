"""GSM8K as published: school problems in words, worked solutions that end in ``#### n``."""

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import TypeVar

import numpy as np

from mxdist.config.schema import Gsm8kData
from mxdist.errors import UserError
from mxdist.messages import Prompt
from mxdist.seeds import derive_seed
from mxdist.tasks.base import Demonstration, Task
from mxdist.tasks.question_files import Question, read_questions
from mxdist.tasks.templates import Template, plain_text, template_for
from mxdist.tasks.tokenizer import TaskTokenizer, train_byte_level_bpe

ANSWER_MARK = "####"
CHUNK = 512  # texts encoded at a time
Item = TypeVar("Item")


class Gsm8kTask(Task):
    """Reads both files, and trains a tokenizer on the training file unless one is given.

    Args:
        context: tokens of a prompt and its answer together; longer worked solutions are left out of the warm start.
    """

    def __init__(self, data: Gsm8kData, run_seed: int, context: int, tokenizer: TaskTokenizer | None = None) -> None:
        training = read_questions(data.train, "data.train", "train")
        held_out = read_questions(data.eval, "data.eval", "test")[: data.eval_problems]
        if tokenizer is None:
            tokenizer = train_byte_level_bpe([plain_text(q) for q in training], data.vocab_size)
        super().__init__(data.task, tokenizer, run_seed)
        self._template = template_for(data, tokenizer)
        examples = _Examples(training, data.few_shot, run_seed)
        if data.few_shot:
            self._require_room(training[0], examples, data.few_shot, context)
        self._training = _Prompts(training, "data.train", self._template, examples)
        self._eval = _Prompts(held_out, "data.eval", self._template, examples)
        self._where = {q.key: q.where for q in [*training, *held_out]}
        self._solutions = _in_chunks(self._template.answers, training)
        lengths = self._training.lengths + np.array([len(answer) for answer in self._solutions])
        self._context = context
        self._fits = lengths <= context  # bool [training]
        self._fitting = np.flatnonzero(self._fits).tolist()

    def _require_room(self, question: Question, examples: "_Examples", few_shot: int, context: int) -> None:
        """Before all prompts are encoded, which takes minutes when the examples are many."""
        [prompt] = self._template.prompts([(question, examples.before(question))])
        if len(prompt) >= context:
            raise UserError(
                f"data.few_shot={few_shot} makes prompts of about {len(prompt)} tokens, more than the context of "
                f"{context}; lower it, or raise model.max_position_embeddings or rollout.max_context"
            )

    @property
    def training_size(self) -> int:
        return len(self._training)

    def training_prompt(self, index: int) -> Prompt:
        return self._training[index]

    def eval_prompts(self) -> list[Prompt]:
        return [self._eval[index] for index in range(len(self._eval))]

    def longest_prompt(self) -> Prompt:
        longest = [part[int(part.lengths.argmax())] for part in (self._training, self._eval)]
        return max(longest, key=lambda prompt: len(prompt.tokens))

    def demonstration(self, index: int, random: Random) -> Demonstration:
        if not self._fitting:
            raise UserError(
                f"no worked solution of data.train fits the context of {self._context} tokens; raise "
                f"model.max_position_embeddings or rollout.max_context, or set warm_start.steps=0"
            )
        if not self._fits[index]:
            index = random.choice(self._fitting)
        return Demonstration(self._training[index].tokens, tuple(self._solutions[index].tolist()))

    def left_out(self) -> str:
        long = self.training_size - len(self._fitting)
        if not long:
            return ""
        return (
            f"the warm start leaves out {long} of {self.training_size} worked solutions: with their prompts they are "
            f"longer than the context of {self._context} tokens"
        )

    def describe(self, prompt: Prompt) -> str:
        return self._where[prompt.key]

    def answer_text(self, tokens: Iterable[int]) -> str:
        return self._template.own_part(self.tokenizer.decode(tokens))


class _Examples:
    """The worked examples before a question: training problems drawn by the run's seed, the same for every question.

    One spare is drawn as well, to stand in where the question is an example itself.
    """

    def __init__(self, training: Sequence[Question], count: int, run_seed: int) -> None:
        self._count = count
        order = Random(derive_seed(run_seed, "few shot")).sample(range(len(training)), len(training)) if count else []
        distinct = {training[index].question.strip(): training[index] for index in reversed(order)}
        if count and len(distinct) <= count:
            raise UserError(
                f"data.few_shot={count} needs {count + 1} different questions in data.train, which has "
                f"{len(distinct)}; lower it"
            )
        self._chosen = list(distinct.values())[::-1][: count + 1]

    def before(self, question: Question) -> list[Question]:
        others = [example for example in self._chosen if example.question.strip() != question.question.strip()]
        return others[: self._count]


class _Prompts:
    """The prompts of a file. Token ids are kept as int32 arrays: with examples they are millions."""

    def __init__(self, questions: Sequence[Question], key: str, template: Template, examples: _Examples) -> None:
        self._keys = [question.key for question in questions]
        self._references = [final_answer(question, key) for question in questions]
        self._tokens = _in_chunks(template.prompts, [(question, examples.before(question)) for question in questions])
        self.lengths = np.array([len(tokens) for tokens in self._tokens])  # int64 [questions]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Prompt:
        return Prompt(self._keys[index], tuple(self._tokens[index].tolist()), self._references[index])


def final_answer(question: Question, key: str) -> str:
    """What stands after the last ``####`` of the worked solution.

    Raises:
        UserError: nothing does.
    """
    _, mark, answer = question.solution.rpartition(ANSWER_MARK)
    if not mark or not answer.strip():
        raise UserError(f'{key}: the "answer" of {question.where} does not end in "{ANSWER_MARK} n"; mend that line')
    return answer.strip()


def _in_chunks(encode: Callable[[Sequence[Item]], list[tuple[int, ...]]], items: Sequence[Item]) -> list[np.ndarray]:
    """Token ids of each item, int32 [tokens]."""
    return [
        np.array(tokens, dtype=np.int32)
        for start in range(0, len(items), CHUNK)
        for tokens in encode(items[start : start + CHUNK])
    ]
