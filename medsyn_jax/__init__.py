"""Vision-language pre-training on synthetic chest radiographs, in JAX: from reports to tables."""
