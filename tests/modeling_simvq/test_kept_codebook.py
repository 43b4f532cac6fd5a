"""The kept codebook follows its weights, however they are written."""

import copy
import threading

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from modeling_simvq import SimVQ

K, D = 64, 8


def data_write(quantizer):
    quantizer.projection.weight.data.mul_(3)


def detached_write(quantizer):
    quantizer.projection.bias.detach().add_(1)


def in_inference_mode(quantizer):
    with torch.inference_mode():
        quantizer.projection.weight.mul_(2)


def average_copied(quantizer):
    # As diffusers' and timm's averages do it.
    for parameter, average in zip(quantizer.parameters(), SimVQ(K, D).parameters(), strict=True):
        parameter.data.copy_(average.data)


def vector_to_parameters(quantizer):
    trained = [p for p in quantizer.parameters() if p.requires_grad]
    vector = nn.utils.parameters_to_vector(trained)
    nn.utils.vector_to_parameters(vector.detach() * 2, trained)


def numpy_view(quantizer):
    quantizer.projection.weight.detach().numpy()[0, 0] += 1


def storage_write(quantizer):
    quantizer.projection.bias.untyped_storage().copy_(torch.randn(D).untyped_storage())


def one_bit_of_the_basis(quantizer):
    quantizer.basis.data.view(torch.int32)[37, 5] ^= 1 << 20


def rows_of_the_basis_swapped(quantizer):
    quantizer.basis.data.copy_(quantizer.basis.data.roll(1, 0))


def columns_of_the_basis_swapped(quantizer):
    quantizer.basis.data.copy_(quantizer.basis.data.flip(1))


def signs_of_the_basis(quantizer):
    quantizer.basis.data[:, 1::2].neg_()


def storage_set(quantizer):
    with torch.no_grad():
        quantizer.projection.weight.set_(torch.randn(D, D))


def data_set(quantizer):
    quantizer.projection.weight.data = torch.randn(D, D)


def swapped(quantizer):
    torch.utils.swap_tensors(quantizer.projection.weight, nn.Parameter(torch.randn(D, D)))


def loaded_by_assignment(quantizer):
    quantizer.load_state_dict(SimVQ(K, D).state_dict(), assign=True)


def foreach(quantizer):
    torch._foreach_mul_([p.data for p in quantizer.parameters()], 2.0)


def optimizer_of_data(quantizer):
    flat = quantizer.projection.weight.data.view(-1).requires_grad_()
    flat.grad = torch.ones_like(flat)
    torch.optim.SGD([flat], lr=0.1).step()


def fused_optimizer(quantizer):
    weight = quantizer.projection.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()


def parametrized(quantizer):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(quantizer.projection, "weight", Twice())


def parametrized_then_written(quantizer):
    parametrized(quantizer)
    quantizer.codebook()
    quantizer.projection.parametrizations.weight.original.data.mul_(3)


def old_weight_norm(quantizer):
    nn.utils.weight_norm(quantizer.projection)
    quantizer.codebook()
    quantizer.projection.weight_g.data.mul_(3)


def pruned(quantizer):
    prune.random_unstructured(quantizer.projection, "weight", 0.5)
    quantizer.codebook()
    quantizer.projection.weight_orig.data.mul_(3)


def hooked(quantizer):
    quantizer.projection.register_forward_hook(lambda module, inputs, output: 2 * output)


def forward_replaced(quantizer):
    layer = quantizer.projection
    layer.forward = lambda rows: 2 * nn.functional.linear(rows, layer.weight, layer.bias)


