"""Means over what a sampling run wrote down, which run some latents are of, maps as colours."""

from __future__ import annotations

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.attention_map import (
    RecordedRun,
    Share,
    blocks_of,
    check_images,
    colorize,
    of_samples,
)

ALL = [("all", None)]
BLOCKS = (("input", 1), ("middle", 0), ("output", 3))


def flat(*values):
    """Maps of one text of one latent, each slot's value everywhere."""
    return torch.tensor(values)[None, None, :, None, None].expand(1, 1, -1, 4, 4)


def share(sigma, *values, numbers=None, block=("input", 1), frames=(0,)):
    return Share(
        sigma, block, frames, (numbers or tuple(range(1, len(values) + 1)),), flat(*values)
    )


def run(*shares, samples=None, prompts=2):
    samples = torch.rand(1, 4, 4, 4) if samples is None else samples
    return RecordedRun(samples, prompts, lambda at: 10 * (1 - at), shares)


def value(recorded, prompt=0, start=0.0, end=1.0, blocks=ALL):
    maps = recorded.heat(blocks, start, end, prompt)
    assert maps.shape == (1, 4, 4) and float(maps.std()) < 1e-6
    return pytest.approx(float(maps[0, 0, 0]))


def test_each_prompt_by_the_steps_in_which_it_was_in_force():
    """A early, B late, each alone in the first slot; both in the middle."""
    found = run(share(9.0, 0.2, numbers=(1,)), share(5.0, 0.4, 0.3), share(1.0, 0.5, numbers=(2,)))
    assert (value(found, 1), value(found, 2)) == (0.3, 0.4)
    assert value(found, 0) == (0.2 + 0.7 + 0.5) / 3
    assert (value(found, 1, 0.3), value(found, 2, 0.0, 0.6)) == (0.4, 0.3)
    with pytest.raises(ValueError, match=r"Image prompt 2 was not in force between 0 and 0.4"):
        value(found, 2, 0.0, 0.4)


def test_slots_and_texts_without_a_prompt_do_not_count():
    """Text 1 has prompt 2 in its second slot, text 2 has prompt 1 in its first, text 3 has none."""
    maps = torch.cat([flat(0.0, 0.3), flat(0.1, 0.0), flat(0.0, 0.0)])
    found = run(Share(5.0, ("input", 1), (0,), ((0, 2), (1, 0), (0, 0)), maps))
    assert (value(found, 1), value(found, 2)) == (0.1, 0.3)
    assert value(found, 0) == 0.2


def test_texts_count_alike_in_one_call_or_in_several():
    together = Share(
        5.0, ("input", 1), (0,), ((1,),) * 3, torch.cat([flat(x) for x in (0.1, 0.2, 0.6)])
    )
    apart = [share(5.0, 0.1), together]
    apart[1] = Share(5.0, ("input", 1), (0,), ((1,),) * 2, torch.cat([flat(0.2), flat(0.6)]))
    assert value(run(together), 1) == value(run(*apart), 1).expected == pytest.approx(0.3)


def test_evaluations_at_one_sigma_are_one_step():
    """As Heun's sampler evaluates all but the first twice; then steps and blocks count alike."""
    found = run(
        share(9.0, 0.1), share(5.0, 0.2), share(5.0, 0.4), share(5.0, 0.8, block=("middle", 0))
    )
    assert value(found, 1) == (0.1 + 0.3 + 0.8) / 3
    assert value(found, 1, blocks=[("input", None)]) == 0.2


def test_frames_of_several_windows():
    """Frame 1 lies in both."""
    maps = [
        torch.tensor(x)[None, :, None, None, None].expand(1, 2, 1, 4, 4)
        for x in ([0.1, 0.2], [0.6, 0.5])
    ]
    shares = [
        Share(5.0, ("input", 1), frames, ((1,),), m)
        for frames, m in zip([(0, 1), (1, 2)], maps, strict=True)
    ]
    found = run(*shares, samples=torch.rand(3, 4, 4, 4)).heat(ALL, 0, 1, 1)
    assert found[:, 0, 0].tolist() == pytest.approx([0.1, 0.4, 0.5])


