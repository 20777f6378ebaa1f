"""What is demanded of an evaluation: met by good figures, missed by each that is not."""

from __future__ import annotations

import copy

from miniature.thresholds import Demand, demands


def variant(distance, displacement, similarity):
    figures = {"distance": distance, "displacement": displacement, "image_similarity": similarity}
    figures |= {"shade_error": distance / 3, "seen": 0.97}
    return {"text_and_image": figures, "image_only": dict(figures)}


LOOK = {"colour": 0.9, "displacement": 3.0}
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
    "fine_grained_over_base": 0.02,
    "decoupled_over_concatenated": 0.1,
    "concatenated": {"shape": 0.7},
    "judge_accuracy": dict.fromkeys(("shape", "colour", "texture", "background"), 0.995),
    "judge_accuracy_outlined": dict.fromkeys(("shape", "colour", "texture", "background"), 0.97),
    "findings": {
        "sets": [
            {
                "seed": 1,
                "variants": {
                    "base": variant(20, 6, 0.7),
                    "fine_grained": variant(15, 3, 0.72),
                    "concatenated": variant(30, 8, 0.3),
                },
                "several_references": {
                    "concat": {
                        "colour_of_either": 0.9,
                        "background_of_either": 0.95,
                        "image_similarity": [0.6, 0.3],
                        "image_similarity_of_strangers": 0.1,
                    },
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
                        "uniform": {**LOOK, "texture": 0.95, "shape": 0.5, "background": 1.0},
                        "weaker": {**LOOK, "texture": 0.9, "shape": 0.4, "background": 0.9},
                        "style": {**LOOK, "texture": 0.9, "shape": 0.2, "background": 0.4}
                        | {"displacement": 5.0},
                        "composition": {**LOOK, "texture": 0.3, "shape": 0.2, "background": 0.7},
                    },
                    "attention_map": {"inside": 0.4, "outside": 0.01},
                },
            }
        ]
    },
}
ONE = "findings.sets.0"
BROKEN = {  # a figure, a value of it that is not good enough, and what misses it
    "colour_follows": (0.899, "colour follows the reference at λ = 1"),
    "background_follows": (0.899, "background follows the reference at λ = 1"),
    "texture_follows": (0.799, "texture follows the reference at λ = 1"),
    "shape_kept": (0.849, "the text's shape is kept at λ = 1"),
    "colour_at_zero": (0.3, "colour is at chance at λ = 0"),
    "background_at_zero": (0.1, "background is at chance at λ = 0"),
    "texture_at_zero": (0.4, "texture is at chance at λ = 0"),
    "image_similarity.0": (0.4, "likeness rises from λ = 0 to 0.5"),
    "image_similarity.1": (0.4, "likeness rises from λ = 0.5 to 1"),
    "image_only.colour": (0.5, "colour follows the image alone"),
    "image_only.background": (0.5, "background follows the image alone"),
    "image_only.texture": (0.5, "texture follows the image alone"),
    "image_only.shape_of_reference": (0.3, "shape follows the image alone"),
    "fine_grained_over_base": (0.0, "fine-grained is more like what is asked than base"),
    "decoupled_over_concatenated": (0.0, "decoupled attention over concatenation: likeness"),
    "concatenated.shape": (0.9, "decoupled attention over concatenation: the text's shape is kept"),
    "judge_accuracy_outlined.shape": (0.9, "the classifier knows shape of outlined shapes"),
    "judge_accuracy_outlined.colour": (0.9, "the classifier knows colour of outlined shapes"),
    "judge_accuracy_outlined.texture": (0.9, "the classifier knows texture of outlined shapes"),
    "judge_accuracy_outlined.background": (
        0.9,
        "the classifier knows background of outlined shapes",
    ),
    "judge_accuracy.shape": (0.9, "the classifier knows shape"),
    "judge_accuracy.colour": (0.9, "the classifier knows colour"),
    "judge_accuracy.texture": (0.9, "the classifier knows texture"),
    "judge_accuracy.background": (0.9, "the classifier knows background"),
}
CLOSER = "fine-grained is closer to what is asked than base"
IN_SETS = {
    "variants.fine_grained.text_and_image.distance": (20, f"{CLOSER}, text_and_image, in levels"),
    "variants.fine_grained.image_only.distance": (20, f"{CLOSER}, image_only, in levels"),
    "variants.fine_grained.text_and_image.displacement": (
        6,
        f"{CLOSER}, text_and_image, in pixels of displacement",
    ),
    "variants.fine_grained.image_only.displacement": (
        6,
        f"{CLOSER}, image_only, in pixels of displacement",
    ),
    "variants.fine_grained.text_and_image.seen": (
        0.5,
        "fine-grained draws a shape, text_and_image",
    ),
    "variants.fine_grained.image_only.seen": (0.5, "fine-grained draws a shape, image_only"),
    "variants.base.text_and_image.seen": (0.5, "base draws a shape, text_and_image"),
    "variants.base.image_only.seen": (0.5, "base draws a shape, image_only"),
    **{
        f"variants.concatenated.{setting}.{figure}": (
            value,
            f"decoupled attention over concatenation, {setting}: {what}",
        )
        for setting in ("text_and_image", "image_only")
        for figure, value, what in (
            ("image_similarity", 0.7, "likeness to what is asked"),
            ("distance", 20, "closer to it, in levels"),
        )
    },
    "several_references.concat.colour_of_either": (0.5, "concat: colour of either"),
    "several_references.concat.background_of_either": (0.5, "concat: background of either"),
    "several_references.concat.image_similarity_of_strangers": (
        0.3,
        "concat: like each of the two more than a stranger",
    ),
    "several_references.average.image_similarity_of_strangers": (
        0.5,
        "average: like each of the two more than a stranger",
    ),
    "several_references.per_latent.colour_of_own": (0.5, "one per latent: colour of its own"),
    "several_references.per_latent.background_of_own": (
        0.5,
        "one per latent: background of its own",
    ),
    "several_references.per_latent.colour_of_other": (0.5, "one per latent: colour of the other"),
    "several_references.per_latent.background_of_other": (
        0.5,
        "one per latent: background of the other",
    ),
    "structure.overlap_without": (0.75, "edges and image: shapes lie on the edges"),
    "structure.colour": (0.5, "edges and image: colour of the image"),
    "structure.background": (0.5, "edges and image: background of the image"),
    "structure.image_to_image.colour": (0.15, "image to image: the prompt brings its colour"),
    "another_base.colour": (0.5, "another base: colour"),
    "another_base.background": (0.5, "another base: background"),
    "another_base.shape_kept": (0.5, "another base: shape_kept"),
    "another_base.whiteness_of_outlines": (0.25, "another base: its outlines are whiter"),
    "toolbox.regions.colour_of_inner": (0.5, "regions: colour of its own"),
    "toolbox.regions.colour_of_outer": (0.5, "regions: colour of the other"),
    "toolbox.regions.background_of_outer": (0.5, "regions: background of its own"),
    "toolbox.regions.background_of_inner": (0.4, "regions: background of the other"),
    "toolbox.style.uniform.background": (
        0.45,
        "style leaves the reference's background more than uniform weights",
    ),
    "toolbox.style.weaker.background": (
        0.45,
        "style leaves the reference's background more than half of them",
    ),
    "toolbox.style.style.texture": (0.5, "style brings the texture"),
    "toolbox.style.composition.texture": (0.9, "style brings the texture more than composition"),
    "toolbox.attention_map.outside": (0.3, "the map is twice as warm inside the mask"),
}
BROKEN[f"{ONE}.toolbox.style.style.displacement"] = (
    3.4,
    "style leaves the reference's place more than uniform weights",
)
BROKEN |= {f"{ONE}.{path}": (value, f"set 1: {name}") for path, (value, name) in IN_SETS.items()}


