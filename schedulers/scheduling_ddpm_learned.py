"""The DDPM scheduler; its file is that of the DDIM scheduler, as from the Hub diffusers fetches one for a scheduler."""

from .scheduling_ddim_eta import LearnedVarianceDDPMScheduler


__all__ = ["LearnedVarianceDDPMScheduler"]
