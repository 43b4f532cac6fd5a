"""Tiling: exact where the network is local, without seams where it is not, and bounded in memory."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_simvq.tiling import CrossFade, run_tiled, tile_starts
from tests.support.programs import run


def pool(cell):
    return lambda x: F.avg_pool2d(x, cell, ceil_mode=True, count_include_pad=False)


def enlarge(cell):
    return lambda x: x.repeat_interleave(cell, dim=-2).repeat_interleave(cell, dim=-1)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    cell=st.integers(1, 4),
    tile=st.integers(2, 9),
    data=st.data(),
)
def test_a_local_network_is_reproduced_exactly(height, width, cell, tile, data):
    overlap = data.draw(st.integers(1, tile // 2))
    inputs = torch.randn(1, 2, height, width)
    sizes = {"tile": tile, "overlap": overlap}
    down = run_tiled(pool(cell), inputs, input_cell=cell, output_cell=1, **sizes)
    torch.testing.assert_close(down, pool(cell)(inputs), rtol=1e-5, atol=1e-5)
    up = run_tiled(enlarge(cell), inputs, input_cell=1, output_cell=cell, **sizes)
    torch.testing.assert_close(up, enlarge(cell)(inputs), rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(length=st.integers(1, 200), tile=st.integers(2, 20), data=st.data())
def test_tiles_cover_everything_and_overlap_enough(length, tile, data):
    overlap = data.draw(st.integers(1, tile // 2))
    starts = tile_starts(length, tile, tile - overlap)
    ends = [min(start + tile, length) for start in starts]
    assert starts[0] == 0 and ends[-1] == length
    assert all(b - a > 0 for a, b in zip(starts, starts[1:], strict=False))
    assert all(end - start >= overlap for end, start in zip(ends, starts[1:], strict=False))


def test_no_tile_is_larger_than_asked():
    seen = []

    def network(x):
        seen.append(tuple(x.shape[-2:]))
        return x

    run_tiled(network, torch.zeros(1, 1, 50, 41), input_cell=1, output_cell=1, tile=16, overlap=4)
    assert len(seen) > 6 and max(max(size) for size in seen) == 16


@torch.no_grad()
def test_small_pictures_and_disabled_tiling_are_untouched(tiny_model, pixels):
    expected = tiny_model(pixels)
    tiny_model.enable_tiling(tile_size=40, overlap=8)
    assert torch.equal(tiny_model(pixels).pixel_values, expected.pixel_values)
    tiny_model.enable_tiling(tile_size=16, overlap=4)
    assert not torch.equal(tiny_model(pixels).pixel_values, expected.pixel_values)
    tiny_model.disable_tiling()
    assert torch.equal(tiny_model(pixels).pixel_values, expected.pixel_values)


def test_tiling_is_for_inference_only(tiny_model, pixels):
    expected = tiny_model(pixels).pixel_values
    tiny_model.enable_tiling(tile_size=16, overlap=4)
    output = tiny_model(pixels).pixel_values
    assert output.requires_grad and torch.equal(output, expected)


@torch.no_grad()
def test_odd_sizes_keep_their_shape_under_tiling(tiny_model):
    tiny_model.enable_tiling(tile_size=16, overlap=4)
    for height, width in ((37, 51), (16, 90), (33, 17), (2, 40)):
        output = tiny_model(torch.rand(1, 3, height, width) * 2 - 1)
        assert output.pixel_values.shape[-2:] == (-(-height // 2) * 2, -(-width // 2) * 2)
        assert output.image_codes.shape[-2:] == (-(-height // 2), -(-width // 2))


def step(difference: torch.Tensor, columns: list[int]) -> float:
    """Mean jump of a map between the given columns and their left neighbours."""
    jumps = (difference[..., 1:] - difference[..., :-1]).abs().mean(dim=(0, 1, 2))
    return float(jumps[[column - 1 for column in columns]].mean())


@pytest.mark.slow
@torch.no_grad()
def test_no_seams_on_a_photograph(tiny_model):
    """The error of tiling must not jump where tiles meet; without the cross-fade it does."""
    data = pytest.importorskip("skimage.data")
    photo = torch.from_numpy(data.astronaut()[:128, 150:342].copy()).permute(2, 0, 1)[None]
    photo = F.avg_pool2d(photo.float() / 127.5 - 1, 3, stride=1, padding=1)
    whole = tiny_model.encode(photo)
    tiny_model.enable_tiling(tile_size=64, overlap=32)
    tiled = tiny_model.encode(photo)
    assert F.mse_loss(tiled.latents, whole.latents) < 0.3 * whole.latents.var()
    decoded = tiny_model.decode(quantized_latents=whole.quantized_latents).pixel_values
    tiny_model.disable_tiling()
    expected = tiny_model.decode(quantized_latents=whole.quantized_latents).pixel_values
    assert F.mse_loss(decoded, expected) < 0.3 * expected.var()

    vectors = whole.quantized_latents
    for network, inputs, side, reference, ours in (
        (tiny_model.encoder, photo, 64, whole.latents, tiled.latents),
        (tiny_model.decoder, vectors, 32, expected, decoded),
    ):
        naive = torch.cat([network(piece) for piece in inputs.split(side, dim=-1)], dim=-1)
        width = reference.shape[-1]
        everywhere = list(range(1, width))
        naive_seams = [width // 3, 2 * width // 3]
        seams = list(range(width // 6, width, width // 6))  # where a tile begins or ends
        print(
            step(naive - reference, naive_seams) / step(naive - reference, everywhere),
            step(ours - reference, seams) / step(ours - reference, everywhere),
        )
        assert step(naive - reference, naive_seams) > 2 * step(naive - reference, everywhere)
        assert step(ours - reference, seams) < 1.5 * step(ours - reference, everywhere)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"tile_size": 15}, "tile_size=15"),
        ({"tile_size": 0}, "tile_size=0"),
        ({"tile_size": 16, "overlap": 3}, "overlap=3"),
        ({"tile_size": 16, "overlap": 10}, "overlap=10"),
        ({"tile_size": 16, "overlap": 0}, "overlap=0"),
        ({"tile_size": 16, "overlap": -2}, "overlap=-2"),
    ],
)
def test_impossible_tiles_are_named(tiny_model, sizes, named):
    with pytest.raises(ValueError, match=named):
        tiny_model.enable_tiling(**sizes)


MEASURE = """
import json, re, torch
from modeling_simvq import SimVQImageConfig, SimVQImageModel

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024