def broken(path, value):
    made = copy.deepcopy(GOOD)
    *way, last = path.split(".")
    place = made
    for key in way:
        place = place[int(key) if isinstance(place, list) else key]
    assert last in place, path
    place[last] = value
    return made


def test_good_figures_meet_every_demand():
    asked = [*demands(GOOD)]
    assert all(demand.met for demand in asked), [str(d) for d in asked if not d.met]
    assert len({demand.name for demand in asked}) == len(asked) > 40


def test_a_figure_that_is_not_good_is_missed_and_told():
    """Differences of exactly nothing are among them."""
    for path, (value, name) in BROKEN.items():
        missed = [demand for demand in demands(broken(path, value)) if not demand.met]
        assert [demand.name for demand in missed] == [name], path
        assert str(missed[0]).startswith(f"MISS {name}: ")
        assert any(sign in str(missed[0]) for sign in "≥≤>")


def test_every_demand_can_be_missed():
    names = {name for _, name in BROKEN.values()}
    assert names == {demand.name for demand in demands(GOOD)}


def test_findings_that_were_not_measured_are_missed():
    few = {key: value for key, value in GOOD.items() if key != "findings"}
    assert [demand.name for demand in demands(few) if not demand.met] == ["findings"]


def test_nothing_that_is_not_a_number_passes():
    assert not Demand("displacement of shapes that none sees", float("nan"), 0).met
