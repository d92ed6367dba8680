"""Memory, before a weight is loaded: what a step needs (trace), and what the GPU's allocator makes of it."""
