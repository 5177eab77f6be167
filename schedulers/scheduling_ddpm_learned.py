"""The DDPM scheduler; it is defined beside the DDIM scheduler, with which it shares nearly all."""

from .scheduling_ddim_eta import LearnedVarianceDDPMScheduler


__all__ = ["LearnedVarianceDDPMScheduler"]
