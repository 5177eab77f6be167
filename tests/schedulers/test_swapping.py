"""Swapping schedulers, ours for stock ones and back, warns of nothing and loses nothing."""

import diffusers
import pytest
from diffusers.utils import logging

from imagenet64_diffusion import EDMHeunScheduler, EtaDDIMScheduler, LearnedVarianceDDPMScheduler
from imagenet64_diffusion.pretrained import DIGITS


OURS = [EtaDDIMScheduler, LearnedVarianceDDPMScheduler]
STOCK = ["DDIM", "DDPM", "PNDM", "UniPCMultistep", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep"]


@pytest.fixture(autouse=True)
def _no_warning(caplog):
    """diffusers keeps its messages from the root logger."""
    logger = logging.get_logger("diffusers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("stock", STOCK)
@pytest.mark.parametrize("max_beta", [1.0, 0.9])
def test_without_a_warning(ours, stock, max_beta, tmp_path):
    stock = getattr(diffusers, f"{stock}Scheduler")
    named = {"variance_type": "fixed_small", "set_alpha_to_one": False, "prediction_type": "v_prediction"}
    first = ours(max_beta=max_beta, **named)
    first.save_pretrained(tmp_path / "ours")
    for theirs in (
        stock.from_config(first.config),
        stock.from_pretrained(tmp_path / "ours"),
        stock.from_config(ours.from_pretrained(tmp_path / "ours").config),
    ):
        assert theirs.config.prediction_type == "v_prediction"
        theirs.save_pretrained(tmp_path / "theirs")
        for back in (
            ours.from_config(theirs.config),
            ours.from_pretrained(tmp_path / "theirs"),
            OURS[OURS[0] is ours].from_config(theirs.config),
        ):
            assert back.max_beta == back.config.max_beta == max_beta
            assert {name: back.config[name] for name in named} == named
    # what is asked for goes before what was saved
    assert ours.from_config(theirs.config, max_beta=0.5).config["_max_beta"] == 0.5
    assert "_max_beta" not in ours.from_config(theirs.config, max_beta=1.0).config


@pytest.mark.parametrize("stock", [diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("churn", [{}, {"S_churn": 0.0, "S_max": float("inf")}])
def test_without_a_warning_among_edm(stock, churn, tmp_path):
    named = {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.7, "rho": 5.0, "num_train_timesteps": 500}
    named |= {"sigma_schedule": "exponential", "prediction_type": "v_prediction", "final_sigmas_type": "sigma_min"}
    first = EDMHeunScheduler(**named, **churn)
    first.save_pretrained(tmp_path / "ours")
    for theirs in (stock.from_config(first.config), stock.from_pretrained(tmp_path / "ours")):
        theirs.save_pretrained(tmp_path / "theirs")
        for back in (
            EDMHeunScheduler.from_config(theirs.config),
            EDMHeunScheduler.from_pretrained(tmp_path / "theirs"),
        ):
            for scheduler in (theirs, back):
                assert {name: scheduler.config[name] for name in named} == named
            assert (back.config.S_churn, back.config.S_max, back.config.S_noise) == (0.0, float("inf"), 1.0)
    assert stock in first.compatibles


def test_churn_outlives_a_swap(caplog):
    """A stock scheduler says that it will not churn."""
    first = EDMHeunScheduler(S_churn=4.0, S_max=50.0)
    theirs = diffusers.EDMEulerScheduler.from_config(first.config)
    assert [record.getMessage()[:60] for record in caplog.records] == [
        "The config attributes {'S_churn': 4.0, 'S_max': 50.0} were pas"[:60]
    ]
    caplog.clear()
    back = EDMHeunScheduler.from_config(theirs.config)
    assert (back.config.S_churn, back.config.S_max, back.config.S_noise) == (4.0, 50.0, 1.0)


def test_configs_from_before():
    diffusers.DDIMScheduler.from_pretrained(DIGITS, subfolder="scheduler")
    # they name max_beta itself
    config = {"_class_name": "EtaDDIMScheduler", "max_beta": 0.9, "num_train_timesteps": 50}
    assert EtaDDIMScheduler.from_config(config).max_beta == 0.9
