"""Copies of tokens and their sums are what torch's own gathering and adding gives, gradients too."""

import torch

from mxdist.model.copies import Copies, Sums


def test_copies_and_sums_and_their_gradients_are_those_of_gathering_and_adding() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(50)])  # experts of each token
    tokens = torch.zeros(6, 50, dtype=torch.bool).scatter_(0, chosen.t(), True).flatten().nonzero().squeeze(1) % 50
    places = tokens.argsort(stable=True).view(50, 3)
    assert torch.equal(tokens[places], torch.arange(50)[:, None].expand(50, 3))
    hidden = torch.randn(50, 8, generator=generator, requires_grad=True)
    rows = torch.randn(150, 8, generator=generator, requires_grad=True)
    dy, dz = torch.randn(150, 8, generator=generator), torch.randn(50, 8, generator=generator)
    ours = (Copies.apply(hidden, tokens, places), Sums.apply(rows, tokens, places))
    theirs = (hidden[tokens], torch.zeros(50, 8).index_add(0, tokens, rows))
    for got, wanted, gradient, leaf in zip(ours, theirs, (dy, dz), (hidden, rows), strict=True):
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(got, leaf, gradient)[0], torch.autograd.grad(wanted, leaf, gradient)[0]
        )


def test_a_sum_rounds_once() -> None:
    rows = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()
    summed = Sums.apply(rows, torch.zeros(3, dtype=torch.int64), torch.arange(3).view(1, 3))
    assert summed.item() == 258  # added one by one in bfloat16 it would stay 256
