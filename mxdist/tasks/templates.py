"""How a question is put to a model, and which part of what it writes is its answer (``data.template``)."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from mxdist.config.schema import Gsm8kData
from mxdist.errors import UserError
from mxdist.tasks.checkpoint_tokenizer import CheckpointTokenizer
from mxdist.tasks.question_files import Question
from mxdist.tasks.tokenizer import TaskTokenizer

INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
PREAMBLE = 'Solve each problem step by step. End with the final answer after "####".\n\n'
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's marks for a calculator that is not there
_NEXT_QUESTION = "\nQuestion:"

Asked = tuple[Question, Sequence[Question]]  # a question, and the worked examples before it


class Template(ABC):
    @abstractmethod
    def prompts(self, asked: Sequence[Asked]) -> list[tuple[int, ...]]:
        """Token ids of prompts."""

    @abstractmethod
    def answers(self, questions: Sequence[Question]) -> list[tuple[int, ...]]:
        """Token ids of the worked solutions, in the form that the model is asked for."""

    def own_part(self, text: str) -> str:
        """What of a text the model wrote is its answer."""
        return text


@dataclass(frozen=True)
class QuestionAnswer(Template):
    """``Question: ...`` and ``Answer:``, blank lines between examples.

    A model that goes on after its answer with a question of its own is judged by what stands before that question,
    wherever ``cut`` is set: base models do, most of all after examples.
    """

    tokenizer: TaskTokenizer
    preamble: str
    keep_marks: bool  # of the calculator
    cut: bool

    def prompts(self, asked: Sequence[Asked]) -> list[tuple[int, ...]]:
        return self.tokenizer.prompts([self._text(question, examples) for question, examples in asked])

    def answers(self, questions: Sequence[Question]) -> list[tuple[int, ...]]:
        return self.tokenizer.answers([self._answer(question) for question in questions])

    def own_part(self, text: str) -> str:
        return text.partition(_NEXT_QUESTION)[0] if self.cut else text

    def _text(self, question: Question, examples: Sequence[Question]) -> str:
        shown = [f"{_asked(example)}{self._answer(example)}" for example in examples]
        return self.preamble + "\n\n".join([*shown, _asked(question)])

    def _answer(self, question: Question) -> str:
        return f" {question.solution.strip() if self.keep_marks else solution_without_marks(question)}"


@dataclass(frozen=True)
class Chat(Template):
    """By the tokenizer's chat template; examples are earlier turns."""

    tokenizer: CheckpointTokenizer

    def prompts(self, asked: Sequence[Asked]) -> list[tuple[int, ...]]:
        return self.tokenizer.chats([self._messages(question, examples) for question, examples in asked])

    def answers(self, questions: Sequence[Question]) -> list[tuple[int, ...]]:
        return self.tokenizer.answers([solution_without_marks(question) for question in questions])

    def _messages(self, question: Question, examples: Sequence[Question]) -> list[dict[str, str]]:
        messages = []
        for example in examples:
            messages.append({"role": "user", "content": self._asked(example)})
            messages.append(
                {"role": "assistant", "content": self._without_tokens(solution_without_marks(example), example)}
            )
        return [*messages, {"role": "user", "content": self._asked(question)}]

    def _asked(self, question: Question) -> str:
        return f"{self._without_tokens(question.question.strip(), question)} {INSTRUCTION}"

    def _without_tokens(self, text: str, question: Question) -> str:
        for token in self.tokenizer.special_tokens:
            if token in text:
                raise UserError(f"{question.where} holds {token}, which the chat would take for a mark; remove it")
        return text


def template_for(data: Gsm8kData, tokenizer: TaskTokenizer) -> Template:
    """The template that ``data.template`` names.

    Raises:
        UserError: a chat is asked for and the tokenizer knows none.
    """
    if data.template == "chat":
        if not isinstance(tokenizer, CheckpointTokenizer):
            raise UserError(
                "data.template=chat needs a checkpoint's chat template; set model.path, or another template"
            )
        return Chat(tokenizer)
    plain = data.template == "plain"
    return QuestionAnswer(tokenizer, "" if plain else PREAMBLE, keep_marks=plain, cut=not plain or data.few_shot > 0)


def plain_text(question: Question) -> str:
    """A question and its solution as the plain template writes them: what a tokenizer is trained on."""
    return f"{_asked(question)} {question.solution.strip()}"


def solution_without_marks(question: Question) -> str:
    """The worked solution in words, ``<<48/2=24>>`` left out."""
    return _CALCULATOR.sub("", question.solution.strip())


def _asked(question: Question) -> str:
    return f"Question: {question.question.strip()}\nAnswer:"
