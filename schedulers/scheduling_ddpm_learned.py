"""The DDPM scheduler. Its file is that of the DDIM scheduler: from the Hub diffusers fetches one for a scheduler."""

from .scheduling_ddim_eta import LearnedVarianceDDPMScheduler


__all__ = ["LearnedVarianceDDPMScheduler"]
