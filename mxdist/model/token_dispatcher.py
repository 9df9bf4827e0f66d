"""Megatron's all-to-all dispatcher, with ``copies`` where it makes copies of tokens and adds them up."""

from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from mxdist.model.copies import Copies, Sums


class MxTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """For layers without shared experts, where every token goes to as many experts and none is dropped."""

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Rows sorted by expert, [tokens * top k, hidden], and their probabilities.

        Args:
            hidden_states: [..., hidden].
            routing_map: bool [tokens, experts].
            probs: float32 [tokens, experts].
        """
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        hidden = hidden_states.view(-1, hidden_states.shape[-1])
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.preprocess(routing_map))
        chosen = routing_map.T.flatten().nonzero().squeeze(1)  # expert * tokens + token
        self._tokens = chosen % len(hidden)
        self._places = self._tokens.argsort(stable=True).view(len(hidden), -1)
        return Copies.apply(hidden, self._tokens, self._places), probs.T.flatten().index_select(0, chosen)

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """The sum of each token's rows, of the shape that ``dispatch_preprocess`` was given."""
        return Sums.apply(permutated_local_input_tokens, self._tokens, self._places).view(self.hidden_shape)
