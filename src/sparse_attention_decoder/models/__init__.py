"""The seam with transformers: the only folder that imports it."""
