"""The host's kinds of guidance: each makes a guider of a model, two prompts and a negative one."""

from __future__ import annotations

from comfy.samplers import CFGGuider
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from comfy_extras.nodes_sag import SelfAttentionGuidance


def cfg(model, positive, middle, negative, scale=3.0):
    guider = CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(scale)
    return guider


def cfg_1(*given):
    return cfg(*given, scale=1.0)  # the host leaves the negative out


def dual_cfg(model, positive, middle, negative, scales=(3.0, 2.0), nested=False):
    guider = Guider_DualCFG(model)
    guider.set_conds(positive, middle, negative)
    guider.set_cfg(*scales, nested=nested)
    return guider


def dual_cfg_nested(*given):
    return dual_cfg(*given, nested=True)


def dual_cfg_1(*given):
    return dual_cfg(*given, scales=(3.0, 1.0))  # here too


def perp_neg(model, positive, empty, negative):
    guider = Guider_PerpNeg(model)
    guider.set_conds(positive, negative, empty)
    guider.set_cfg(3.0, 0.8)
    return guider


def perturbed_attention(model, *given):
    return cfg(PerturbedAttentionGuidance.execute(model, 2.0).args[0], *given)


def self_attention(model, *given):
    return cfg(SelfAttentionGuidance.execute(model, 0.7, 2.0).args[0], *given)
