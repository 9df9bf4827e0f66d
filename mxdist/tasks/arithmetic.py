"""Sums of two numbers, generated: problems whose answers a small model learns in minutes on a CPU.

Problems look like ``37+25=`` with the answer ``62``, zero-padded to a fixed number of digits. Half need a carry.
The warm start shows the work of a pupil who often forgets to carry; the reward teaches it.
"""

from dataclasses import dataclass
from random import Random

import numpy as np

from mxdist.config.schema import ArithmeticData
from mxdist.errors import UserError
from mxdist.messages import Prompt
from mxdist.tasks.base import Demonstration, Task
from mxdist.tasks.tokenizer import character_tokenizer

ALPHABET = "0123456789+-="
HELD_OUT_SHARE = 8  # one problem in so many is held out


@dataclass(frozen=True)
class Sum:
    """One problem. ``digits`` is the width of both operands and of the sum."""

    left: int
    right: int
    digits: int

    @property
    def question(self) -> str:
        return f"{self.left:0{self.digits}d}+{self.right:0{self.digits}d}="

    @property
    def answer(self) -> str:
        return f"{self.left + self.right:0{self.digits}d}"

    @property
    def answer_without_carry(self) -> str:
        """Column by column, each modulo 10."""
        columns = [10**place for place in range(self.digits)]
        total = sum((self.left // c + self.right // c) % 10 * c for c in columns)
        return f"{total:0{self.digits}d}"


def _hash(left: np.ndarray, right: np.ndarray, purpose: int) -> np.ndarray:
    """A 64-bit hash of each problem, the same for a+b and b+a: neither trains a model while the other is held out.

    It depends on nothing a user sets, so no setting moves a held-out problem into training. (The mixing function is
    SplitMix64's, Steele et al. 2014.)

    Args:
        left, right: int64 [problems].
    """
    pair = np.minimum(left, right) << 20 | np.maximum(left, right)
    bits = (pair + (purpose << 40)).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


SPLIT, CHOICE, ORDER = range(3)  # purposes of a hash


def all_problems(digits: int) -> tuple[list[Sum], list[Sum]]:
    """Training and held-out problems, each in a fixed mixed order.

    Of the sums that fit ``digits`` digits, as many that need a carry as that need none: all of the rarer kind. One in
    ``HELD_OUT_SHARE`` of them is held out.
    """
    limit = 10**digits
    left, right = (side.reshape(-1) for side in np.mgrid[:limit, :limit])
    left, right = left[left + right < limit], right[left + right < limit]
    columns = [10**place for place in range(digits)]
    carries = np.any([left // c % 10 + right // c % 10 > 9 for c in columns], axis=0)
    by_hash = np.argsort(_hash(left, right, CHOICE), kind="stable")
    each = min(int(carries.sum()), int((~carries).sum()))
    chosen = np.concatenate([by_hash[kind[by_hash]][:each] for kind in (carries, ~carries)])
    chosen = chosen[np.argsort(_hash(left[chosen], right[chosen], ORDER), kind="stable")]
    problems = [Sum(int(a), int(b), digits) for a, b in zip(left[chosen], right[chosen], strict=True)]
    held_out = _hash(left[chosen], right[chosen], SPLIT) % np.uint64(HELD_OUT_SHARE) == 0
    training = [problem for problem, held in zip(problems, held_out, strict=True) if not held]
    return training, [problem for problem, held in zip(problems, held_out, strict=True) if held]


class ArithmeticTask(Task):
    """See the module."""

    def __init__(self, data: ArithmeticData, run_seed: int) -> None:
        super().__init__(data.task, character_tokenizer(ALPHABET), run_seed)
        self._forgotten_carries = data.forgotten_carries
        self._training, held_out = all_problems(data.digits)
        if data.eval_problems > len(held_out):
            raise UserError(
                f"data.eval_problems={data.eval_problems} is more than the {len(held_out)} held-out problems that "
                f"data.digits={data.digits} has; lower it"
            )
        self._eval = [self._prompt(problem) for problem in held_out[: data.eval_problems]]

    @property
    def training_size(self) -> int:
        return len(self._training)

    def training_prompt(self, index: int) -> Prompt:
        return self._prompt(self._training[index])

    def eval_prompts(self) -> list[Prompt]:
        return self._eval

    def longest_prompt(self) -> Prompt:
        return self._eval[0]  # all have the same length

    def demonstration(self, index: int, random: Random) -> Demonstration:
        problem = self._training[index]
        forgets = random.random() < self._forgotten_carries
        text = problem.answer_without_carry if forgets else problem.answer
        return Demonstration(self._prompt(problem).tokens, self.tokenizer.answers([text])[0])

    def kind(self, prompt: Prompt) -> str:
        left, right = map(int, prompt.key.removesuffix("=").split("+"))
        problem = Sum(left, right, len(prompt.reference))
        return "no carry" if problem.answer == problem.answer_without_carry else "carry"

    def describe(self, prompt: Prompt) -> str:
        return f"the problem {prompt.key}"

    def _prompt(self, problem: Sum) -> Prompt:
        return Prompt(problem.question, self.tokenizer.prompts([problem.question])[0], problem.answer)