def test_maps_come_at_the_size_of_the_latents():
    coarse = torch.tensor([[0.0, 1.0]]).expand(1, 1, 1, 2, 2)
    found = run(Share(5.0, ("input", 1), (0,), ((1,),), coarse)).heat(ALL, 0, 1, 0)
    assert found.shape == (1, 4, 4)
    assert float(found[..., 0].max()) < 0.3 < 0.7 < float(found[..., 3].min())


@pytest.mark.parametrize(
    "blocks, wanted",
    [
        ("all", 0.3),
        ("", 0.3),
        ("input", 0.1),
        ("Output 3; middle", 0.4),
        ("middle, middle 0, input 1", 0.2),
        ("input 1, all", 0.3),
    ],
)
def test_blocks(blocks, wanted):
    values = zip((0.1, 0.3, 0.5), BLOCKS, strict=True)
    found = run(*[share(5.0, x, block=block) for x, block in values])
    assert value(found, blocks=blocks_of(blocks)) == wanted


@pytest.mark.parametrize(
    "text", ["up 1", "input 1.2", "8", "middle, everything", "all, inptu 3", "all 1"]
)
def test_blocks_that_mean_nothing(text):
    with pytest.raises(ValueError, match="expected all, input, middle, output"):
        blocks_of(text)


@pytest.mark.parametrize(
    "text, bad", [("input 1, output 99", "output 99"), ("all, middle", "middle")]
)
def test_blocks_that_were_not_recorded(text, bad):
    found = run(share(5.0, 0.1), share(5.0, 0.1, block=("output", 3)))
    with pytest.raises(ValueError, match=f"{bad}'.* not recorded; .* of input 1, output 3"):
        found.heat(blocks_of(text), 0, 1, 0)


@pytest.mark.parametrize(
    "asked, message",
    [
        ((0.7, 0.2, 0), r"start_at \(0.7\) lies after end_at \(0.2\).*swap them"),
        ((0.6, 0.7, 0), "No step .* between 0.6 and 0.7"),
        ((0.0, 1.0, 3), "prompt_number is 3, but 2 were applied"),
    ],
)
def test_what_cannot_be_asked_for(asked, message):
    with pytest.raises(ValueError, match=message):
        run(share(5.0, 0.1, 0.2)).heat(ALL, *asked)


def test_a_run_without_a_prompt():
    with pytest.raises(ValueError, match=r"No image prompt was in force .* weight other than 0"):
        run(prompts=0).heat(ALL, 0, 1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_latents_tell_their_run(dtype):
    """The host hands them over in its own precision."""
    latents = [torch.randn(1, 4, 4, 4) for _ in range(2)]
    runs = [run(share(5.0, 0.1 * i), samples=x) for i, x in enumerate([*latents, latents[0]])]
    assert of_samples(runs, latents[1].to(dtype)) is runs[1]
    assert of_samples(runs, latents[0].to(dtype)) is runs[2]  # the last of equals


def test_latents_of_no_run():
    made = torch.randn(1, 4, 4, 4)
    for samples in (made + 0.01, made[..., :2], made.expand(2, -1, -1, -1)):
        with pytest.raises(ValueError, match=r"of none of the 1 sampling runs.* change the seed"):
            of_samples([run(share(5.0, 0.1), samples=made)], samples)
    with pytest.raises(ValueError, match=r"Nothing has been recorded.* came from the cache"):
        of_samples([], made)


def test_colours_reach_from_nothing_to_the_largest_value_of_all_maps():
    maps = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0))
    colours = colorize(maps)
    assert torch.allclose(colorize(maps * 1e-3), colours, atol=1e-5)
    grey = colours.mean(-1).flatten()[maps.flatten().argsort()]
    assert (grey.diff() >= 0).all() and float(grey[-1]) > 0.8


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (24, 36)])
def test_pictures_of_the_maps_shape_at_any_size(size):
    check_images(torch.rand(2, *size, 3), torch.rand(2, 8, 12))


@pytest.mark.parametrize(
    "shape, message",
    [
        ((3, 64, 96, 3), "image holds 3 pictures, but samples 2 latents"),
        ((1, 64, 96, 3), "image holds 1 pictures, but samples 2 latents"),
        ((2, 64, 64, 3), "image is 64×64 pixels, but samples 12×8 latents"),
        ((2, 96, 64, 3), "image is 64×96 pixels"),
    ],
)
def test_pictures_of_another_shape(shape, message):
    with pytest.raises(ValueError, match=message):
        check_images(torch.rand(shape), torch.rand(2, 8, 12))
