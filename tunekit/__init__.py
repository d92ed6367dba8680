"""From a handful of pictures to a small, fast, verified diffusion model."""

__version__ = "0.1.0"
