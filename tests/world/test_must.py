"""What is demanded of an evaluation: met by figures that are good, missed by each that is not."""

from __future__ import annotations

import copy

import pytest

from tools.world import must


def variant(distance, displacement, similarity):
    figures = {"distance": distance, "displacement": displacement, "image_similarity": similarity}
    return {"text_and_image": figures, "image_only": dict(figures)}


GOOD = {
    "colour_follows": 0.95,
    "background_follows": 0.99,
    "texture_follows": 0.85,
    "shape_kept": 0.9,
    "colour_at_zero": 0.12,
    "background_at_zero": 0.2,
    "texture_at_zero": 0.25,
    "chance": {
        kind: {"mean": middle, "low": middle - 0.06, "high": middle + 0.06}
        for kind, middle in (("colour", 0.13), ("background", 0.2), ("texture", 0.26))
    },
    "image_similarity": {"0": 0.05, "0.5": 0.4, "1": 0.7},
    "image_only": {"colour": 0.95, "background": 1.0, "texture": 0.9, "shape_of_reference": 0.7},
    "judge_accuracy": dict.fromkeys(("shape", "colour", "texture", "background"), 0.995),
    "findings": {
        "seeds": [
            {
                "variants": {
                    "base": variant(20, 6, 0.7),
                    "fine_grained": variant(15, 3, 0.72),
                    "concatenated": variant(30, 8, 0.3),
                },
                "several_references": {
                    "concat": {"colour_of_either": 0.9, "background_of_either": 0.95},
                    "average": {
                        "image_similarity": [0.5, 0.55],
                        "image_similarity_of_strangers": 0.1,
                    },
                    "per_latent": {
                        "colour_of_own": 0.95,
                        "colour_of_other": 0.0,
                        "background_of_own": 1.0,
                        "background_of_other": 0.0,
                    },
                },
                "structure": {
                    "overlap": 0.8,
                    "overlap_without": 0.3,
                    "colour": 0.95,
                    "background": 0.95,
                    "image_to_image": {
                        "overlap": 0.6,
                        "overlap_without": 0.3,
                        "colour": 0.5,
                        "colour_without": 0.1,
                    },
                },
                "another_base": {
                    "colour": 0.9,
                    "background": 0.95,
                    "shape_kept": 0.9,
                    "whiteness_of_outlines": 0.6,
                    "whiteness_on_the_first_base": 0.2,
                },
                "toolbox": {
                    "regions": {
                        "colour_of_inner": 0.9,
                        "colour_of_outer": 0.05,
                        "background_of_inner": 0.1,
                        "background_of_outer": 0.9,
                    },
                    "style": {
                        "uniform": {"displacement": 3.0},
                        "style": {"displacement": 6.0, "texture": 0.9},
                    },
                    "attention_map": {"inside": 0.4, "outside": 0.01},
                },
            }
        ]
    },
}
ONE = "findings.seeds.0"
BROKEN = {
    "colour_follows": 0.89,
    "background_follows": 0.89,
    "texture_follows": 0.79,
    "shape_kept": 0.84,
    "colour_at_zero": 0.3,
    "background_at_zero": 0.1,
    "texture_at_zero": 0.4,
    "image_similarity.0.5": 0.71,
    "image_only.texture": 0.5,
    "image_only.shape_of_reference": 0.3,
    "judge_accuracy.shape": 0.9,
    f"{ONE}.variants.fine_grained.text_and_image.distance": 21,
    f"{ONE}.variants.fine_grained.image_only.displacement": 6.5,
    f"{ONE}.variants.concatenated.text_and_image.image_similarity": 0.75,
    f"{ONE}.several_references.concat.colour_of_either": 0.5,
    f"{ONE}.several_references.average.image_similarity_of_strangers": 0.52,
    f"{ONE}.several_references.per_latent.background_of_other": 0.5,
    f"{ONE}.structure.overlap_without": 0.75,
    f"{ONE}.structure.background": 0.5,
    f"{ONE}.structure.image_to_image.overlap": 0.35,
    f"{ONE}.structure.image_to_image.colour": 0.15,
    f"{ONE}.another_base.shape_kept": 0.5,
    f"{ONE}.another_base.whiteness_of_outlines": 0.25,
    f"{ONE}.toolbox.regions.colour_of_inner": 0.5,
    f"{ONE}.toolbox.regions.background_of_inner": 0.4,
    f"{ONE}.toolbox.style.style.displacement": 2.0,
    f"{ONE}.toolbox.style.style.texture": 0.5,
    f"{ONE}.toolbox.attention_map.outside": 0.3,
}


def broken(path, value):
    made = copy.deepcopy(GOOD)
    place = made
    for key in path.split("."):
        rest = path.split(f"{key}.", 1)[-1]
        if isinstance(place, list):
            place = place[int(key)]
        elif rest in place:  # "0.5" is one key
            place[rest] = value
            return made
        elif not isinstance(place.get(key), (dict, list)):
            place[key] = value
            return made
        else:
            place = place[key]
    raise AssertionError(path)


def test_good_figures_meet_every_demand():
    asked = [*must.demands(GOOD)]
    assert all(demand.met for demand in asked), [str(d) for d in asked if not d.met]
    assert len({demand.name for demand in asked}) == len(asked) > 40


@pytest.mark.parametrize("path", BROKEN)
def test_a_figure_that_is_not_good_is_missed_and_told(path):
    missed = [demand for demand in must.demands(broken(path, BROKEN[path])) if not demand.met]
    assert missed, path
    assert len(missed) <= 2
    for demand in missed:
        assert str(demand).startswith("MISS")
        assert ("≥" in str(demand)) or ("≤" in str(demand))


def test_without_findings_and_further_models_the_rest_is_demanded():
    few = copy.deepcopy(GOOD)
    some = few["findings"]["seeds"][0]
    for name in ("structure", "another_base", "toolbox"):
        del some[name]
    del some["variants"]["concatenated"]
    assert 20 < len([*must.demands(few)]) < len([*must.demands(GOOD)])
    del few["findings"]
    assert all(demand.met for demand in must.demands(few))


def test_nothing_that_is_not_a_number_passes():
    assert not must.Demand("displacement of shapes that none sees", float("nan"), 0).met
