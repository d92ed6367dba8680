"""Pure maths of diffusion on tensors: noise, objectives, sampling, metrics. Knows no model and no file."""
