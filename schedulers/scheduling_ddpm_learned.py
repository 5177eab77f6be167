"""The DDPM scheduler. A saved pipeline carries the file that defines it, which is that of the DDIM scheduler.

The two share nearly all, and from the Hub diffusers fetches one file for a scheduler, nothing that it imports.
"""

from .scheduling_ddim_eta import LearnedVarianceDDPMScheduler


__all__ = ["LearnedVarianceDDPMScheduler"]
