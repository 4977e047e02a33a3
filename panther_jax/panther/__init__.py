"""All that knows the challenge: recipe, chain of stages, archives, container."""