class LowRank(nn.Module):
    """An adapter around a layer, as peft's are; its scale is a plain number."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.scale = base, 1.0
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, rows):
        return self.base(rows) + self.scale * self.up(self.down(rows))


def adapted(quantizer):
    quantizer.projection = LowRank(quantizer.projection)


def adapter_scaled(quantizer):
    adapted(quantizer)
    quantizer.codebook()
    quantizer.projection.scale = 2.0


def adapter_written(quantizer):
    adapted(quantizer)
    quantizer.codebook()
    quantizer.projection.up.weight.data.mul_(2)


def another_kind_of_layer(quantizer):
    quantizer.projection = nn.Sequential(quantizer.projection, nn.GELU())


def another_activation(quantizer):
    another_kind_of_layer(quantizer)
    quantizer.codebook()
    quantizer.projection[1].approximate = "tanh"


def bias_removed(quantizer):
    quantizer.projection.bias = None


def by_another_thread(quantizer):
    thread = threading.Thread(target=data_write, args=(quantizer,))
    thread.start()
    thread.join()


CHANGES = [value for value in list(vars().values()) if callable(value)]
CHANGES = [value for value in CHANGES if getattr(value, "__name__", "")[0].islower()]
CHANGES = [value for value in CHANGES if value.__module__ == __name__]


def results(quantizer, latents):
    every = torch.arange(K).view(1, K)
    with torch.no_grad():
        few = quantizer.lookup(every[:, :3])
        quantized, codes, _ = quantizer(latents)
        return [codes, quantized, quantizer.codebook(), quantizer.lookup(every), few]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("first", ["search", "lookup of all", "lookup of a few"])
def test_every_way_to_write_weights_is_seen(change, first):
    torch.manual_seed(0)
    quantizer, latents = SimVQ(K, D).eval(), torch.randn(2, D, 5)
    before = quantizer.codebook().clone()
    change(quantizer)
    codes = torch.arange(K if first == "lookup of all" else 48).view(1, -1)
    with torch.no_grad():
        found = quantizer(latents)[0] if first == "search" else quantizer.lookup(codes)
    fresh = copy.deepcopy(quantizer)
    assert fresh._kept is None
    with torch.no_grad():
        assert torch.equal(found, fresh(latents)[0] if first == "search" else fresh.lookup(codes))
    for one, other in zip(results(quantizer, latents), results(fresh, latents), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(quantizer.codebook(), before)
    # What a layer does, hooks and adapters included, is what training sees.
    assert torch.allclose(quantizer.codebook(), quantizer.train().codebook(), atol=1e-6)


@pytest.mark.parametrize("where", ["basis", "projection.0.weight", "projection.2.bias"])
@pytest.mark.parametrize("options", [{"projection_hidden_dim": 5}, {"basis_dim": 7}, {}])
def test_every_weight_of_every_projection_is_compared(options, where):
    quantizer = SimVQ(K, D, **options).eval()
    before = quantizer.codebook().clone()
    names = dict(quantizer.named_parameters())
    name = where if where in names else where.replace(".0", "").replace(".2", "")
    names[name].data.view(-1)[-1].add_(1)
    assert not torch.equal(quantizer.codebook(), before)
    assert torch.equal(quantizer.codebook(), copy.deepcopy(quantizer).codebook())


def test_plain_vq_follows_its_table():
    quantizer = SimVQ(K, D, train_basis=True, train_projection=False).eval()
    quantizer.codebook()
    quantizer.basis.data[3] = 7
    assert torch.equal(quantizer.codebook(), quantizer.basis)


def written_in_numpy(codebook):
    numbers = codebook.numpy()
    numbers /= np.linalg.norm(numbers, axis=1, keepdims=True)


def written_in_inference_mode(codebook):
    with torch.inference_mode():
        codebook.div_(codebook.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("mode", ["evaluation", "training", "made in inference mode"])
@pytest.mark.parametrize("options", [{}, {"train_projection": False}, {"projection_hidden_dim": 4}])
@pytest.mark.parametrize(
    "write",
    [
        lambda codebook: codebook.sub_(codebook.mean(dim=0)),
        lambda codebook: codebook.data.mul_(3),
        lambda codebook: codebook.detach().zero_(),
        written_in_numpy,
        written_in_inference_mode,
    ],
)
def test_a_caller_that_writes_to_the_codebook_changes_no_codes(write, options, mode):
    quantizer = SimVQ(K, D, **options).train(mode == "training")
    latents = torch.randn(2, D, 50)
    with torch.inference_mode(mode == "made in inference mode"):
        before = quantizer(latents)[1]
        held = quantizer.codebook()
        same = held.clone()
        if mode == "made in inference mode":
            write(held)
    if mode != "made in inference mode":
        write(held)
    assert not torch.equal(held, same)
    with torch.no_grad():
        assert torch.equal(quantizer.codebook(), same)
        assert torch.equal(quantizer(latents)[1], before)
        assert torch.equal(quantizer.lookup(before).movedim(1, -1), same[before])


def test_what_forward_and_lookup_return_is_not_what_is_kept():
    quantizer = SimVQ(K, D).eval()
    with torch.no_grad():
        quantized, codes, _ = quantizer(torch.randn(1, D, K))
        first = quantizer.codebook()
        for given in (quantized, quantizer.lookup(codes), quantizer.lookup([[0]])):
            given.data.mul_(3)
    assert torch.equal(quantizer.codebook(), first)
    assert torch.equal(quantizer._kept.book.codes, first)


def test_unchanged_weights_keep_the_codebook():
    quantizer = SimVQ(K, D).eval()
    kept = quantizer._book().codes.data_ptr()
    quantizer.load_state_dict(quantizer.state_dict())
    quantizer.projection.weight.data.mul_(1)
    assert quantizer._book().codes.data_ptr() == kept


def test_weights_in_mapped_memory(tmp_path):
    quantizer = SimVQ(K, D).eval()
    numbers = np.memmap(tmp_path / "weights", dtype=np.float32, mode="w+", shape=(D, D))
    quantizer.projection.weight = nn.Parameter(torch.from_numpy(numbers))
    quantizer.codebook()
    other = np.memmap(tmp_path / "weights", dtype=np.float32, mode="r+", shape=(D, D))
    other[:] = np.eye(D)
    assert torch.equal(quantizer.codebook(), quantizer.basis + quantizer.projection.bias)
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(SimVQ(K, D).state_dict(), file)
    quantizer.load_state_dict(safetensors.torch.load_file(file), assign=True)
    assert torch.equal(quantizer.codebook(), copy.deepcopy(quantizer).codebook())


def test_functional_call_uses_its_own_weights_and_leaves_none_behind():
    quantizer, other = SimVQ(K, D).eval(), SimVQ(K, D).eval()
    latents = torch.randn(2, D, 5)
    own, others = quantizer(latents)[1], other(latents)[1]
    state = dict(other.named_parameters())
    assert torch.equal(torch.func.functional_call(quantizer, state, (latents,))[1], others)
    assert torch.equal(quantizer(latents)[1], own)


def test_a_transform_of_torch_func_leaves_nothing_behind():
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer = SimVQ(K, D).eval()

        def forward(self, codes):
            return self.quantizer.lookup(codes).square().sum()

    model, codes = Lookup(), torch.arange(6).view(1, 6)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.grad(lambda w: torch.func.functional_call(model, w, (codes,)))(weights)
    model(codes).backward()
    expected = model.quantizer.projection.weight.grad
    assert torch.allclose(found["quantizer.projection.weight"], expected, rtol=1e-4)
    assert torch.equal(model(codes), copy.deepcopy(model)(codes))


@pytest.mark.parametrize("codes_of", [48, 3])
def test_decoding_is_bit_by_bit_what_encoding_gave_with_gradients_or_without(codes_of):
    torch.manual_seed(0)
    quantizer = SimVQ(4096, 24).eval()
    latents = torch.randn(1, 24, 97)
    quantized, codes, loss = quantizer(latents)
    assert loss.requires_grad
    with torch.no_grad():
        assert torch.equal(quantizer(latents)[0], quantized)
        few = quantizer.lookup(codes[:, :codes_of])
    assert torch.equal(quantizer.lookup(codes), quantized)
    assert torch.equal(few, quantized[..., :codes_of])


def test_moves_and_training_let_the_codebook_go():
    quantizer = SimVQ(K, D).eval()
    for go in (quantizer.train, lambda: quantizer.to("meta")):
        quantizer.eval().codebook()
        go()
        assert quantizer._kept is None
