"""A name that is not known is answered with the nearest one that is, wherever names are refused."""

import pytest

from imagenet64_diffusion.conversion.original import build_empty_unet, check_params
from imagenet64_diffusion.evaluation.extractors import make_extractor
from imagenet64_diffusion.evaluation.options import ReferenceOptions, ScoreOptions
from imagenet64_diffusion.pipelines.loading import load_pipeline, scheduler_class
from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.tests.components import make_unet
from imagenet64_diffusion.tests.conversion.originals import SMALL_PARAMS
from imagenet64_diffusion.training.components import load_model_config


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scheduler_class("UniPCMultistp"), "no scheduler named 'UniPCMultistp': .*; perhaps UniPCMultistep$"),
        (lambda: scheduler_class("unipcmultistepscheduler"), "perhaps UniPCMultistep$"),
        (lambda: scheduler_class("EtaDDMI"), "perhaps EtaDDIM$"),
        (lambda: make_unet(layer_types=("resnet", "clsAtm")), "'clsAtm', .*; perhaps clsAtn$"),
        (lambda: load_model_config("rse_res"), "'rse_res', but .*; perhaps res_res$"),
        (lambda: ScoreOptions(reference="a", model="b", metrics=["FDI"]), "^metrics is 'FDI', .*; perhaps fid$"),
        (lambda: ReferenceOptions(output_dir="a", source="b", protocol="dinov"), "'dinov', .*; perhaps dinov2$"),
        (lambda: make_extractor("pixel"), "there is no protocol 'pixel': .*; perhaps pixels$"),
        (lambda: build_empty_unet(SMALL_PARAMS, "original_sin", "a"), "'original_sin', .*; perhaps original_sine$"),
        (lambda: check_params({**SMALL_PARAMS, "beta_sched": "cosin"}, "a"), "'cosin', .*; perhaps cosine$"),
        (lambda: check_params({**SMALL_PARAMS, "blk_types": ["resn"]}, "a"), "'resn', .*; perhaps res$"),
        (lambda: load_pipeline(DIGITS, varient="fp16"), "unknown arguments .*: varient; perhaps variant$"),
    ],
)
def test_where_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
