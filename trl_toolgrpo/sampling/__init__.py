"""Where tokens come from: the sampler protocol, and the samplers."""