torch.set_num_threads(1)
model = SimVQImageModel(SimVQImageConfig(base_channels=32, channel_multipliers=[1, 1, 1, 1],
    num_res_blocks=1, codebook_size=64, codebook_dim=16)).eval()
picture = torch.zeros(1, 3, 640, 640)
with torch.no_grad():
    model(picture[..., :64, :64])
    start = peak()
    model.enable_tiling(tile_size=128, overlap=32)
    model(picture)
    tiled = peak() - start
    model.disable_tiling()
    model(picture)
    whole = peak() - start
print(json.dumps({"tiled": tiled, "whole": whole}))
"""


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_tiling_bounds_the_memory():
    done = run("-c", MEASURE)
    assert done.returncode == 0, done.stderr
    megabytes = json.loads(done.stdout.splitlines()[-1])
    assert megabytes["tiled"] < megabytes["whole"] / 3, megabytes


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    tile=st.integers(2, 9),
    data=st.data(),
)
def test_pieces_of_a_whole_give_it_back_in_any_number_of_dimensions(sizes, tile, data):
    overlap = data.draw(st.integers(1, tile // 2))
    whole = torch.randn(2, 3, *sizes)
    faded = CrossFade(whole.shape, overlap, whole.device)
    for starts in itertools.product(*(tile_starts(s, tile, tile - overlap) for s in sizes)):
        faded.add(whole[:, :, *(slice(s, s + tile) for s in starts)], starts)
    torch.testing.assert_close(faded.result(), whole)


def test_rows_that_end_early_do_not_fade_out_at_their_ends():
    """Values differ between pieces; where a row has one piece only, it has that piece's value."""
    faded = CrossFade((2, 1, 8), 2, torch.device("cpu"))
    faded.add(torch.full((2, 1, 5), 1.0), [0], [0, 1], torch.tensor([8, 5])[:, None, None])
    faded.add(torch.full((1, 1, 5), 3.0), [3], [0], torch.tensor([8])[:, None, None])
    expected = [[1, 1, 1, 1.5, 2.5, 3, 3, 3], [1, 1, 1, 1, 1, 0, 0, 0]]
    torch.testing.assert_close(faded.result()[:, 0], torch.tensor(expected))
