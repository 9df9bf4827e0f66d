"""GSM8K as published: school problems in words, worked solutions that end in ``#### n``."""

from random import Random

from mxdist.config.schema import Gsm8kData
from mxdist.errors import UserError
from mxdist.messages import Prompt
from mxdist.tasks.base import Demonstration, Task
from mxdist.tasks.question_files import Question, read_questions
from mxdist.tasks.tokenizer import TaskTokenizer, train_byte_level_bpe

ANSWER_MARK = "####"


def prompt_text(question: Question) -> str:
    return f"Question: {question.question.strip()}\nAnswer:"


def answer_text(question: Question) -> str:
    return f" {question.solution.strip()}"


class Gsm8kTask(Task):
    """Reads both files, and trains the tokenizer on the training file unless a run already has one.

    Args:
        context: tokens of a prompt and its answer together; longer worked solutions are left out of the warm start.
    """

    def __init__(self, data: Gsm8kData, run_seed: int, context: int, tokenizer: TaskTokenizer | None = None) -> None:
        self._training_questions = read_questions(data.train, "data.train", "train")
        eval_questions = read_questions(data.eval, "data.eval", "test")[: data.eval_problems]
        if tokenizer is None:
            texts = [prompt_text(q) + answer_text(q) for q in self._training_questions]
            tokenizer = train_byte_level_bpe(texts, data.vocab_size)
        super().__init__(data.task, tokenizer, run_seed)
        self._training = _prompts(self._training_questions, tokenizer, "data.train")
        self._eval = _prompts(eval_questions, tokenizer, "data.eval")
        self._where = {q.key: q.where for q in [*self._training_questions, *eval_questions]}
        self._demonstrations = self._worked_solutions(context)

    @property
    def training_size(self) -> int:
        return len(self._training)

    def training_prompt(self, index: int) -> Prompt:
        return self._training[index]

    def eval_prompts(self) -> list[Prompt]:
        return self._eval

    def demonstration(self, index: int, random: Random) -> Demonstration:
        if index in self._demonstrations:
            return self._demonstrations[index]
        if not self._demonstrations:
            raise UserError(
                "no worked solution of data.train fits model.max_position_embeddings; raise it, or set "
                "warm_start.steps=0"
            )
        return self._demonstrations[random.choice(self._fitting)]

    def describe(self, prompt: Prompt) -> str:
        return self._where[prompt.key]

    def _worked_solutions(self, context: int) -> dict[int, Demonstration]:
        answers = self.tokenizer.answers([answer_text(q) for q in self._training_questions])
        fitting = {
            index: Demonstration(prompt.tokens, answer)
            for index, (prompt, answer) in enumerate(zip(self._training, answers, strict=True))
            if len(prompt.tokens) + len(answer) <= context
        }
        self._fitting = list(fitting)
        return fitting


def final_answer(question: Question, key: str) -> str:
    """What stands after the last ``####`` of the worked solution.

    Raises:
        UserError: nothing does.
    """
    _, mark, answer = question.solution.rpartition(ANSWER_MARK)
    if not mark or not answer.strip():
        raise UserError(f'{key}: the "answer" of {question.where} does not end in "{ANSWER_MARK} n"; mend that line')
    return answer.strip()


def _prompts(questions: list[Question], tokenizer: TaskTokenizer, key: str) -> list[Prompt]:
    tokens = tokenizer.prompts([prompt_text(q) for q in questions])
    return [Prompt(q.key, ids, final_answer(q, key)) for q, ids in zip(questions, tokens, strict=True)]
