"""What a task is: problems to train on, held-out problems, worked answers, and a position in the training order."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from random import Random

import numpy as np

from mxdist.messages import Prompt
from mxdist.seeds import derive_seed
from mxdist.tasks.tokenizer import TaskTokenizer


@dataclass(frozen=True)
class RewardResult:
    """The reward of one answer and what it is made of; ``parts`` always has "accuracy" (0 or 1)."""

    total: float
    parts: dict[str, float]
    final: str  # the final answer as it was read, the same for the same number however written; "" where none is


@dataclass(frozen=True)
class Demonstration:
    """A worked answer for the warm start. The answer ends with the end-of-sequence token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter((self.prompt, self.answer))


@dataclass(frozen=True)
class Cursor:
    """Position in the training order: ``position`` problems of ``epoch`` have been drawn."""

    epoch: int = 0
    position: int = 0

    def state(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def restore(cls, state: dict[str, int]) -> "Cursor":
        return cls(**state)


def draw_indices(cursor: Cursor, size: int, count: int, run_seed: int) -> tuple[list[int], Cursor]:
    """Draw ``count`` distinct problems out of ``size``; the order of an epoch follows from the run's seed alone.

    When fewer than ``count`` are left in an epoch they are passed over and the next epoch begins: a batch never holds
    the same problem twice.

    Raises:
        ValueError: ``count`` is more than ``size``.
    """
    if count > size:
        raise ValueError(f"cannot draw {count} distinct problems out of {size}")
    if cursor.position + count > size:
        cursor = Cursor(cursor.epoch + 1, 0)
    order = np.random.default_rng(derive_seed(run_seed, "data", cursor.epoch)).permutation(size)
    end = cursor.position + count
    return order[cursor.position : end].tolist(), Cursor(cursor.epoch, end)


class Task(ABC):
    """Problems as token sequences. Built before Ray starts, so that every mistake in the data is found by then."""

    def __init__(self, name: str, tokenizer: TaskTokenizer, run_seed: int) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self._run_seed = run_seed

    @property
    @abstractmethod
    def training_size(self) -> int:
        """Number of training problems."""

    @abstractmethod
    def training_prompt(self, index: int) -> Prompt: ...

    @abstractmethod
    def eval_prompts(self) -> list[Prompt]:
        """The held-out problems, always the same and in the same order."""

    def longest_prompt(self) -> Prompt:
        """The longest of all prompts, held-out ones included."""
        training = (self.training_prompt(index) for index in range(self.training_size))
        return max([*training, *self.eval_prompts()], key=lambda prompt: len(prompt.tokens))

    @abstractmethod
    def demonstration(self, index: int, random: Random) -> Demonstration:
        """A worked answer to training problem ``index``; ``random`` decides where the task leaves something open."""

    def left_out(self) -> str:
        """What the warm start does not show, in a sentence; empty when it shows everything."""
        return ""

    def answer_text(self, tokens: Iterable[int]) -> str:
        """The text that a sampled answer is judged by."""
        return self.tokenizer.decode(tokens)

    def kind(self, prompt: Prompt) -> str:  # noqa: ARG002
        """The class of problems it belongs to, reported on its own by an evaluation; empty for none."""
        return ""

    @abstractmethod
    def describe(self, prompt: Prompt) -> str:
        """Where the user finds this problem, for messages."""

    def draw(self, cursor: Cursor, count: int) -> tuple[list[Prompt], Cursor]:
        """The next ``count`` training prompts and the position after them."""
        indices, after = draw_indices(cursor, self.training_size, count, self._run_seed)
        return [self.training_prompt(index) for index in indices], after

    def demonstrations(self, seed: int, count: int) -> list[Demonstration]:
        """Worked answers to ``count`` training problems drawn with replacement."""
        random = Random(seed)
        return [self.demonstration(random.randrange(self.training_size), random) for _ in range(count)]
