"""The kept codebook is that of its weights, though others write to them meanwhile."""

import copy
import threading

import pytest
import torch

from modeling_simvq import SimVQ, kept_codebook

K, D = 64, 8


def test_a_write_while_the_codebook_is_made_is_not_kept(monkeypatch):
    quantizer = SimVQ(K, D).eval()

    def slow(basis, projection):
        book = make_book(basis, projection)
        quantizer.projection.weight.data.mul_(2)
        return book

    make_book = kept_codebook.make_book
    monkeypatch.setattr(kept_codebook, "make_book", slow)
    quantizer.codebook()
    monkeypatch.undo()
    assert torch.equal(quantizer.codebook(), copy.deepcopy(quantizer).codebook())


def test_threads_that_use_and_change_it_at_the_same_time():
    quantizer = SimVQ(K, D).eval()
    states = [SimVQ(K, D).projection.weight.detach() for _ in range(2)]
    latents, faults, stop = torch.randn(1, D, 3), [], threading.Event()

    def use():
        try:
            with torch.no_grad():
                while not stop.is_set():
                    quantizer(latents)
                    quantizer.lookup(torch.tensor([[1, 2]]))
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        quantizer.projection.weight.data.copy_(states[turn % 2])
        if turn % 5 == 0:
            quantizer.train().eval()
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults
    assert torch.equal(quantizer.codebook(), copy.deepcopy(quantizer).codebook())


@pytest.mark.parametrize("options", [{}, {"projection_hidden_dim": 12}])
def test_weights_that_are_others_only_while_the_codebook_is_made(options, monkeypatch):
    """Another thread writes, and writes back what was there: what is kept is of the compared weights."""
    quantizer = SimVQ(K, D, **options).eval()
    expected = copy.deepcopy(quantizer).codebook()

    def make_book(basis, project):
        states = [weight.detach().clone() for weight in quantizer.parameters()]
        for weight in quantizer.parameters():
            weight.data.mul_(3)
        made = real(basis, project)
        for weight, state in zip(quantizer.parameters(), states, strict=True):
            weight.data.copy_(state)
        return made

    real = kept_codebook.make_book
    monkeypatch.setattr(kept_codebook, "make_book", make_book)
    quantizer.codebook()
    assert torch.equal(quantizer.codebook(), expected)
